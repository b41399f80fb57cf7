//! Whole models on the CUDA backend, its kernels run by the SIMT machine.

use std::sync::Arc;

use half::bf16;
use tokenmill::checkpoint::dummy::DummySource;
use tokenmill::checkpoint::{CheckpointError, TensorInfo, TensorSource};
use tokenmill::config::{
    CacheConfig, CpuIsa, KvCacheDtype, Quantization, SchedulerConfig, SchedulingPolicy,
};
use tokenmill::model::spec::ModelSpec;
use tokenmill::ops::Ops;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::runner::{MemoryDemand, MemoryPlan};
use tokenmill::tensor::{DType, Tensor};
use tokenmill::weights::Loader;

use crate::bundled::Greedy;
use crate::decoding::{MIXTURE_TOLERANCE, decode, decode_with, error_and_limit, median_error};
use crate::recorded::Case;
use crate::shim::Shim;
use crate::shim::library::{HostLibrary, Skill};

/// Activations are bf16: eight bits, rounded after every operation of a few layers.
const TOLERANCE: f64 = 0.03;

/// Attention has kernels for heads of a multiple of sixteen elements; every family has such a case.
fn has_kernels(case: &Case) -> bool {
    let spec = ModelSpec::from_config(&case.config_json).unwrap();
    spec.layers.iter().all(|layer| layer.attention.head_dim.is_multiple_of(16))
}

#[test]
fn every_family_computes_the_recorded_logits_however_the_prompt_is_chunked() {
    for case in Case::all().into_iter().filter(has_kernels) {
        let ops: Arc<dyn Ops> = Arc::new(CudaOps::new(Shim::new()));
        for chunk in [case.token_ids.len(), 5] {
            let logits = decode(&case, Arc::clone(&ops), chunk, DType::BF16);
            let (error, most) = error_and_limit(&case, &logits, TOLERANCE);
            let what = format!("{} in chunks of {chunk} on {}", case.name, ops.name());
            assert!(error <= most, "{what}: off by {error}");
        }
    }
}

/// Whether memory can be planned for a model on the device, or the refusal.
fn planned(case: &Case, dtype: KvCacheDtype) -> Result<(), String> {
    let spec = ModelSpec::from_config(&case.config_json).unwrap();
    let cache = CacheConfig {
        memory_bytes: None,
        fraction: 0.4,
        gpu_memory_utilization: 0.9,
        block_size: 16,
        dtype,
        enable_prefix_caching: true,
    };
    let scheduler = SchedulerConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_num_queued_requests: 1,
        policy: SchedulingPolicy::Fcfs,
    };
    let demand = MemoryDemand {
        spec: &spec,
        weights_bytes: 0,
        wanted_len: None,
        cache: &cache,
        scheduler: &scheduler,
    };
    let ops = CudaOps::new(Shim::new());
    MemoryPlan::new(&ops, &demand, 0).map(|_| ()).map_err(|error| error.to_string())
}

#[test]
fn a_model_that_has_no_kernels_is_refused_before_its_weights_are_read() {
    let (with, without): (Vec<_>, Vec<_>) = Case::all().into_iter().partition(has_kernels);
    for case in &without {
        let refusal = planned(case, KvCacheDtype::Auto).unwrap_err();
        assert!(refusal.contains("has no kernels for head_dim "), "{}: {refusal}", case.name);
        assert!(refusal.ends_with(": a multiple of 16 up to 256 is needed"), "{refusal}");
    }
    for case in &with {
        assert_eq!(planned(case, KvCacheDtype::Auto), Ok(()), "{}", case.name);
    }
    for case in &with {
        let spec = ModelSpec::from_config(&case.config_json).unwrap();
        let is_latent = spec.layers[0].attention.latent().is_some();
        let what = if is_latent { "bf16 or f16, for latent attention," } else { "bf16, f16, fp8" };
        let refusal = planned(case, KvCacheDtype::F32).unwrap_err();
        let expected = format!("no kernels for --kv-cache-dtype f32: {what}");
        assert!(refusal.contains(&expected), "{}: {refusal}", case.name);
    }
    assert!(!without.is_empty(), "every head has kernels");
}

/// Random weights, eight times as large as dummy ones: what a layer adds is no smaller than what it
/// is added to, and experts differ.
struct Loud(DummySource);

impl TensorSource for Loud {
    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.0.info(name)
    }

    fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let tensor = self.0.tensor(name)?;
        let louder = |x: &bf16| bf16::from_f32(x.to_f32() * 8.0);
        Ok(match tensor.shape().sizes() {
            [_] => tensor,
            _ => {
                let values: Vec<bf16> = tensor.as_slice().iter().map(louder).collect();
                Tensor::from_slice(&values, tensor.shape())
            }
        })
    }
}

#[test]
fn experts_in_every_kind_of_format_compute_on_the_device_what_they_compute_on_the_cpu() {
    // Its recorded heads have no kernels.
    let case = Case::named("qwen3_moe");
    let config = case.config_json.replace("\"head_dim\": 24", "\"head_dim\": 32");
    assert_ne!(config, case.config_json);
    let spec = ModelSpec::from_config(&config).unwrap();
    let source = Loud(DummySource::new(spec.expected_tensors(), DType::BF16));
    for quantization in [None, Some(Quantization::Int8), Some(Quantization::Int4)] {
        let run = |ops: Arc<dyn Ops>, chunk: usize| {
            let loader = Loader::new(&source).quantized(quantization, 1);
            decode_with(&spec, loader, &case.token_ids, ops, chunk, DType::BF16)
        };
        let num_tokens = case.token_ids.len();
        let cpu = run(Arc::new(CpuOps::new(Some(1), CpuIsa::Auto).unwrap()), num_tokens);
        for chunk in [num_tokens, 1] {
            let ops = Arc::new(CudaOps::new(Shim::new()));
            let what = format!("{quantization:?} in chunks of {chunk} on {}", ops.name());
            let error = median_error(num_tokens, &run(ops, chunk), &cpu);
            assert!(error <= TOLERANCE * MIXTURE_TOLERANCE, "{what}: off by {error}");
        }
    }
}

/// Where FP8 is multiplied by FP8, activations keep four bits in every product: 0.083 of two layers.
const FP8_TOLERANCE: f64 = 0.12;

#[test]
fn a_long_prompt_in_fp8_is_multiplied_as_fp8_and_a_short_one_keeps_its_activations() {
    let case = Case::named("llama");
    // The next sizes of multiples of sixteen.
    let config =
        case.config_json.replace("\"intermediate_size\": 104", "\"intermediate_size\": 112");
    let config = config.replace("\"vocab_size\": 131", "\"vocab_size\": 144");
    let spec = ModelSpec::from_config(&config).unwrap();
    let source = Loud(DummySource::new(spec.expected_tensors(), DType::BF16));
    let run = |ops: Arc<dyn Ops>, chunk: usize| {
        let loader = Loader::new(&source).quantized(Some(Quantization::Fp8), 1);
        decode_with(&spec, loader, &case.token_ids, ops, chunk, DType::BF16)
    };
    let num_tokens = case.token_ids.len();
    let cpu = run(Arc::new(CpuOps::new(Some(1), CpuIsa::Auto).unwrap()), num_tokens);
    // q, k, v, o, gate, up and down of each layer, and the head.
    let products = 7 * spec.layers.len() + 1;
    for (chunk, calls, most) in [(num_tokens, products, FP8_TOLERANCE), (12, 0, TOLERANCE)] {
        let library = HostLibrary::new(Skill::Everything);
        let ops = CudaOps::new(Shim::new()).with_dense_products(Box::new(library.clone()));
        let what = format!("in chunks of {chunk} on {}", ops.name());
        let error = median_error(num_tokens, &run(Arc::new(ops), chunk), &cpu);
        assert!(error <= most, "{what}: off by {error}");
        let asked = library.take_asked();
        assert!(asked.iter().all(|(dtype, _)| *dtype == DType::Fp8), "{what}: {asked:?}");
        assert_eq!(asked.len(), calls, "{what}");
    }
}

/// Tokens of the first recorded answer that are compared.
const NUM_TOKENS: usize = 6;

#[test]
fn the_bundled_model_says_what_it_says_on_the_cpu() {
    let cpu = Greedy::new(CpuIsa::Auto, None, DType::BF16);
    let ops: Arc<dyn Ops> = Arc::new(CudaOps::new(Shim::new()));
    let device = Greedy::on(&ops, None, DType::BF16);
    assert_eq!(device.first_answer(NUM_TOKENS), cpu.first_answer(NUM_TOKENS));
}
