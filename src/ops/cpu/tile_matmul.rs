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
use super::rows::activate;
use super::share::{Parts, Scratch};
use super::simd::Simd;
use super::tile_pack::{PackedRows, first_lanes};
use super::tile_weights::TileWeights;
use super::weight_rows::Scales;
use crate::ops::args::Activation;

/// Output columns of a product: two tiles.
pub const PAIR: usize = 2 * TILE_ROWS;
/// Up to this many rows, weights are read once; beyond, they are kept in a cache.
pub const FEW_ROWS: usize = 2 * TILE_ROWS;
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

/// A matrix and what is done to its sums.
#[derive(Clone, Copy)]
pub struct Half<W, E> {
    /// Weights.
    pub weights: W,
    /// What is done to sums.
    pub epilogue: E,
}

/// A product, or the gated product of two: `activation(x · gateᵀ) * (x · upᵀ)`.
pub struct TileTask<'a, W, E> {
    /// The machine's tiles.
    pub amx: Amx,
    /// Activations.
    pub x: PackedRows<'a>,
    /// The matrix, or the gate.
    pub main: Half<W, E>,
    /// What the activated gate is multiplied by.
    pub up: Option<(Half<W, E>, Activation)>,
    /// Output columns of the whole matrix.
    pub num_cols: usize,
    /// Output; tasks write disjoint columns.
    pub out: Parts<'a, f32>,
}

impl<W: TileWeights, E: Epilogue> TileTask<'_, W, E> {
    /// Output columns of one pair of tiles: of one matrix, or the same of both.
    fn pair(&self) -> usize {
        if self.up.is_some() { TILE_ROWS } else { PAIR }
    }

    /// The rows of weights in the upper and the lower tile for the output columns `cols`.
    fn halves(&self, cols: Range<usize>) -> [(&W, Range<usize>); 2] {
        let main = &self.main.weights;
        match &self.up {
            Some((up, _)) => [(main, cols.clone()), (&up.weights, cols)],
            None => {
                let middle = cols.end.min(cols.start + TILE_ROWS);
                [(main, cols.start..middle), (main, middle..cols.end)]
            }
        }
    }

    /// Computes the output columns `cols` for all rows.
    pub fn run_columns(&self, cols: Range<usize>, scratch: &mut Scratch) {
        let mut tiles = Tiles::open(self.amx);
        let mut sums = Sums([[0; TILE_LEN]; 4]);
        if self.x.num_rows <= FEW_ROWS {
            for col in cols.clone().step_by(self.pair()) {
                let cols = col..cols.end.min(col + self.pair());
                self.stream(&mut tiles, cols.clone(), scratch);
                tiles.store(&mut sums.0);
                self.write(&sums, 0, cols);
            }
            return;
        }
        let panel = panel_cols(self.x.steps) * self.pair() / PAIR;
        for start in cols.clone().step_by(panel) {
            let panel = start..cols.end.min(start + panel);
            self.reuse(&mut tiles, &mut sums, panel, scratch);
        }
    }

    /// Few rows: every weight goes to a tile once.
    fn stream(&self, tiles: &mut Tiles, cols: Range<usize>, scratch: &mut Scratch) {
        let steps = self.x.steps;
        tiles.clear();
        if let Some(left) = self.in_place(cols.clone()) {
            return self.multiply(tiles, left, (0, 0..steps), true);
        }
        let chunk = scratch.take(2 * CHUNK_STEPS * TILE_BYTES / 4).as_mut_ptr().cast::<u8>();
        for from in (0..steps).step_by(CHUNK_STEPS) {
            let part = from..steps.min(from + CHUNK_STEPS);
            let left = self.convert(cols.clone(), part.clone(), chunk);
            self.multiply(tiles, left, (0, part), false);
        }
    }

    /// The weights of these columns where they are, if both tiles can be read there.
    fn in_place(&self, cols: Range<usize>) -> Option<Left> {
        let [upper, lower] = self.halves(cols).map(|(weights, rows)| {
            weights.in_place(rows.start).filter(|_| rows.len() == TILE_ROWS)
        });
        let ((upper, row_stride), (lower, _)) = (upper?, lower?);
        let next = self.pair() * row_stride;
        Some(Left {
            upper,
            lower,
            row_stride,
            step: ROW_BYTES,
            next_upper: upper.wrapping_add(next),
            next_lower: lower.wrapping_add(next),
        })
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
        let room = panel.len().div_ceil(self.pair()) * pair_bytes / 4;
        let wide = scratch.take(room).as_mut_ptr().cast::<u8>();
        let pair = self.pair();
        let pairs = || panel.clone().step_by(pair).map(|col| col..panel.end.min(col + pair));
        let at = |pair: usize| wide.wrapping_add(pair * pair_bytes);
        for (pair, cols) in pairs().enumerate() {
            self.convert(cols, 0..steps, at(pair));
        }
        for tile in (0..self.x.num_rows.div_ceil(TILE_ROWS)).step_by(2) {
            for (pair, cols) in pairs().enumerate() {
                tiles.clear();
                self.multiply(tiles, converted(at(pair), steps), (tile, 0..steps), false);
                tiles.store(&mut sums.0);
                self.write(sums, tile, cols);
            }
        }
    }

    /// Puts weights into consecutive tiles at `to`: the upper ones, then the lower.
    fn convert(&self, cols: Range<usize>, steps: Range<usize>, to: *mut u8) -> Left {
        let left = converted(to, steps.len());
        let [upper, lower] = self.halves(cols);
        for ((weights, rows), to) in [(upper, left.upper), (lower, left.lower)] {
            // SAFETY: the caller's scratch has room for both, and the rows exist.
            unsafe { weights.fill(self.amx.vectors(), rows, steps.clone(), to.cast_mut()) };
        }
        left
    }

    /// Multiplies by one or two tiles of rows from tile `tile` on, over `steps`.
    fn multiply(
        &self,
        tiles: &mut Tiles,
        left: Left,
        (tile, steps): (usize, Range<usize>),
        from_memory: bool,
    ) {
        let right = |tile: usize| {
            let right = self.x.right(tile);
            let skipped = steps.start * TILE_ROWS * right.row_stride;
            Right { start: right.start.wrapping_add(skipped), ..right }
        };
        let second = ((tile + 1) * TILE_ROWS < self.x.num_rows).then(|| right(tile + 1));
        let (first, steps) = (right(tile), steps.len());
        // SAFETY: packed rows have all steps of every tile and room for the last reads; the
        // left operand was just converted, or lies inside the matrix.
        unsafe {
            match (second, from_memory) {
                (None, true) => tiles.stream_one::<W::Element>(left, first, steps),
                (None, false) => tiles.multiply_one::<W::Element>(left, first, steps),
                (Some(second), true) => tiles.stream_two::<W::Element>(left, first, second, steps),
                (Some(second), false) => {
                    tiles.multiply_two::<W::Element>(left, first, second, steps);
                }
            }
        }
    }

    /// Writes the sums of two tiles of rows from tile `tile` on.
    fn write(&self, sums: &Sums, tile: usize, cols: Range<usize>) {
        let middle = cols.end.min(cols.start + TILE_ROWS);
        for (i, [upper, lower]) in sums.0.as_chunks::<2>().0.iter().enumerate() {
            let first_row = (tile + i) * TILE_ROWS;
            let rows = first_row..self.x.num_rows.min(first_row + TILE_ROWS);
            if rows.is_empty() {
                continue;
            }
            // SAFETY: tiles are open, so the machine has AVX-512.
            unsafe {
                match &self.up {
                    Some((up, activation)) => {
                        self.write_gated((upper, lower), (up, *activation), rows, cols.clone());
                    }
                    None => {
                        self.write_tile(upper, rows.clone(), cols.start..middle);
                        self.write_tile(lower, rows, middle..cols.end);
                    }
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn write_tile(&self, sums: &[u32; TILE_LEN], rows: Range<usize>, cols: Range<usize>) {
        if cols.is_empty() {
            return;
        }
        let lanes = first_lanes(cols.len());
        for (row, sums) in rows.zip(columns(sums)) {
            // SAFETY: the instructions exist here, and lanes cover existing columns.
            let values = unsafe { self.main.epilogue.finish(sums, row, cols.start, lanes) };
            self.write_lanes(row, cols.clone(), values);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn write_gated(
        &self,
        (gate, up): (&[u32; TILE_LEN], &[u32; TILE_LEN]),
        (half, activation): (&Half<W, E>, Activation),
        rows: Range<usize>,
        cols: Range<usize>,
    ) {
        let (lanes, simd) = (first_lanes(cols.len()), self.amx.vectors());
        for (row, (gate, up)) in rows.zip(columns(gate).into_iter().zip(columns(up))) {
            // SAFETY: the instructions exist here, and lanes cover existing columns.
            let (gate, up) = unsafe {
                let gate = self.main.epilogue.finish(gate, row, cols.start, lanes);
                (gate, half.epilogue.finish(up, row, cols.start, lanes))
            };
            let values = simd.mul(activate(simd, gate, activation), up);
            self.write_lanes(row, cols.clone(), values);
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn write_lanes(&self, row: usize, cols: Range<usize>, values: __m512) {
        let at = row * self.num_cols;
        // SAFETY: this task alone writes these columns; masked lanes lie beyond them.
        unsafe {
            let out = self.out.part(at + cols.start..at + cols.end);
            _mm512_mask_storeu_ps(out.as_mut_ptr(), first_lanes(cols.len()), values);
        }
    }
}

/// The columns of an accumulator: sixteen output columns of one row each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn columns(sums: &[u32; TILE_LEN]) -> [__m512i; TILE_ROWS] {
    let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
    for (line, sums) in lines.iter_mut().zip(sums.as_chunks::<TILE_ROWS>().0) {
        // SAFETY: a chunk has sixteen words.
        *line = unsafe { _mm512_loadu_ps(sums.as_ptr().cast()) };
    }
    // SAFETY: the instructions exist here.
    let lines = unsafe { transpose16(lines) };
    let mut columns = [_mm512_setzero_si512(); TILE_ROWS];
    for (column, line) in columns.iter_mut().zip(lines) {
        *column = _mm512_castps_si512(line);
    }
    columns
}

/// Four accumulators, aligned for the stores of tiles.
#[repr(C, align(64))]
struct Sums([[u32; TILE_LEN]; 4]);

/// The left operand at `to`: `steps` tiles of the upper columns, then as many of the lower.
fn converted(to: *const u8, steps: usize) -> Left {
    let lower = to.wrapping_add(steps * TILE_BYTES);
    Left {
        upper: to,
        lower,
        row_stride: ROW_BYTES,
        step: TILE_BYTES,
        next_upper: to,
        next_lower: to,
    }
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

/// Sixteen scales of output columns from `col` on.
///
/// # Safety
/// `lanes` must cover existing columns only, and the machine must have AVX-512.
#[inline(always)]
unsafe fn load_scales(scales: Scales<'_>, col: usize, lanes: __mmask16) -> __m512 {
    // SAFETY: masked lanes are not read; the caller vouches for the rest.
    unsafe {
        match scales {
            Scales::F32(scales) => _mm512_maskz_loadu_ps(lanes, scales[col..].as_ptr()),
            Scales::F16(scales) => {
                let halves = _mm256_maskz_loadu_epi16(lanes, scales[col..].as_ptr().cast());
                _mm512_cvtph_ps(halves)
            }
        }
    }
}

/// Sums of f32, multiplied by the scale of the column, a bias added.
#[derive(Clone, Copy)]
pub struct ScaleCols<'a> {
    /// One per output column.
    pub col_scales: Scales<'a>,
    /// As in [`AddBias`].
    pub bias: AddBias<'a>,
}

impl Epilogue for ScaleCols<'_> {
    #[inline(always)]
    unsafe fn finish(&self, sums: __m512i, row: usize, col: usize, lanes: __mmask16) -> __m512 {
        // SAFETY: the same contract.
        unsafe {
            let scales = load_scales(self.col_scales, col, lanes);
            let scaled = _mm512_mul_ps(_mm512_castsi512_ps(sums), scales);
            self.bias.finish(_mm512_castps_si512(scaled), row, col, lanes)
        }
    }
}
