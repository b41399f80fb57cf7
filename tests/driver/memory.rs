//! Where the bytes of a GPU go.

use crate::stub::Setup;

#[test]
fn a_gpu_without_room_for_the_weights_is_one_error_that_says_what_to_do() {
    let error = Setup::new("--device cuda").with("STUB_CUDA_MEMORY", 64 << 20).failure();
    assert!(error.contains("do not fit into the"), "{error}");
    assert!(error.contains("quantize the weights (--quantization)"), "{error}");
}
