//! `out = x · weightᵀ` on AMX tiles.
//!
//! Weights are the left operand of every product, sixteen output columns to a tile, because a
//! row of a matrix in memory is a row of such a tile. Activations are the right operand: they
//! are rounded to bf16 and interleaved once per operation ([`PackedRows`]), sixteen rows of `x`
//! to a tile. An accumulator holds sixteen columns by sixteen rows of the output.
//!
//! An output element is one accumulator from the first to the last step of `k`, whatever the
//! number of rows, so a row's result does not depend on its batch.
//!
//! Up to 32 rows, weights go from memory (or through a first-level buffer, where they must be
//! converted) to tiles once. With more rows, a panel of columns is copied or converted to
//! scratch that stays in the second-level cache, and all rows pass over it.

use std::arch::x86_64::*;
use std::ops::Range;

use super::amx::{Amx, Left, ROW_BYTES, Right, TILE_BYTES, TILE_LEN, TILE_ROWS, Tiles};
use super::avx512::transpose16;
use super::share::{Parts, Scratch};
use super::tile_pack::{PackedRows, first_lanes};
use super::tile_weights::TileWeights;
use super::weight_rows::Scales;

/// Output columns of a product: two tiles.
pub const PAIR: usize = 2 * TILE_ROWS;
/// Steps of `k` that are converted at a time for few rows: with two tiles of columns they fill
/// two thirds of the first-level cache.
const CHUNK_STEPS: usize = 16;
/// Bytes of converted weights that stay in the second-level cache beside the activations.
const PANEL_BYTES: usize = 1 << 20;

/// What is done to an accumulator before it is written.
pub trait Epilogue: Copy + Send + Sync {
    /// Final values of sixteen output columns from `col` on in row `row`.
    ///
    /// # Safety
    /// `lanes` must cover existing columns only, and the machine must have AVX-512.
    unsafe fn finish(&self, sums: __m512i, row: usize, col: usize, lanes: __mmask16) -> __m512;
}

/// One task: output columns for all rows.
pub struct TileTask<'a, W, E> {
    /// The machine's tiles.
    pub amx: Amx,
    /// Activations.
    pub x: PackedRows<'a>,
    /// Weights.
    pub weights: W,
    /// What is done to sums.
    pub epilogue: E,
    /// Output columns of the whole matrix.
    pub num_cols: usize,
    /// Output; tasks write disjoint columns.
    pub out: Parts<'a, f32>,
}

impl<W: TileWeights, E: Epilogue> TileTask<'_, W, E> {
    /// Computes the output columns `cols` for all rows.
    pub fn run_columns(&self, cols: Range<usize>, scratch: &mut Scratch) {
        let mut tiles = Tiles::open(self.amx);
        let mut sums = Sums([[0; TILE_LEN]; 4]);
        if self.x.num_rows <= 2 * TILE_ROWS {
            for col in cols.clone().step_by(PAIR) {
                let cols = col..cols.end.min(col + PAIR);
                self.stream(&mut tiles, cols.clone(), scratch);
                tiles.store(&mut sums.0);
                self.write(&sums, 0, cols);
            }
            return;
        }
        let panel = panel_cols(self.x.steps);
        for start in cols.clone().step_by(panel) {
            let panel = start..cols.end.min(start + panel);
            self.reuse(&mut tiles, &mut sums, panel, scratch);
        }
    }

    /// Few rows: every weight goes to a tile once.
    fn stream(&self, tiles: &mut Tiles, cols: Range<usize>, scratch: &mut Scratch) {
        let steps = self.x.steps;
        tiles.clear();
        let in_place = self.weights.in_place(cols.start).filter(|_| cols.len() == PAIR);
        if let Some((upper, row_stride)) = in_place {
            let lower = upper.wrapping_add(TILE_ROWS * row_stride);
            let ahead = upper.wrapping_add(PAIR * row_stride);
            let left = Left { upper, lower, row_stride, step: ROW_BYTES, ahead };
            return self.multiply(tiles, left, (0, 0..steps));
        }
        let chunk = scratch.take(2 * CHUNK_STEPS * TILE_BYTES / 4).as_mut_ptr().cast::<u8>();
        for from in (0..steps).step_by(CHUNK_STEPS) {
            let part = from..steps.min(from + CHUNK_STEPS);
            let left = self.convert(cols.clone(), part.clone(), chunk);
            self.multiply(tiles, left, (0, part));
        }
    }

    /// Many rows: the panel's weights are converted once.
    fn reuse(
        &self,
        tiles: &mut Tiles,
        sums: &mut Sums,
        panel: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let steps = self.x.steps;
        let pair_bytes = 2 * steps * TILE_BYTES;
        let room = panel.len().div_ceil(PAIR) * pair_bytes / 4;
        let wide = scratch.take(room).as_mut_ptr().cast::<u8>();
        let pairs = || panel.clone().step_by(PAIR).map(|col| col..panel.end.min(col + PAIR));
        let at = |pair: usize| wide.wrapping_add(pair * pair_bytes);
        for (pair, cols) in pairs().enumerate() {
            self.convert(cols, 0..steps, at(pair));
        }
        for tile in (0..self.x.num_rows.div_ceil(TILE_ROWS)).step_by(2) {
            for (pair, cols) in pairs().enumerate() {
                tiles.clear();
                let left = converted(at(pair), steps);
                self.multiply(tiles, left, (tile, 0..steps));
                tiles.store(&mut sums.0);
                self.write(sums, tile, cols);
            }
        }
    }

    /// Puts weights into consecutive tiles at `to`: the upper sixteen columns, then the lower.
    fn convert(&self, cols: Range<usize>, steps: Range<usize>, to: *mut u8) -> Left {
        let middle = cols.end.min(cols.start + TILE_ROWS);
        let left = converted(to, steps.len());
        let vectors = self.amx.vectors();
        // SAFETY: the caller's scratch has room for both, and the columns exist.
        unsafe {
            self.weights.fill(vectors, cols.start..middle, steps.clone(), left.upper.cast_mut());
            self.weights.fill(vectors, middle..cols.end, steps, left.lower.cast_mut());
        }
        left
    }

    /// Multiplies by one or two tiles of rows from tile `tile` on, over `steps`.
    fn multiply(&self, tiles: &mut Tiles, left: Left, (tile, steps): (usize, Range<usize>)) {
        let skip = |right: Right| Right {
            start: right.start.wrapping_add(steps.start * TILE_ROWS * right.row_stride),
            ..right
        };
        let is_two = tile * TILE_ROWS + TILE_ROWS < self.x.num_rows;
        let first = skip(self.x.right(tile));
        // SAFETY: packed rows have all steps of every tile and room for the last reads; the
        // left operand was just converted, or lies inside the matrix.
        unsafe {
            if is_two {
                let second = skip(self.x.right(tile + 1));
                tiles.multiply_two::<W::Element>(left, first, second, steps.len());
            } else {
                tiles.multiply_one::<W::Element>(left, first, steps.len());
            }
        }
    }

    /// Writes the sums of two tiles of rows from tile `tile` on.
    fn write(&self, sums: &Sums, tile: usize, cols: Range<usize>) {
        for (i, sums) in sums.0.iter().enumerate() {
            let first_row = (tile + i / 2) * TILE_ROWS;
            let first_col = cols.start + i % 2 * TILE_ROWS;
            let rows = first_row..self.x.num_rows.min(first_row + TILE_ROWS);
            let cols = first_col..cols.end.min(first_col + TILE_ROWS);
            if !rows.is_empty() && !cols.is_empty() {
                // SAFETY: tiles are open, so the machine has AVX-512.
                unsafe { self.write_tile(sums, rows, cols) }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn write_tile(&self, sums: &[u32; TILE_LEN], rows: Range<usize>, cols: Range<usize>) {
        let lanes = first_lanes(cols.len());
        let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
        for (line, sums) in lines.iter_mut().zip(sums.chunks_exact(TILE_ROWS)) {
            // SAFETY: a chunk has sixteen words.
            *line = unsafe { _mm512_loadu_ps(sums.as_ptr().cast()) };
        }
        // SAFETY: the instructions exist here.
        let lines = unsafe { transpose16(lines) };
        for (row, sums) in rows.zip(lines) {
            let at = row * self.num_cols;
            // SAFETY: this task alone writes these columns; masked lanes lie beyond them.
            unsafe {
                let out = self.out.part(at + cols.start..at + cols.end);
                let sums = _mm512_castps_si512(sums);
                let values = self.epilogue.finish(sums, row, cols.start, lanes);
                _mm512_mask_storeu_ps(out.as_mut_ptr(), lanes, values);
            }
        }
    }
}

/// Four accumulators, aligned for the stores of tiles.
#[repr(C, align(64))]
struct Sums([[u32; TILE_LEN]; 4]);

/// The left operand at `to`: `steps` tiles of the upper columns, then as many of the lower.
fn converted(to: *const u8, steps: usize) -> Left {
    let lower = to.wrapping_add(steps * TILE_BYTES);
    Left { upper: to, lower, row_stride: ROW_BYTES, step: TILE_BYTES, ahead: to }
}

/// Columns whose converted weights fit the second-level cache.
pub fn panel_cols(steps: usize) -> usize {
    (PANEL_BYTES / (steps * TILE_BYTES) * TILE_ROWS / PAIR * PAIR).max(PAIR)
}

/// Sums of f32, a bias added.
#[derive(Clone, Copy)]
pub struct AddBias<'a> {
    /// One per output column, if there is one.
    pub bias: Option<&'a [f32]>,
}

impl Epilogue for AddBias<'_> {
    #[inline(always)]
    unsafe fn finish(&self, sums: __m512i, _row: usize, col: usize, lanes: __mmask16) -> __m512 {
        // SAFETY: masked lanes are not read; the caller vouches for the rest.
        unsafe {
            let sums = _mm512_castsi512_ps(sums);
            match self.bias {
                None => sums,
                Some(bias) => {
                    _mm512_add_ps(sums, _mm512_maskz_loadu_ps(lanes, bias[col..].as_ptr()))
                }
            }
        }
    }
}

/// Sums of integers, multiplied by the scales of the row and of the column, a bias added: the
/// referee's order.
#[derive(Clone, Copy)]
pub struct ScaleSums<'a> {
    /// One per row of `x`.
    pub row_scales: &'a [f32],
    /// One per output column.
    pub col_scales: Scales<'a>,
    /// As in [`AddBias`].
    pub bias: AddBias<'a>,
}

impl Epilogue for ScaleSums<'_> {
    #[inline(always)]
    unsafe fn finish(&self, sums: __m512i, row: usize, col: usize, lanes: __mmask16) -> __m512 {
        let Scales::F32(scales) = self.col_scales else {
            unreachable!("INT8 rows have f32 scales")
        };
        // SAFETY: masked lanes are not read; the caller vouches for the rest.
        unsafe {
            let cols = _mm512_maskz_loadu_ps(lanes, scales[col..].as_ptr());
            let scales = _mm512_mul_ps(_mm512_set1_ps(self.row_scales[row]), cols);
            let scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales);
            self.bias.finish(_mm512_castps_si512(scaled), row, col, lanes)
        }
    }
}
