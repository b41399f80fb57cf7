//! Whole models on the CUDA backend, its kernels run by the SIMT machine.

use std::sync::Arc;

use tokenmill::config::CpuIsa;
use tokenmill::model::spec::ModelSpec;
use tokenmill::ops::Ops;
use tokenmill::ops::cuda::CudaOps;
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
        for chunk in [case.token_ids.len(), 5] {
            let logits = decode(&case, Arc::clone(&ops), chunk, DType::BF16);
            let error = relative_error(&case, &logits);
            let what = format!("{} in chunks of {chunk} on {}", case.name, ops.name());
            assert!(error <= TOLERANCE, "{what}: off by {error}");
        }
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
