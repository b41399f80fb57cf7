//! Dense matrices of f32, bf16 or f16: row-major, straight from the checkpoint, or bf16 in
//! blocks of sixteen rows.

use half::slice::HalfFloatSliceExt;

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
    for_parts(
        data.as_mut_slice::<u8>(),
        &mut [(); 0],
        [block_bytes, 0],
        threads,
        |first, blocks, _| {
            let mut rows = vec![0; block_bytes];
            for (block, to) in blocks.chunks_exact_mut(block_bytes).enumerate() {
                rows.fill(0);
                let from = from[(first + block) * BLOCK_ROWS * row_bytes..].chunks_exact(row_bytes);
                for (to, from) in rows.chunks_exact_mut(padded_bytes).zip(from) {
                    to[..row_bytes].copy_from_slice(from);
                }
                interleave(&rows, to);
            }
        },
    );
    PackedMatrix { format: Format::DenseBlocks, data, ..matrix }
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
        DType::BF16 => row.as_slice::<half::bf16>().convert_to_f32_slice(to),
        DType::F16 => row.as_slice::<half::f16>().convert_to_f32_slice(to),
        other => panic!("a dense matrix of {other}"),
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

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
