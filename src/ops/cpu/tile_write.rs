//! How sums of tiles become results: they are scaled, activated and put where they belong while
//! tiles compute the next ones.
//!
//! A line of an accumulator is sixteen output columns of one row. What rows of a tile have in
//! common is found once for all of them: what is left per line is a few vectors, so that a line
//! or two fit between the products of one step and the next.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx512::Avx512;
use super::lines::{CodedLines, TILE_ROWS};
use super::rows::activate;
use super::simd::load;
use super::weight_blocks::{BlockOutput, RowScales, RowValues, SliceScales, Target};
use crate::formats::blocks::BLOCK_ROWS;
use crate::ops::args::Activation;

/// What becomes of sums.
pub trait Finish: Copy + Send + Sync {
    /// The same for some rows of a tile.
    type Lines: FinishLines;

    /// For the rows of a tile from `row`, its first, on, and the columns of a block.
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
        ScaledLines {
            rows: self.rows.tile_scales(row / TILE_ROWS, 0),
            cols: self.cols.block(block),
        }
    }
}

/// Scales of the rows of a tile and of the columns of a block.
#[derive(Clone, Copy)]
pub struct ScaledLines<'a> {
    rows: &'a [f32; TILE_ROWS],
    cols: &'a [f32; BLOCK_ROWS],
}

impl FinishLines for ScaledLines<'_> {
    #[inline(always)]
    unsafe fn finish(&self, lines: *const u32, i: usize) -> __m512 {
        // SAFETY: the same contract; tiles have sixteen lines, and a block has sixteen scales.
        unsafe {
            let sums = _mm512_loadu_si512(lines.add(i * TILE_ROWS).cast());
            let cols = _mm512_loadu_ps(self.cols.as_ptr());
            let scales = _mm512_mul_ps(_mm512_set1_ps(*self.rows.get_unchecked(i)), cols);
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
#[derive(Clone, Copy)]
struct Results<'a, L> {
    finish: L,
    bias: Option<&'a [f32; BLOCK_ROWS]>,
}

impl<L: FinishLines> Results<'_, L> {
    /// # Safety
    /// The machine must have AVX-512, and line `i` must be readable.
    #[inline(always)]
    unsafe fn line(&self, simd: Avx512, lines: *const u32, i: usize) -> __m512 {
        // SAFETY: the same contract.
        unsafe {
            let value = self.finish.finish(lines, i);
            match self.bias {
                Some(bias) => _mm512_add_ps(value, load(simd, bias, 0)),
                None => value,
            }
        }
    }
}

/// What the second accumulator of a tile of rows is.
#[derive(Clone, Copy)]
enum Second<'a, L> {
    /// Nothing.
    Missing,
    /// The next block.
    Block(Results<'a, L>, Target),
    /// What the activated first one is multiplied by.
    Up(Results<'a, L>, Activation),
}

/// A tile of rows of one or two accumulators on the way to where results go.
#[derive(Clone, Copy)]
pub struct TileResults<'a, L> {
    first: Results<'a, L>,
    target: Target,
    second: Second<'a, L>,
}

impl<'a, L: FinishLines> TileResults<'a, L> {
    /// Rows that share a tile, of a block and perhaps the next one.
    #[inline(always)]
    pub fn of_blocks(
        out: &BlockOutput<'a>,
        rows: Range<usize>,
        block: usize,
        (first, second): (L, Option<L>),
    ) -> TileResults<'a, L> {
        let second = match second {
            Some(finish) => {
                let next = Results { finish, bias: out.biases(block + 1)[0] };
                Second::Block(next, out.target(rows.clone(), block + 1))
            }
            None => Second::Missing,
        };
        let first = Results { finish: first, bias: out.biases(block)[0] };
        TileResults { first, target: out.target(rows, block), second }
    }

    /// Rows that share a tile, of a block of the gate and the same of what it multiplies.
    #[inline(always)]
    pub fn gated(
        out: &BlockOutput<'a>,
        rows: Range<usize>,
        block: usize,
        [gate, up]: [L; 2],
    ) -> TileResults<'a, L> {
        let [bias, up_bias] = out.biases(block);
        let up = Results { finish: up, bias: up_bias };
        TileResults {
            first: Results { finish: gate, bias },
            target: out.target(rows, block),
            second: Second::Up(up, out.activation),
        }
    }

    /// Writes the results of some rows, of `lines` that both accumulators begin with.
    ///
    /// # Safety
    /// The machine must have AVX-512, the rows must exist in `lines` and among the tile's; no other
    /// task may write these columns meanwhile.
    #[inline(always)]
    pub unsafe fn write(&self, simd: Avx512, lines: [*const u32; 2], rows: Range<usize>) {
        let first = Plain { results: self.first, lines: lines[0] };
        // SAFETY: the same contract.
        unsafe {
            match self.second {
                Second::Missing => self.target.put_rows(simd, rows, &first),
                Second::Block(results, target) => {
                    self.target.put_rows(simd, rows.clone(), &first);
                    target.put_rows(simd, rows, &Plain { results, lines: lines[1] });
                }
                Second::Up(up, activation) => {
                    let up = Plain { results: up, lines: lines[1] };
                    self.target.put_rows(simd, rows, &GatedLines { gate: first, up, activation });
                }
            }
        }
    }
}

/// Lines of an accumulator, which become results.
#[derive(Clone, Copy)]
struct Plain<'a, L> {
    results: Results<'a, L>,
    lines: *const u32,
}

impl<L: FinishLines> RowValues<Avx512> for Plain<'_, L> {
    #[inline(always)]
    unsafe fn of_row(&self, simd: Avx512, i: usize) -> __m512 {
        // SAFETY: the token proves that the instructions exist; the caller vouches for the line.
        unsafe { self.results.line(simd, self.lines, i) }
    }
}

/// Activated lines of the gate times those of what it multiplies.
struct GatedLines<'a, L> {
    gate: Plain<'a, L>,
    up: Plain<'a, L>,
    activation: Activation,
}

impl<L: FinishLines> RowValues<Avx512> for GatedLines<'_, L> {
    #[inline(always)]
    unsafe fn of_row(&self, simd: Avx512, i: usize) -> __m512 {
        // SAFETY: as above.
        unsafe {
            let value = activate(simd, self.gate.of_row(simd, i), self.activation);
            _mm512_mul_ps(value, self.up.of_row(simd, i))
        }
    }
}
