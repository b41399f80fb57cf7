//! Dense matrices of f32, bf16 or f16: row-major, straight from the checkpoint, or bf16 in
//! blocks of sixteen rows.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::blocks::{BLOCK_ROWS, interleave};
use super::{Format, PackedMatrix, ROW_ALIGN, for_parts};
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

/// Puts a row-major matrix of bf16 into blocks, on `threads` threads; any other stays as it is.
pub fn into_blocks(matrix: PackedMatrix, threads: usize) -> PackedMatrix {
    let PackedMatrix { num_rows, num_cols, .. } = matrix;
    if matrix.format != Format::Dense || matrix.data.dtype() != DType::BF16 {
        return matrix;
    }
    let (row_bytes, padded_bytes) = (2 * num_cols, 2 * num_cols.next_multiple_of(ROW_ALIGN));
    let block_bytes = BLOCK_ROWS * padded_bytes;
    let mut data =
        Tensor::zeros_on_large_pages(DType::U8, [num_rows.div_ceil(BLOCK_ROWS), block_bytes]);
    let from = matrix.data.bytes();
    let to = (data.as_mut_slice::<u8>(), &mut [(); 0][..], &mut [(); 0][..]);
    for_parts(to, [block_bytes, 0, 0], threads, |first, (blocks, ..)| {
        let mut rows = vec![0; block_bytes];
        for (block, to) in blocks.chunks_exact_mut(block_bytes).enumerate() {
            rows.fill(0);
            let from = from[(first + block) * BLOCK_ROWS * row_bytes..].chunks_exact(row_bytes);
            for (to, from) in rows.chunks_exact_mut(padded_bytes).zip(from) {
                to[..row_bytes].copy_from_slice(from);
            }
            interleave(&rows, to);
        }
    });
    PackedMatrix { format: Format::DenseBlocks, data, ..matrix }
}

/// A row-major matrix of floats in another 16-bit dtype, every element rounded to nearest; any
/// other matrix stays as it is.
pub fn into_dtype(matrix: PackedMatrix, dtype: DType) -> PackedMatrix {
    let from = matrix.data.dtype();
    if matrix.format != Format::Dense || from == dtype {
        return matrix;
    }
    let PackedMatrix { num_rows, num_cols, .. } = matrix;
    let mut data = Tensor::zeros_on_large_pages(dtype, [num_rows, num_cols]);
    let mut wide = vec![0.0; num_cols];
    for row in 0..num_rows {
        read_row(&matrix, row, &mut wide);
        let to = data.view_mut().into_rows(row..row + 1);
        match dtype {
            DType::BF16 => to.into_mut_slice::<bf16>().convert_from_f32_slice(&wide),
            DType::F16 => to.into_mut_slice::<f16>().convert_from_f32_slice(&wide),
            other => panic!("a dense matrix in {other}"),
        }
    }
    PackedMatrix { data, ..matrix }
}

/// Bytes that a matrix of bf16 of this shape takes in blocks.
pub fn blocks_bytes([num_rows, num_cols]: [usize; 2]) -> usize {
    2 * num_rows.next_multiple_of(BLOCK_ROWS) * num_cols.next_multiple_of(ROW_ALIGN)
}

/// One row of a row-major matrix, widened.
pub(super) fn read_row(matrix: &PackedMatrix, row: usize, to: &mut [f32]) {
    let row = matrix.data.view().rows(row..row + 1);
    match row.dtype() {
        DType::F32 => to.copy_from_slice(row.as_slice()),
        DType::BF16 => row.as_slice::<bf16>().convert_to_f32_slice(to),
        DType::F16 => row.as_slice::<f16>().convert_to_f32_slice(to),
        other => panic!("a dense matrix of {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_dtype_holds_the_nearest_numbers() {
        let values: Vec<f16> = (0..12).map(|i| f16::from_f32(1.0 + i as f32 / 1024.0)).collect();
        let matrix = into_dtype(pack(Tensor::from_slice(&values, [3, 4])), DType::BF16);
        assert_eq!(matrix.data.dtype(), DType::BF16);
        for (got, want) in matrix.row(2).iter().zip(&values[8..]) {
            assert_eq!(*got, bf16::from_f32(want.to_f32()).to_f32());
        }
    }

    #[test]
    fn blocks_hold_the_same_rows() {
        let values: Vec<bf16> = (0..35 * 70).map(|i| bf16::from_f32(i as f32)).collect();
        let rows = pack(Tensor::from_slice(&values, [35, 70]));
        for threads in [1, 2, 5] {
            let blocks = into_blocks(pack(Tensor::from_slice(&values, [35, 70])), threads);
            assert_eq!(blocks.size_bytes(), blocks_bytes([35, 70]));
            for row in 0..35 {
                assert_eq!(blocks.row(row), rows.row(row), "row {row}");
            }
        }
    }
}
