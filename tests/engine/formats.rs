//! The promise of `decoded` for every weight format on every instruction set, with a prefix that
//! many requests share at once and that is longer than a part of a context.

use std::sync::Arc;

use clap::ValueEnum;
use tokenmill::config::{KvCacheDtype, Quantization};
use tokenmill::ops::cpu::Isa;
use tokenmill::request::{RequestId, SamplingParams, StopConditions, TokenizedRequest};

use crate::decoded::{ROOMY, Setting, run};

/// Tokens that all prompts begin with: more than a part.
const COMMON: usize = 520;
/// As many decodes as make a shared part look further than most contexts reach.
const SHARERS: usize = 20;
const COMPARED: usize = 3;

fn request(index: usize) -> TokenizedRequest {
    let own = 1 + index % 5;
    let token = |i: usize| ((i * 17 + if i < COMMON { 0 } else { index * 31 } + 3) % 211) as u32;
    let sampling = SamplingParams { temperature: 0.8, seed: 7, ..SamplingParams::default() };
    TokenizedRequest {
        id: RequestId(format!("r{index}").into()),
        prompt_token_ids: (0..COMMON + own).map(token).collect(),
        sampling: Arc::new(SamplingParams { logprobs: Some(0), ..sampling }),
        // All of them decode at once for a while: one arrives per step.
        stop: StopConditions { max_tokens: Some(24), ..StopConditions::default() },
        n: 1,
        priority: 0,
        cache_salt: None,
    }
}

fn check(setting: &Setting) {
    let requests: Vec<TokenizedRequest> = (0..SHARERS).map(request).collect();
    let (together, _) = run(requests.clone(), setting);
    let lone = Setting { caching: false, threads: 1, ..setting.clone() };
    for request in &requests[SHARERS - COMPARED..] {
        let (alone, _) = run(vec![request.clone()], &lone);
        for (continuation, trace) in alone {
            assert_eq!(together[&continuation], trace, "{continuation:?} in {setting:?}");
        }
    }
}

#[test]
fn every_format_keeps_its_bits_beside_a_shared_prefix() {
    let formats = Quantization::value_variants().iter().map(|wanted| Some(*wanted));
    for quantization in formats.chain([None]) {
        for isa in Isa::supported() {
            check(&Setting {
                isa: isa.choice(),
                quantization,
                threads: 2,
                max_num_batched_tokens: 160,
                max_model_len: 640,
                num_blocks: 1024,
                ..ROOMY
            });
        }
    }
}

#[test]
fn every_cache_keeps_its_bits_beside_a_shared_prefix() {
    for kv_dtype in [KvCacheDtype::Int8, KvCacheDtype::Fp8, KvCacheDtype::F16] {
        for block_size in [8, 32] {
            check(&Setting {
                kv_dtype,
                block_size,
                threads: 3,
                max_model_len: 640,
                num_blocks: 2048,
                ..ROOMY
            });
        }
    }
}
