//! The middle of a gated MLP: what the gated product leaves for the next one when rows are many.
//!
//! It is by far the widest of all activations, is written a block of sixteen columns at a time and
//! read once, so it lies in the order in which it is written: for every sixteen rows, the block of
//! their first sixteen columns, then the next. Row-major, each sixteen results would go to another
//! page; writing them took as long as half the products. One that the caches do not keep is written
//! past them, which it would sweep, because it is read only when all of it is there.

use std::ops::Range;

use super::lines::{FillRows, LINE_BYTES, TILE_ROWS};
use super::share::Parts;
use super::simd::{Kernel, Simd};
use crate::formats::blocks::BLOCK_ROWS;
use crate::formats::int8::inverse_scale;

/// Columns of a block.
const BLOCK_COLS: usize = BLOCK_ROWS;
/// Codes of a block in a line.
const BLOCKS_PER_LINE: usize = LINE_BYTES / BLOCK_COLS;

/// `[tiles, blocks, rows of the tile, 16]`.
pub struct Middle<'a> {
    values: Parts<'a, f32>,
    num_rows: usize,
    num_blocks: usize,
    is_streamed: bool,
}

impl<'a> Middle<'a> {
    /// Memory of `num_rows` rows as a middle, which the caches keep or not.
    pub fn new(values: &'a mut [f32], num_rows: usize, is_cached: bool) -> Middle<'a> {
        let num_blocks = values.len() / num_rows / BLOCK_COLS;
        assert_eq!(values.len(), num_rows * num_blocks * BLOCK_COLS, "whole blocks");
        assert_eq!(values.as_ptr().align_offset(LINE_BYTES), 0, "blocks begin with a cache line");
        Middle { values: Parts::new(values), num_rows, num_blocks, is_streamed: !is_cached }
    }

    /// Where the columns of a block lie, of rows that share a tile: one after the other.
    #[inline(always)]
    pub fn rows(&self, rows: Range<usize>, block: usize) -> *mut f32 {
        let tile = rows.start / TILE_ROWS;
        let start = tile * TILE_ROWS * self.num_blocks + block * self.rows_of(tile);
        let at = (start + rows.start % TILE_ROWS) * BLOCK_COLS;
        self.values.start_of(at..at + rows.len() * BLOCK_COLS)
    }

    /// Whether it is written past the caches.
    #[inline(always)]
    pub fn is_streamed(&self) -> bool {
        self.is_streamed
    }

    /// Number of tiles.
    pub fn num_tiles(&self) -> usize {
        self.num_rows.div_ceil(TILE_ROWS)
    }

    fn rows_of(&self, tile: usize) -> usize {
        TILE_ROWS.min(self.num_rows - tile * TILE_ROWS)
    }

    /// The values of a tile.
    ///
    /// # Safety
    /// Nobody may write to it meanwhile.
    unsafe fn tile(&self, tile: usize) -> &[f32] {
        let row_values = self.num_blocks * BLOCK_COLS;
        let start = tile * TILE_ROWS * row_values;
        // SAFETY: the caller's contract.
        unsafe { self.values.part(start..start + self.rows_of(tile) * row_values) }
    }
}

/// Prepares a tile as codes: the arithmetic of `lines::AsCodes`.
pub struct CodeMiddle<'a> {
    /// All tiles, written.
    pub middle: &'a Middle<'a>,
    /// The one to prepare; no other task has it.
    pub tile: usize,
    /// Where its codes go. Rows are as wide as the middle.
    pub to: &'a FillRows<'a>,
}

impl Kernel for CodeMiddle<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: everything is written.
        let values = unsafe { self.middle.tile(self.tile) };
        let rows = self.middle.rows_of(self.tile);
        let blocks_per_group = self.to.group() / BLOCK_COLS;
        let groups = values.chunks(blocks_per_group * rows * BLOCK_COLS);
        for (group, values) in groups.enumerate() {
            let mut largest = [0.0; TILE_ROWS];
            largest_of_rows(simd, values, &mut largest[..rows]);
            let sums = self.code(simd, values, &largest[..rows], group * blocks_per_group);
            for (i, (&largest, sum)) in largest[..rows].iter().zip(sums).enumerate() {
                // SAFETY: this task has all rows of its tile.
                unsafe { self.to.set_cell(self.tile * TILE_ROWS + i, group, largest, sum) }
            }
        }
    }
}

impl CodeMiddle<'_> {
    /// Writes the codes of some blocks of the tile, line by line in the order in which they lie;
    /// returns the sum of each row.
    #[inline(always)]
    fn code<S: Simd>(
        &self,
        simd: S,
        values: &[f32],
        largest: &[f32],
        first_block: usize,
    ) -> [i32; TILE_ROWS] {
        let (rows, mut inverses, mut sums) = (largest.len(), [0.0; TILE_ROWS], [0; TILE_ROWS]);
        for (inverse, &largest) in inverses.iter_mut().zip(largest) {
            *inverse = inverse_scale(largest);
        }
        let lines = values.chunks(BLOCKS_PER_LINE * rows * BLOCK_COLS);
        for (i, values) in lines.enumerate() {
            let block = first_block + i * BLOCKS_PER_LINE;
            let at = block % BLOCKS_PER_LINE * BLOCK_COLS;
            for row in 0..rows {
                let inverse = simd.splat(inverses[row]);
                // SAFETY: this task has all rows of its tile.
                let line =
                    unsafe { self.to.codes(self.tile * TILE_ROWS + row, block / BLOCKS_PER_LINE) };
                let codes = &mut line[at..][..values.len() / rows];
                for (codes, values) in
                    codes.chunks_exact_mut(BLOCK_COLS).zip(values.chunks_exact(rows * BLOCK_COLS))
                {
                    let values = &values[row * BLOCK_COLS..][..BLOCK_COLS];
                    for at in (0..BLOCK_COLS).step_by(S::LANES) {
                        // SAFETY: both are sixteen long, a multiple of the lanes.
                        unsafe {
                            let v = simd.load_f32(values.as_ptr().add(at));
                            simd.store_i8(codes.as_mut_ptr().add(at), simd.mul(v, inverse));
                        }
                    }
                }
                sums[row] += codes.iter().map(|&code| i32::from(code)).sum::<i32>();
            }
        }
        sums
    }
}

/// The largest magnitude of each row.
#[inline(always)]
fn largest_of_rows<S: Simd>(simd: S, values: &[f32], largest: &mut [f32]) {
    let zero = simd.splat(0.0);
    let mut acc = [zero; TILE_ROWS];
    for block in values.chunks_exact(largest.len() * BLOCK_COLS) {
        for (acc, values) in acc.iter_mut().zip(block.chunks_exact(BLOCK_COLS)) {
            for at in (0..BLOCK_COLS).step_by(S::LANES) {
                // SAFETY: sixteen values are a multiple of the lanes.
                let x = unsafe { simd.load_f32(values.as_ptr().add(at)) };
                *acc = simd.max(simd.max(x, simd.sub(zero, x)), *acc);
            }
        }
    }
    for (largest, acc) in largest.iter_mut().zip(acc) {
        *largest = simd.max_lane(acc);
    }
}
