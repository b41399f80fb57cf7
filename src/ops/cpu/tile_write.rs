//! How sums of tiles become results: they are scaled, activated and put where they belong while
//! tiles compute the next ones.
//!
//! A line of an accumulator is sixteen output columns of one row. What rows of a tile have in
//! common is found once for all of them: what is left per line is a few vectors.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::Avx512;
use super::lines::{CodedLines, TILE_ROWS};
use super::rows::activate;
use super::simd::load;
use super::weight_blocks::{BlockOutput, RowScales, SliceScales, Target};
use crate::formats::blocks::BLOCK_ROWS;

/// What becomes of sums.
pub trait Finish: Copy + Send + Sync {
    /// The same for some rows of a tile.
    type Lines: FinishLines;

    /// For rows of a tile from `row` on, and the columns of a block.
    fn lines(&self, row: usize, block: usize) -> Self::Lines;
}

/// What becomes of lines of an accumulator.
pub trait FinishLines: Copy {
    /// The results of line `i`.
    ///
    /// # Safety
    /// The machine must have AVX-512, and the line must be readable.
    unsafe fn finish(&self, lines: *const u32, i: usize) -> __m512;
}

/// Sums of f32 are results.
#[derive(Clone, Copy)]
pub struct Floats;

impl Finish for Floats {
    type Lines = Floats;

    #[inline(always)]
    fn lines(&self, _: usize, _: usize) -> Floats {
        Floats
    }
}

impl FinishLines for Floats {
    #[inline(always)]
    unsafe fn finish(&self, lines: *const u32, i: usize) -> __m512 {
        // SAFETY: the same contract.
        unsafe { _mm512_loadu_ps(lines.add(i * TILE_ROWS).cast()) }
    }
}

/// Sums of integers, multiplied by the scales of the row and of the column: the referee's order.
#[derive(Clone, Copy)]
pub struct ScaleSums<'a> {
    /// Scales of rows of activations.
    pub rows: CodedLines<'a>,
    /// Scales of rows of weights.
    pub cols: RowScales<'a>,
}

impl<'a> Finish for ScaleSums<'a> {
    type Lines = ScaledLines<'a>;

    #[inline(always)]
    fn lines(&self, row: usize, block: usize) -> ScaledLines<'a> {
        let rows = &self.rows.tile_scales(row / TILE_ROWS, 0)[row % TILE_ROWS..];
        ScaledLines { rows, cols: self.cols.block(block) }
    }
}

/// Scales of rows of a tile and of the columns of a block.
#[derive(Clone, Copy)]
pub struct ScaledLines<'a> {
    rows: &'a [f32],
    cols: &'a [f32; BLOCK_ROWS],
}

impl FinishLines for ScaledLines<'_> {
    #[inline(always)]
    unsafe fn finish(&self, lines: *const u32, i: usize) -> __m512 {
        // SAFETY: the same contract; a block has sixteen scales.
        unsafe {
            let sums = _mm512_loadu_si512(lines.add(i * TILE_ROWS).cast());
            let cols = _mm512_loadu_ps(self.cols.as_ptr());
            let scales = _mm512_mul_ps(_mm512_set1_ps(self.rows[i]), cols);
            _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales)
        }
    }
}

/// Sums of codes that were widened, and the scales that are not left to them.
#[derive(Clone, Copy)]
pub struct ScaleCols<'a>(pub SliceScales<'a>);

impl<'a> Finish for ScaleCols<'a> {
    type Lines = ScaledCols<'a>;

    #[inline(always)]
    fn lines(&self, _: usize, block: usize) -> ScaledCols<'a> {
        ScaledCols(self.0.is_per_row().then(|| self.0.of_element(block, 0)))
    }
}

/// Scales of the columns of a block, where sums wait for them.
#[derive(Clone, Copy)]
pub struct ScaledCols<'a>(Option<&'a [f32; BLOCK_ROWS]>);

impl FinishLines for ScaledCols<'_> {
    #[inline(always)]
    unsafe fn finish(&self, lines: *const u32, i: usize) -> __m512 {
        // SAFETY: the same contract; a block has sixteen scales.
        unsafe {
            let sums = Floats.finish(lines, i);
            match self.0 {
                Some(scales) => _mm512_mul_ps(sums, _mm512_loadu_ps(scales.as_ptr())),
                None => sums,
            }
        }
    }
}

/// Lines of one block, which become results.
struct Results<'a, L> {
    finish: L,
    lines: &'a [u32],
    bias: Option<&'a [f32; BLOCK_ROWS]>,
}

impl<L: FinishLines> Results<'_, L> {
    /// # Safety
    /// The machine must have AVX-512, and line `i` must exist.
    #[inline(always)]
    unsafe fn line(&self, simd: Avx512, i: usize) -> __m512 {
        // SAFETY: the same contract.
        unsafe {
            let value = self.finish.finish(self.lines.as_ptr(), i);
            match self.bias {
                Some(bias) => _mm512_add_ps(value, load(simd, bias, 0)),
                None => value,
            }
        }
    }
}

/// Writes the results of a block in rows that share a tile, one for each of `lines`.
///
/// # Safety
/// The machine must have AVX-512; no other task may write these columns meanwhile.
#[inline(always)]
pub unsafe fn write_lines<L: FinishLines>(
    simd: Avx512,
    out: &BlockOutput<'_>,
    (rows, block): (Range<usize>, usize),
    (finish, lines): (L, &[u32]),
) {
    assert!(lines.len() >= rows.len() * TILE_ROWS);
    let results = Results { finish, lines, bias: out.biases(block)[0] };
    let target = out.target(rows.clone(), block);
    for (i, row) in rows.enumerate() {
        // SAFETY: the same contract; the line exists.
        unsafe {
            let value = results.line(simd, i);
            put(simd, (out, &target), (row, block, i), value);
        }
    }
}

/// As [`write_lines`] of a gated product: the activated lines times those of `up`.
///
/// # Safety
/// As of [`write_lines`].
#[inline(always)]
pub unsafe fn write_gated<L: FinishLines>(
    simd: Avx512,
    out: &BlockOutput<'_>,
    (rows, block): (Range<usize>, usize),
    (finish, lines): (L, &[u32]),
    (finish_up, lines_up): (L, &[u32]),
) {
    assert!(lines.len().min(lines_up.len()) >= rows.len() * TILE_ROWS);
    let [bias, up_bias] = out.biases(block);
    let gate = Results { finish, lines, bias };
    let up = Results { finish: finish_up, lines: lines_up, bias: up_bias };
    let target = out.target(rows.clone(), block);
    for (i, row) in rows.enumerate() {
        // SAFETY: the same contract; the lines exist.
        unsafe {
            let value = activate(simd, gate.line(simd, i), out.activation);
            let value = _mm512_mul_ps(value, up.line(simd, i));
            put(simd, (out, &target), (row, block, i), value);
        }
    }
}

/// Puts results of row `i` of a target.
///
/// # Safety
/// As of [`write_lines`].
#[inline(always)]
unsafe fn put(
    simd: Avx512,
    (out, target): (&BlockOutput<'_>, &Option<Target>),
    (row, block, i): (usize, usize, usize),
    value: __m512,
) {
    // SAFETY: the same contract.
    unsafe {
        match target {
            Some(target) => target.put(simd, i, 0, value),
            None => out.columns(block).put_last(simd, (row, 0), value),
        }
    }
}
