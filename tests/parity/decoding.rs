//! The decoder against the recorded logits, whole and in chunks, with both backends.

use std::sync::Arc;

use tokenmill::checkpoint::Checkpoint;
use tokenmill::config::CpuIsa;
use tokenmill::device::RankContext;
use tokenmill::model::batch::{BatchEntry, BatchLimits, ForwardBatch};
use tokenmill::model::decoder::Decoder;
use tokenmill::model::kv_cache::KvCache;
use tokenmill::model::spec::ModelSpec;
use tokenmill::model::workspace::Workspace;
use tokenmill::ops::Ops;
use tokenmill::ops::cpu::{CpuOps, Isa};
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::tensor::DType;
use tokenmill::weights::Loader;

use crate::recorded::Case;

const BLOCK_SIZE: usize = 8;

/// Logits of every prompt token, computed in chunks of `chunk` tokens in one sequence whose
/// blocks lie in reverse order.
pub fn decode(case: &Case, ops: Arc<dyn Ops>, chunk: usize, kv_dtype: DType) -> Vec<f32> {
    let spec = ModelSpec::from_config(&case.config_json).unwrap();
    let source = Checkpoint::open(&case.folder).unwrap();
    decode_with(&spec, Loader::new(&source), &case.token_ids, ops, chunk, kv_dtype)
}

/// The same for any model and prompt.
pub fn decode_with(
    spec: &ModelSpec,
    loader: Loader<'_>,
    token_ids: &[u32],
    ops: Arc<dyn Ops>,
    chunk: usize,
    kv_dtype: DType,
) -> Vec<f32> {
    let rank = RankContext::solo(ops);
    let prompt_len = token_ids.len();
    let decoder = Decoder::load(spec, &loader.arranged(&*rank.ops), prompt_len).unwrap();
    let num_blocks = prompt_len.div_ceil(BLOCK_SIZE);
    let block_ids: Vec<u32> = (0..num_blocks as u32).rev().collect();
    let ops = &*rank.ops;
    let mut cache = KvCache::new(ops, spec, num_blocks, BLOCK_SIZE, kv_dtype).unwrap();
    let mut workspace = Workspace::new(ops, spec, prompt_len, prompt_len).unwrap();
    let limits =
        BatchLimits { max_num_tokens: prompt_len, max_num_seqs: 1, max_blocks_per_seq: num_blocks };
    let mut batch = ForwardBatch::new(ops, limits).unwrap();
    let mut logits = Vec::new();
    for (i, token_ids) in token_ids.chunks(chunk).enumerate() {
        let start_position = (i * chunk) as u32;
        let entry = BatchEntry { token_ids, start_position, block_ids: &block_ids };
        batch.fill(BLOCK_SIZE, [entry].into_iter());
        batch.select((0..token_ids.len()).map(|row| row as u32));
        batch.upload(ops);
        decoder.forward(&rank, &batch, &mut cache, &mut workspace);
        decoder.logits(&rank, &batch, 0..token_ids.len(), &mut workspace);
        let rows = workspace.logits.rows(token_ids.len());
        let mut bytes = vec![0; rows.size_bytes()];
        ops.download(&mut bytes, rows);
        ops.synchronize().unwrap();
        logits.extend(bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)));
    }
    logits
}

/// Both sides compute in f32 in different orders over a few layers; recorded logits are of
/// order one. A wrong angle, head or mask shows up at a hundred times this.
const TOLERANCE: f32 = 2e-4;

fn assert_close(case: &Case, what: &str, got: &[f32]) {
    let expected = case.logits.as_slice::<f32>();
    assert_eq!(got.len(), expected.len(), "{} {what}", case.name);
    let scale = expected.iter().fold(1.0_f32, |most, x| most.max(x.abs()));
    let worst = got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= TOLERANCE * scale, "{} {what}: off by {worst} of {scale}", case.name);
}

#[test]
fn the_referee_computes_the_recorded_logits() {
    for case in Case::all() {
        let logits = decode(&case, Arc::new(ReferenceOps), case.token_ids.len(), DType::F32);
        assert_close(&case, "on the referee", &logits);
    }
}

/// Tiles round activations to bf16, eight bits, before every product: a difference of up to one
/// part in 512 each time, which adds up over the layers as it does in any bf16 engine. Wrong
/// angles, heads and masks are found by the instruction sets that compute in f32.
const TILE_TOLERANCE: f64 = 0.02;

/// The root mean square of the differences, relative to that of the recorded logits.
pub fn relative_error(case: &Case, got: &[f32]) -> f64 {
    let expected = case.logits.as_slice::<f32>();
    let square = |x: f32| f64::from(x) * f64::from(x);
    let errors: f64 = got.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    (errors / expected.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

#[test]
fn the_cpu_backend_computes_the_recorded_logits_however_the_prompt_is_chunked() {
    for case in Case::all() {
        for isa in Isa::supported() {
            let ops = Arc::new(CpuOps::new(Some(2), isa.choice()).unwrap());
            let run = |chunk| decode(&case, Arc::clone(&ops) as Arc<dyn Ops>, chunk, DType::F32);
            let whole = run(case.token_ids.len());
            let what = format!("on {}", ops.name());
            match isa.choice() {
                CpuIsa::Amx | CpuIsa::Avx512Bf16 => {
                    let (error, most) = error_and_limit(&case, &whole, TILE_TOLERANCE);
                    assert!(error <= most, "{} {what}: off by {error}", case.name);
                }
                _ => assert_close(&case, &what, &whole),
            }
            for chunk in [1, 5] {
                let chunked = run(chunk);
                let same = whole.iter().zip(&chunked).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{}: chunks of {chunk} change bits", case.name);
            }
        }
    }
}

/// A code of INT8 is off by up to a 254th of its vector's largest element, one of E4M3 by up to a
/// sixteenth of itself. Random weights average out less of it than trained ones do.
const CACHE_TOLERANCES: [(DType, f64); 2] = [(DType::I8, 0.03), (DType::Fp8, 0.15)];

/// How much farther the tokens of a mixture may be off.
pub const MIXTURE_TOLERANCE: f64 = 2.0;

/// The relative error of the median token. In a mixture of experts a token with two choices that
/// are nearly as likely may make the other one, and is then as far off as experts differ; what
/// attends to it is off by some of that, for which [`MIXTURE_TOLERANCE`] is.
pub fn median_error(num_tokens: usize, got: &[f32], expected: &[f32]) -> f64 {
    let vocab_size = expected.len() / num_tokens;
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error = |(got, expected): (&[f32], &[f32])| -> f64 {
        let errors: f64 = got.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
        (errors / expected.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
    };
    let tokens = got.chunks_exact(vocab_size).zip(expected.chunks_exact(vocab_size));
    let mut errors: Vec<f64> = tokens.map(error).collect();
    errors.sort_by(f64::total_cmp);
    errors[errors.len() / 2]
}

/// How far logits are off, and how far they may be where they may be off by `most` without experts.
pub fn error_and_limit(case: &Case, got: &[f32], most: f64) -> (f64, f64) {
    let spec = ModelSpec::from_config(&case.config_json).unwrap();
    match spec.num_experts() {
        0 => (relative_error(case, got), most),
        _ => {
            let error = median_error(case.token_ids.len(), got, case.logits.as_slice());
            (error, most * MIXTURE_TOLERANCE)
        }
    }
}

#[test]
fn caches_of_bytes_keep_the_recorded_logits_close() {
    for case in Case::all() {
        for (kv_dtype, most) in CACHE_TOLERANCES {
            for isa in Isa::supported() {
                let ops = Arc::new(CpuOps::new(Some(2), isa.choice()).unwrap());
                let run = |chunk| decode(&case, Arc::clone(&ops) as Arc<dyn Ops>, chunk, kv_dtype);
                let whole = run(case.token_ids.len());
                let what = format!("{} {kv_dtype} on {}", case.name, ops.name());
                let (error, most) = error_and_limit(&case, &whole, most);
                assert!(error <= most, "{what}: off by {error}");
                let same = whole.iter().zip(&run(5)).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{what}: chunks change bits");
            }
        }
    }
}
