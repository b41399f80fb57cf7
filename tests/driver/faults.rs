//! Faults of kernels, which the driver reports later than they happen.

use crate::stub::Setup;

#[test]
fn a_driver_that_finds_no_gpu_is_one_clear_error() {
    let error = Setup::new("--device cuda").with("STUB_CUDA_DEVICES", 0).failure();
    assert_eq!(error, "error: --device cuda:0 cannot be used: the NVIDIA driver finds no GPU");
}
