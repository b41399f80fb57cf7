//! Small matrices in one piece of memory.
//!
//! Large pages (2 MiB) lie only where memory has whole ones, and the matrices of an expert are
//! often smaller than one. Side by side they share them, like the rows of a large matrix.

use std::any::Any;
use std::sync::Arc;

use super::PackedMatrix;
use crate::tensor::{ALIGNMENT, DType, Tensor};

/// Bytes from which a matrix has large pages of its own, all but a few parts in a hundred of it.
const LARGE_BYTES: usize = 32 << 20;

/// Moves what small matrices in blocks hold into one piece of memory, in this order. Others, and
/// those in device memory, stay where they are.
pub fn join<'a>(matrices: impl Iterator<Item = &'a mut PackedMatrix>) {
    let moves = |matrix: &&mut PackedMatrix| {
        let data = &matrix.data;
        let is_small = data.size_bytes() < LARGE_BYTES;
        matrix.format.is_in_blocks() && is_small && !data.is_on_device()
    };
    let matrices: Vec<&mut PackedMatrix> = matrices.filter(moves).collect();
    if matrices.is_empty() {
        return;
    }
    let room_of = |matrix: &&mut PackedMatrix| matrix.data.size_bytes().next_multiple_of(ALIGNMENT);
    let mut memory = Tensor::zeros_on_large_pages(DType::U8, [matrices.iter().map(room_of).sum()]);
    let mut rest = memory.as_mut_slice::<u8>();
    for matrix in &matrices {
        let (room, after) = rest.split_at_mut(room_of(matrix));
        room[..matrix.data.size_bytes()].copy_from_slice(matrix.data.bytes());
        rest = after;
    }
    let memory = Arc::new(memory);
    let mut start = 0;
    for matrix in matrices {
        let (room, data) = (room_of(&matrix), &matrix.data);
        let bytes = &memory.bytes()[start..start + data.size_bytes()];
        let owner: Arc<dyn Any + Send + Sync> = memory.clone();
        let moved = Tensor::from_shared(bytes, data.dtype(), data.shape(), owner);
        matrix.data = moved.expect("every matrix begins with a cache line and has its bytes");
        start += room;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::{dense, int4, int8, quantize};

    fn address(matrix: &PackedMatrix) -> usize {
        matrix.data.bytes().as_ptr() as usize
    }

    #[test]
    fn matrices_keep_their_elements_and_lie_side_by_side() {
        let read = |row: usize, to: &mut [f32]| {
            to.iter_mut().enumerate().for_each(|(col, x)| *x = (row * 7 + col) as f32 - 40.0);
        };
        let mut matrices = [
            quantize(&int8::PerRow, [20, 70], 1, read),
            dense::pack(Tensor::from_slice(&[1.5_f32; 6], [2, 3])),
            quantize(&int4::Grouped(32), [33, 96], 1, read),
            quantize(&int8::PerRow, [5, 33], 1, read),
        ];
        let before: Vec<Vec<f32>> = matrices.iter().map(|m| m.row(m.num_rows - 1)).collect();
        let dense_at = address(&matrices[1]);
        join(matrices.iter_mut());
        let after: Vec<Vec<f32>> = matrices.iter().map(|m| m.row(m.num_rows - 1)).collect();
        assert_eq!(before, after);
        assert_eq!(address(&matrices[1]), dense_at, "a dense matrix stays");
        for (one, next) in [(0, 2), (2, 3)] {
            let end = address(&matrices[one]) + matrices[one].data.size_bytes();
            assert_eq!(end.next_multiple_of(ALIGNMENT), address(&matrices[next]));
        }
    }

    #[test]
    fn nothing_is_joined_to_nothing() {
        join(std::iter::empty());
        let mut dense = dense::pack(Tensor::from_slice(&[1.0_f32, 2.0], [1, 2]));
        join(std::iter::once(&mut dense));
        assert_eq!(dense.row(0), [1.0, 2.0]);
    }
}
