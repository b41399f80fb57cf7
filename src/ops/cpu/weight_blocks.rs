//! Weights in blocks of sixteen rows, their scales, and where the sixteen output columns go that
//! a block yields.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use half::f16;

use super::best_columns::{BestColumns, offer};
use super::byte_simd::ByteSimd;
use super::lines::FillRows;
use super::lines::LINE_BYTES;
use super::middle::Middle;
use super::rows::activate;
use super::share::Parts;
use super::simd::{Simd, load, store};
use super::wide_simd::SLICE;
use crate::formats::blocks::BLOCK_ROWS;
use crate::formats::{Format, PackedMatrix};
use crate::ops::args::Activation;
use crate::tensor::Tensor;

/// The blocks of a matrix, or some of them.
#[derive(Clone, Copy)]
pub struct Blocks<'a> {
    bytes: &'a [u8],
    /// The block at their start.
    first: usize,
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
        Blocks { bytes, first: 0, block_bytes }
    }

    /// Those from block `first` on, as they were written to scratch memory.
    pub fn in_scratch(first: usize, block_bytes: usize, bytes: &'a [i8]) -> Blocks<'a> {
        // SAFETY: any i8 is a valid u8.
        let bytes = unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) };
        Blocks { bytes, first, block_bytes }
    }

    /// The block behind the last.
    pub fn end(&self) -> usize {
        self.first + self.bytes.len() / self.block_bytes
    }

    /// A block and all that follow; panics when there is none.
    #[inline(always)]
    pub fn block(&self, block: usize) -> *const u8 {
        self.bytes[(block - self.first) * self.block_bytes..][..self.block_bytes].as_ptr()
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

/// f32 scales of rows or of groups of whole slices of them (W8A16, FP8).
#[derive(Clone, Copy)]
pub struct SliceScales<'a> {
    scales: &'a [f32],
    /// Groups of a row, and elements of a group.
    groups: usize,
    size: usize,
}

impl<'a> SliceScales<'a> {
    /// Those of a matrix whose groups are whole slices.
    pub fn of(matrix: &'a PackedMatrix) -> SliceScales<'a> {
        let quantized = matrix.quantized.as_ref().expect("a quantized matrix has scales");
        let shape = quantized.grid.blocks_shape(matrix.num_rows, matrix.num_cols);
        assert_eq!(quantized.scales.shape().sizes(), shape, "scales fit the matrix");
        let (groups, size) = (shape[1], quantized.grid.cols);
        assert!(groups == 1 || size.is_multiple_of(SLICE), "groups of {size}");
        SliceScales { scales: quantized.scales.as_slice(), groups, size }
    }

    /// Whether a row has one scale.
    #[inline(always)]
    pub fn is_per_row(&self) -> bool {
        self.groups == 1
    }

    /// The scales of a block for the group of an element.
    #[inline(always)]
    pub fn of_element(&self, block: usize, at: usize) -> &'a [f32; BLOCK_ROWS] {
        let at = (block * self.groups + at / self.size) * BLOCK_ROWS;
        self.scales[at..].first_chunk().expect("groups have sixteen scales")
    }
}

/// What codes with a scale per group are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupCodes {
    /// Bytes (Q8_0).
    Bytes,
    /// Folded.
    Int4,
    /// Folded; numbers to look up.
    Mxfp4,
}

/// Sixteen scales of a group.
#[derive(Clone, Copy)]
pub enum ScaleLine<'a> {
    /// As they are.
    Half(&'a [f16; BLOCK_ROWS]),
    /// Powers of two (MXFP4).
    Power(&'a [u8; BLOCK_ROWS]),
}

impl ScaleLine<'_> {
    /// As vectors.
    #[inline(always)]
    pub fn load<S: ByteSimd>(self, simd: S) -> S::Floats {
        // SAFETY: there are sixteen.
        unsafe {
            match self {
                ScaleLine::Half(scales) => simd.half_scales(scales.as_ptr()),
                ScaleLine::Power(scales) => simd.power_scales(scales.as_ptr()),
            }
        }
    }
}

/// Scales and zero points of groups of a row (INT4, Q8_0, MXFP4).
#[derive(Clone, Copy)]
pub struct GroupScales<'a> {
    /// f16; empty for MXFP4.
    halves: &'a [f16],
    /// Those of MXFP4; else empty.
    powers: &'a [u8],
    zeros: Option<&'a [u8]>,
    /// Groups of a row, up to the end of its padding.
    pub groups: usize,
    /// Elements of a group.
    pub size: usize,
    /// What they belong to.
    pub codes: GroupCodes,
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
        let codes = match matrix.format {
            Format::Int4 => GroupCodes::Int4,
            Format::Mxfp4 => GroupCodes::Mxfp4,
            _ => GroupCodes::Bytes,
        };
        let is_power = codes == GroupCodes::Mxfp4;
        GroupScales {
            halves: if is_power { &[] } else { quantized.scales.as_slice() },
            powers: if is_power { quantized.scales.as_slice() } else { &[] },
            zeros: quantized.zero_points.as_ref().map(Tensor::as_slice),
            groups: shape[1],
            size,
            codes,
        }
    }

    /// The scales of a group of a block.
    #[inline(always)]
    pub fn scales(&self, block: usize, group: usize) -> ScaleLine<'a> {
        const SIXTEEN: &str = "groups have sixteen scales";
        let at = (block * self.groups + group) * BLOCK_ROWS;
        match self.codes {
            GroupCodes::Mxfp4 => ScaleLine::Power(self.powers[at..].first_chunk().expect(SIXTEEN)),
            _ => ScaleLine::Half(self.halves[at..].first_chunk().expect(SIXTEEN)),
        }
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

/// Where results of all rows are put.
#[derive(Clone, Copy)]
pub enum Place<'a> {
    /// `[num_rows, num_cols]`; tasks write disjoint columns.
    Rows(Rows<'a>),
    /// On their way to another product.
    Middle(&'a Middle<'a>),
    /// As bf16, as they are read by another product; the width is a multiple of a line's 32.
    Lines(&'a FillRows<'a>),
    /// Nowhere: what stays is which column of a row has the largest.
    Best(&'a BestColumns),
}

/// Row-major results.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    /// All of them.
    pub out: Parts<'a, f32>,
    is_streamed: bool,
}

impl<'a> Rows<'a> {
    /// Results that are the next operation's to read. When the caches do not keep them until then,
    /// they are written past the caches: each is a whole cache line in a row of its own, and a
    /// cache would first fetch the line from memory.
    pub fn of_operation(out: &'a mut [f32], num_cols: usize, is_cached: bool) -> Rows<'a> {
        let in_lines = num_cols.is_multiple_of(LINE_BYTES / size_of::<f32>())
            && out.as_ptr().align_offset(LINE_BYTES) == 0;
        Rows { out: Parts::new(out), is_streamed: in_lines && !is_cached }
    }

    /// Results that are read at once.
    pub fn cached(out: &'a mut [f32]) -> Rows<'a> {
        Rows { out: Parts::new(out), is_streamed: false }
    }
}

/// Where results go: `out = main + bias`, or `activation(main + bias) * (up + its bias)`.
#[derive(Clone, Copy)]
pub struct BlockOutput<'a> {
    /// Where they are put.
    pub place: Place<'a>,
    /// Output columns.
    pub num_cols: usize,
    /// One per output column, padded to whole blocks.
    pub bias: Option<&'a [f32]>,
    /// The same for what the activated main product is multiplied by.
    pub up_bias: Option<&'a [f32]>,
    /// Applied to the main product when there is another.
    pub activation: Activation,
}

impl BlockOutput<'_> {
    /// The columns of a block.
    #[inline(always)]
    pub fn columns(&self, block: usize) -> BlockColumns<'_> {
        let [bias, up_bias] = self.biases(block);
        BlockColumns { output: self, first: block * BLOCK_ROWS, bias, up_bias }
    }
}

impl<'a> BlockOutput<'a> {
    /// Where the columns of a block go in rows that share a tile.
    #[inline(always)]
    pub fn target(&self, rows: Range<usize>, block: usize) -> Target {
        const F32: usize = size_of::<f32>();
        match &self.place {
            Place::Rows(Rows { out, is_streamed }) => {
                let first = block * BLOCK_ROWS;
                let len = BLOCK_ROWS.min(self.num_cols - first);
                let start = rows.start * self.num_cols + first;
                let end = start + (rows.len() - 1) * self.num_cols + len;
                let row_bytes = self.num_cols * F32;
                let kind = match len {
                    BLOCK_ROWS if *is_streamed => Kind::Streamed,
                    BLOCK_ROWS => Kind::Floats,
                    _ => Kind::Cut(len),
                };
                Target { start: out.start_of(start..end).cast(), row_bytes, kind }
            }
            Place::Middle(middle) => Target {
                start: middle.rows(rows, block).cast(),
                row_bytes: BLOCK_ROWS * F32,
                kind: if middle.is_streamed() { Kind::Streamed } else { Kind::Floats },
            },
            Place::Lines(lines) => Target {
                start: lines.half_lines(rows, block).cast(),
                row_bytes: LINE_BYTES,
                kind: Kind::Bf16,
            },
            Place::Best(best) => {
                let first = block * BLOCK_ROWS;
                let len = BLOCK_ROWS.min(self.num_cols - first) as u32;
                Target {
                    start: best.rows(rows).as_ptr().cast_mut().cast(),
                    row_bytes: size_of::<AtomicU64>(),
                    kind: Kind::Best { first: first as u32, len },
                }
            }
        }
    }

    /// The biases of a block: of the product, and of what it is multiplied by.
    #[inline(always)]
    pub fn biases(&self, block: usize) -> [Option<&'a [f32; BLOCK_ROWS]>; 2] {
        let of_block =
            |bias: &'a [f32]| bias[block * BLOCK_ROWS..].first_chunk().expect("biases are padded");
        [self.bias.map(of_block), self.up_bias.map(of_block)]
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
        let target = self.output.target(row..row + 1, self.first / BLOCK_ROWS);
        for at in (0..BLOCK_ROWS).step_by(S::LANES) {
            let mut value = add_bias(simd, load(simd, main, at), self.bias, at);
            if let Some(up) = up {
                let up = add_bias(simd, load(simd, up, at), self.up_bias, at);
                value = simd.mul(activate(simd, value, self.output.activation), up);
            }
            // SAFETY: the caller's contract.
            unsafe { target.put(simd, 0, at, value) }
        }
    }
}

/// Where the columns of a block go, in rows that share a tile.
#[derive(Clone, Copy)]
pub struct Target {
    /// The first column of the first row.
    start: *mut u8,
    row_bytes: usize,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Floats,
    /// Floats past the caches.
    Streamed,
    /// Floats of the last block of row-major results, which has fewer columns.
    Cut(usize),
    Bf16,
    /// Words of [`BestColumns`], and so many columns from the first.
    Best {
        first: u32,
        len: u32,
    },
}

impl Target {
    /// Puts the results of some rows, sixteen lanes each.
    ///
    /// # Safety
    /// The rows must be some of them; no other task may write there.
    #[inline(always)]
    pub unsafe fn put_rows<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        values: &impl RowValues<S>,
    ) {
        // The kinds that large results are of have loops of their own.
        if let Kind::Streamed = self.kind {
            for i in rows {
                let row = self.start.wrapping_add(i * self.row_bytes);
                // SAFETY: the same contract.
                unsafe { simd.stream_f32(row.cast(), values.of_row(simd, i)) }
            }
        } else if let Kind::Bf16 = self.kind {
            for i in rows {
                let row = self.start.wrapping_add(i * self.row_bytes);
                // SAFETY: the same contract.
                unsafe { simd.store_bf16(row.cast(), values.of_row(simd, i)) }
            }
        } else if let Kind::Best { first, len } = self.kind {
            for i in rows {
                let row = self.start.wrapping_add(i * self.row_bytes).cast::<AtomicU64>();
                // SAFETY: the same contract; rows are shared.
                unsafe { offer(simd, &*row, (first, len), values.of_row(simd, i)) }
            }
        } else {
            for i in rows {
                // SAFETY: the same contract.
                unsafe { self.put(simd, i, 0, values.of_row(simd, i)) }
            }
        }
    }

    /// Puts a vector into row `i` of them, from column `at` on.
    ///
    /// # Safety
    /// The row must be one of them and the columns in the block; no other task may write there.
    #[inline(always)]
    pub unsafe fn put<S: Simd>(&self, simd: S, i: usize, at: usize, value: S::V) {
        let row = self.start.wrapping_add(i * self.row_bytes);
        // SAFETY: the same contract.
        unsafe {
            match self.kind {
                Kind::Floats => simd.store_f32(row.cast::<f32>().add(at), value),
                Kind::Streamed => simd.stream_f32(row.cast::<f32>().add(at), value),
                Kind::Cut(len) => put_cut(simd, (row.cast(), len), at, value),
                Kind::Bf16 => simd.store_bf16(row.cast::<half::bf16>().add(at), value),
                Kind::Best { first, len } => {
                    let at = at as u32;
                    let columns = (first + at, len.saturating_sub(at).min(S::LANES as u32));
                    offer(simd, &*row.cast::<AtomicU64>(), columns, value);
                }
            }
        }
    }
}

/// Results of sixteen columns in rows that share a tile.
pub trait RowValues<S: Simd> {
    /// Those of a row.
    ///
    /// # Safety
    /// The row must be one of them.
    unsafe fn of_row(&self, simd: S, i: usize) -> S::V;
}

/// Puts what exists of a vector into a row of `len` columns, from column `at` on.
///
/// # Safety
/// The columns must be writable, and no other task may write there.
#[cold]
#[inline(always)]
unsafe fn put_cut<S: Simd>(simd: S, (row, len): (*mut f32, usize), at: usize, value: S::V) {
    if at < len {
        // SAFETY: the caller's contract.
        store(simd, unsafe { std::slice::from_raw_parts_mut(row, len) }, at, value);
    }
}

/// Adds the bias of the columns of a vector, if there is one.
#[inline(always)]
fn add_bias<S: Simd>(simd: S, value: S::V, bias: Option<&[f32; BLOCK_ROWS]>, at: usize) -> S::V {
    match bias {
        Some(bias) => simd.add(value, load(simd, bias, at)),
        None => value,
    }
}
