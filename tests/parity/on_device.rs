//! Whole models on the CUDA backend, its kernels run by the SIMT machine.

use std::sync::Arc;

use tokenmill::config::{CacheConfig, CpuIsa, KvCacheDtype, SchedulerConfig, SchedulingPolicy};
use tokenmill::model::check::check_operations;
use tokenmill::model::spec::ModelSpec;
use tokenmill::ops::Ops;
use tokenmill::ops::cuda::CudaOps;
use tokenmill::runner::{MemoryDemand, MemoryPlan};
use tokenmill::tensor::DType;

use crate::bundled::Greedy;
use crate::decoding::{decode, relative_error};
use crate::recorded::Case;
use crate::shim::Shim;

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
        let spec = ModelSpec::from_config(&case.config_json).unwrap();
        if check_operations(&spec, &*ops).is_err() {
            continue; // Refused when it is opened.
        }
        for chunk in [case.token_ids.len(), 5] {
            let logits = decode(&case, Arc::clone(&ops), chunk, DType::BF16);
            let error = relative_error(&case, &logits);
            let what = format!("{} in chunks of {chunk} on {}", case.name, ops.name());
            assert!(error <= TOLERANCE, "{what}: off by {error}");
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
    let refusal = planned(&with[0], KvCacheDtype::F32).unwrap_err();
    assert!(refusal.contains("no kernels for --kv-cache-dtype f32: bf16, f16, fp8"), "{refusal}");
    assert!(!without.is_empty(), "every head has kernels");
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
