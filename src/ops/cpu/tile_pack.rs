//! Activations as the right operand of tile products, packed once per operation.
//!
//! Sixteen rows of `x` make a tile: word `i` of a step (two bf16 that follow each other) of all
//! rows lie side by side. When there are fewer rows, they are packed tighter, in
//! powers of two, so that a single row does not cost the traffic of sixteen.

use std::arch::x86_64::*;

use super::amx::{Amx, Bf16, Right, TILE_BYTES, TILE_ROWS, TileElement};
use super::avx512::transpose16;

/// Words of a tile.
const TILE_WORDS: usize = TILE_BYTES / 4;

/// Packed activations.
#[derive(Clone, Copy)]
pub struct PackedRows<'a> {
    words: &'a [u32],
    /// Rows of `x`.
    pub num_rows: usize,
    /// Steps along the summed axis.
    pub steps: usize,
}

/// Rows that share a line of a tile's memory, when a tile holds `rows`.
fn columns_of(rows: usize) -> usize {
    rows.next_power_of_two().min(TILE_ROWS)
}

/// Words of a tile over all steps of `k` elements.
pub fn words_per_tile(k: usize) -> usize {
    k.div_ceil(Bf16::PER_ROW) * TILE_WORDS
}

/// Words that `num_rows` rows of `k` elements take, with room for a short tile's last reads.
pub fn num_words(num_rows: usize, k: usize) -> usize {
    num_rows.div_ceil(TILE_ROWS) * words_per_tile(k) + TILE_ROWS
}

impl<'a> PackedRows<'a> {
    /// Rows that were packed into `words`.
    pub fn new(words: &'a [u32], num_rows: usize, k: usize) -> PackedRows<'a> {
        assert!(words.len() >= num_words(num_rows, k));
        PackedRows { words, num_rows, steps: k.div_ceil(Bf16::PER_ROW) }
    }

    /// Tile `tile` of sixteen rows.
    pub fn right(&self, tile: usize) -> Right {
        let columns = columns_of(self.num_rows - tile * TILE_ROWS);
        let start = self.words[tile * self.steps * TILE_WORDS..].as_ptr().cast();
        Right { start, row_stride: 4 * columns }
    }
}

/// Packs up to sixteen rows of `x [rows, k]` into the words of their tile, as bf16.
pub fn pack(_: Amx, x: &[f32], k: usize, words: &mut [u32]) {
    assert!(x.len() <= TILE_ROWS * k && words.len() >= words_per_tile(k));
    // SAFETY: the token proves that the instructions exist.
    unsafe { pack_bf16(x, k, words) }
}

/// A mask of the first `count` lanes.
pub fn first_lanes(count: usize) -> __mmask16 {
    if count >= 16 { !0 } else { (1 << count) - 1 }
}

/// Sixteen elements of `row` from `at` on, zeros beyond its end.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_lanes(row: &[f32], at: usize) -> __m512 {
    let lanes = first_lanes(row.len().saturating_sub(at));
    // SAFETY: masked lanes are not read, the others lie inside the row.
    unsafe { _mm512_maskz_loadu_ps(lanes, row.as_ptr().wrapping_add(at)) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_bf16(x: &[f32], k: usize, words: &mut [u32]) {
    let num_rows = x.len() / k;
    for step in 0..k.div_ceil(Bf16::PER_ROW) {
        let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
        for (row, line) in x.chunks_exact(k).zip(&mut lines) {
            let at = step * Bf16::PER_ROW;
            let (low, high) = (load_lanes(row, at), load_lanes(row, at + 16));
            // SAFETY: both types are 64 bytes.
            *line =
                unsafe { std::mem::transmute::<__m512bh, __m512>(_mm512_cvtne2ps_pbh(high, low)) };
        }
        interleave(&lines, num_rows, step, words);
    }
}

/// Writes the words of one step of up to sixteen rows side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn interleave(lines: &[__m512; TILE_ROWS], num_rows: usize, step: usize, words: &mut [u32]) {
    let columns = columns_of(num_rows);
    let to = words[step * TILE_ROWS * columns..][..TILE_ROWS * columns].as_mut_ptr();
    let keep = first_lanes(columns);
    // SAFETY: the slice has sixteen lines of `columns` words; masked lanes are not written.
    unsafe {
        if columns == 1 {
            return _mm512_storeu_ps(to.cast(), lines[0]);
        }
        for (i, words) in transpose16(*lines).into_iter().enumerate() {
            _mm512_mask_storeu_ps(to.add(i * columns).cast(), keep, words);
        }
    }
}
