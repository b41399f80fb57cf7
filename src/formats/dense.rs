//! Dense row-major matrices of f32, bf16 or f16, used straight from the checkpoint.

use super::{Format, PackedMatrix};
use crate::tensor::{DType, Tensor};

/// Wraps a `[num_rows, num_cols]` tensor; panics on another rank or an integer dtype.
pub fn pack(data: Tensor) -> PackedMatrix {
    let shape = data.shape();
    let &[num_rows, num_cols] = shape.sizes() else {
        panic!("a weight matrix has two axes, got {shape:?}")
    };
    assert!(data.dtype().is_float(), "a dense matrix holds floating-point elements");
    PackedMatrix { format: Format::Dense, num_rows, num_cols, data, quantized: None }
}

/// One row, widened.
pub(super) fn row(matrix: &PackedMatrix, row: usize) -> Vec<f32> {
    let row = matrix.data.view().rows(row..row + 1);
    match row.dtype() {
        DType::F32 => row.as_slice::<f32>().to_vec(),
        DType::BF16 => row.as_slice::<half::bf16>().iter().map(|x| x.to_f32()).collect(),
        DType::F16 => row.as_slice::<half::f16>().iter().map(|x| x.to_f32()).collect(),
        other => panic!("a dense matrix of {other}"),
    }
}
