//! Dense row-major matrices of f32, bf16 or f16, used straight from the checkpoint.

use super::{Format, PackedMatrix};
use crate::tensor::{DType, Tensor};

/// Wraps a `[num_rows, num_cols]` tensor; panics on another rank or an integer dtype.
pub fn pack(data: Tensor) -> PackedMatrix {
    let shape = data.shape();
    let &[num_rows, num_cols] = shape.sizes() else {
        panic!("a weight matrix has two axes, got {shape:?}")
    };
    assert_ne!(data.dtype(), DType::U32, "a dense matrix holds floating-point elements");
    PackedMatrix { format: Format::Dense, num_rows, num_cols, data }
}
