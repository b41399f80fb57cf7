//! Weights in blocks of sixteen rows, their scales, and where the sixteen output columns go that
//! a block yields.

use half::f16;

use super::rows::activate;
use super::share::Parts;
use super::simd::{Simd, load, store};
use crate::formats::blocks::BLOCK_ROWS;
use crate::formats::{Format, PackedMatrix};
use crate::ops::args::Activation;
use crate::tensor::Tensor;

/// The blocks of a matrix.
#[derive(Clone, Copy)]
pub struct Blocks<'a> {
    bytes: &'a [u8],
    /// Bytes from a block to the next.
    pub block_bytes: usize,
}

impl<'a> Blocks<'a> {
    /// Those of a matrix in blocks; panics on any other, or when bytes are missing.
    pub fn of(matrix: &'a PackedMatrix) -> Blocks<'a> {
        assert!(matrix.format.is_in_blocks());
        let block_bytes = BLOCK_ROWS * matrix.row_bytes();
        let bytes = matrix.data.bytes();
        assert!(bytes.len() >= matrix.num_rows.div_ceil(BLOCK_ROWS) * block_bytes, "whole blocks");
        Blocks { bytes, block_bytes }
    }

    /// A block and all that follow; panics when there is none.
    #[inline(always)]
    pub fn block(&self, block: usize) -> *const u8 {
        self.bytes[block * self.block_bytes..][..self.block_bytes].as_ptr()
    }
}

/// A scale per row of the matrix (INT8), padded to whole blocks.
#[derive(Clone, Copy)]
pub struct RowScales<'a>(&'a [f32]);

impl<'a> RowScales<'a> {
    /// Those of an INT8 matrix.
    pub fn of(matrix: &'a PackedMatrix) -> RowScales<'a> {
        RowScales(scales(matrix).as_slice())
    }

    /// The scales of a block.
    #[inline(always)]
    pub fn block(&self, block: usize) -> &'a [f32; BLOCK_ROWS] {
        self.0[block * BLOCK_ROWS..].first_chunk().expect("blocks have sixteen scales")
    }
}

/// Scales and zero points of groups of a row (INT4, Q8_0).
#[derive(Clone, Copy)]
pub struct GroupScales<'a> {
    scales: &'a [f16],
    zeros: Option<&'a [u8]>,
    /// Groups of a row, up to the end of its padding.
    pub groups: usize,
    /// Elements of a group.
    pub size: usize,
    /// Codes are folded.
    pub is_int4: bool,
}

impl<'a> GroupScales<'a> {
    /// Those of a matrix with groups.
    pub fn of(matrix: &'a PackedMatrix) -> GroupScales<'a> {
        assert!(matrix.format.quantizes_groups());
        let quantized = matrix.quantized.as_ref().expect("a quantized matrix has scales");
        let shape = quantized.grid.blocks_shape(matrix.num_rows, matrix.num_cols);
        assert_eq!(quantized.scales.shape().sizes(), shape, "scales fit the matrix");
        let size = quantized.grid.cols;
        assert!([32, 64, 128].contains(&size), "groups of {size}");
        GroupScales {
            scales: quantized.scales.as_slice(),
            zeros: quantized.zero_points.as_ref().map(Tensor::as_slice),
            groups: shape[1],
            size,
            is_int4: matrix.format == Format::Int4,
        }
    }

    /// The scales of a group of a block.
    #[inline(always)]
    pub fn scales(&self, block: usize, group: usize) -> &'a [f16; BLOCK_ROWS] {
        let at = (block * self.groups + group) * BLOCK_ROWS;
        self.scales[at..].first_chunk().expect("groups have sixteen scales")
    }

    /// The zero points of a group of a block; without them, codes are symmetric.
    #[inline(always)]
    pub fn zeros(&self, block: usize, group: usize) -> Option<&'a [u8; BLOCK_ROWS]> {
        let at = (block * self.groups + group) * BLOCK_ROWS;
        self.zeros.map(|zeros| zeros[at..].first_chunk().expect("groups have sixteen zeros"))
    }
}

fn scales(matrix: &PackedMatrix) -> &Tensor {
    let scales = &matrix.quantized.as_ref().expect("a quantized matrix has scales").scales;
    assert!(scales.shape().len() >= matrix.num_rows.next_multiple_of(BLOCK_ROWS), "scales fit");
    scales
}

/// Where results go: `out = main + bias`, or `activation(main + bias) * (up + its bias)`.
pub struct BlockOutput<'a> {
    /// `[num_rows, num_cols]`; tasks write disjoint columns.
    pub out: Parts<'a, f32>,
    /// Output columns.
    pub num_cols: usize,
    /// One per output column, padded to whole blocks.
    pub bias: Option<&'a [f32]>,
    /// The same for what the activated main product is multiplied by.
    pub up_bias: Option<&'a [f32]>,
    /// Applied to the main product when there is another.
    pub activation: Activation,
}

impl<'a> BlockOutput<'a> {
    /// The columns of a block.
    #[inline(always)]
    pub fn columns(&self, block: usize) -> BlockColumns<'_> {
        let first = block * BLOCK_ROWS;
        let of_block = |bias: &'a [f32]| bias[first..].first_chunk().expect("biases are padded");
        BlockColumns {
            output: self,
            first,
            bias: self.bias.map(of_block),
            up_bias: self.up_bias.map(of_block),
        }
    }
}

/// The output columns of a block.
pub struct BlockColumns<'a> {
    output: &'a BlockOutput<'a>,
    first: usize,
    bias: Option<&'a [f32; BLOCK_ROWS]>,
    up_bias: Option<&'a [f32; BLOCK_ROWS]>,
}

impl BlockColumns<'_> {
    /// Writes them in one row.
    ///
    /// # Safety
    /// No other task may write these columns of this row meanwhile.
    #[inline(always)]
    pub unsafe fn write<S: Simd>(
        &self,
        simd: S,
        row: usize,
        main: &[f32; BLOCK_ROWS],
        up: Option<&[f32; BLOCK_ROWS]>,
    ) {
        let start = row * self.output.num_cols + self.first;
        let len = BLOCK_ROWS.min(self.output.num_cols - self.first);
        // SAFETY: the caller's contract.
        let out = unsafe { self.output.out.part(start..start + len) };
        for at in (0..BLOCK_ROWS).step_by(S::LANES) {
            let mut value = biased(simd, main, self.bias, at);
            if let Some(up) = up {
                let up = biased(simd, up, self.up_bias, at);
                value = simd.mul(activate(simd, value, self.output.activation), up);
            }
            if at < len {
                store(simd, out, at, value);
            }
        }
    }
}

/// Values with their bias. A closure would not inherit the instructions of the function that it
/// is inlined into.
#[inline(always)]
fn biased<S: Simd>(
    simd: S,
    values: &[f32; BLOCK_ROWS],
    bias: Option<&[f32; BLOCK_ROWS]>,
    at: usize,
) -> S::V {
    match bias {
        Some(bias) => simd.add(load(simd, values, at), load(simd, bias, at)),
        None => load(simd, values, at),
    }
}
