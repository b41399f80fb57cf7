//! Activations as the right operand of tile products, packed once per operation.
//!
//! Sixteen rows of `x` make a tile: word `i` of a step (two bf16 or four bytes that follow each
//! other) of all rows lie side by side. When there are fewer rows, they are packed tighter, in
//! powers of two, so that a single row does not cost the traffic of sixteen.

use std::arch::x86_64::*;

use super::amx::{Amx, Bf16, Int8, Right, TILE_BYTES, TILE_ROWS, TileElement};
use super::avx512::transpose16;
use crate::formats::int8::MAX_CODE;

/// Words of a tile.
const TILE_WORDS: usize = TILE_BYTES / 4;

/// Packed activations.
#[derive(Clone, Copy)]
pub struct PackedRows<'a> {
    words: &'a [u32],
    /// Scale of every row; empty for bf16.
    scales: &'a [f32],
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
pub fn words_per_tile<E: TileElement>(k: usize) -> usize {
    k.div_ceil(E::PER_ROW) * TILE_WORDS
}

/// Words that `num_rows` rows of `k` elements take, with room for a short tile's last reads.
pub fn num_words<E: TileElement>(num_rows: usize, k: usize) -> usize {
    num_rows.div_ceil(TILE_ROWS) * words_per_tile::<E>(k) + TILE_ROWS
}

impl<'a> PackedRows<'a> {
    /// Rows that were packed into `words` and `scales`.
    pub fn new<E: TileElement>(
        words: &'a [u32],
        scales: &'a [f32],
        num_rows: usize,
        k: usize,
    ) -> PackedRows<'a> {
        assert!(words.len() >= num_words::<E>(num_rows, k));
        PackedRows { words, scales, num_rows, steps: k.div_ceil(E::PER_ROW) }
    }

    /// Tile `tile` of sixteen rows.
    pub fn right(&self, tile: usize) -> Right {
        let columns = columns_of(self.num_rows - tile * TILE_ROWS);
        let start = self.words[tile * self.steps * TILE_WORDS..].as_ptr().cast();
        Right { start, row_stride: 4 * columns }
    }

    /// Scales of the rows of bytes.
    pub fn scales(&self) -> &'a [f32] {
        self.scales
    }
}

/// How activations are put into tiles.
pub trait TileActivations: TileElement {
    /// Packs up to sixteen rows of `x [rows, k]` into the words of their tile; stores their
    /// scales where there are any.
    fn pack(amx: Amx, x: &[f32], k: usize, words: &mut [u32], scales: &mut [f32]);
}

impl TileActivations for Bf16 {
    fn pack(_: Amx, x: &[f32], k: usize, words: &mut [u32], _: &mut [f32]) {
        assert!(x.len() <= TILE_ROWS * k && words.len() >= words_per_tile::<Bf16>(k));
        // SAFETY: the token proves that the instructions exist.
        unsafe { pack_bf16(x, k, words) }
    }
}

impl TileActivations for Int8 {
    fn pack(_: Amx, x: &[f32], k: usize, words: &mut [u32], scales: &mut [f32]) {
        assert!(x.len() <= TILE_ROWS * k && words.len() >= words_per_tile::<Int8>(k));
        // SAFETY: the token proves that the instructions exist.
        unsafe { pack_int8(x, k, words, scales) }
    }
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

/// The same arithmetic as `formats::int8::quantize_row`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_int8(x: &[f32], k: usize, words: &mut [u32], scales: &mut [f32]) {
    let num_rows = x.len() / k;
    let mut inverses = [_mm512_setzero_ps(); TILE_ROWS];
    for ((row, scale), inverse) in x.chunks_exact(k).zip(scales).zip(&mut inverses) {
        let mut largest = _mm512_setzero_ps();
        for at in (0..k).step_by(16) {
            largest = _mm512_max_ps(largest, _mm512_abs_ps(load_lanes(row, at)));
        }
        let largest = _mm512_reduce_max_ps(largest);
        *scale = largest / MAX_CODE;
        *inverse = _mm512_set1_ps(if largest > 0.0 { MAX_CODE / largest } else { 0.0 });
    }
    for step in 0..k.div_ceil(Int8::PER_ROW) {
        let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
        for ((row, inverse), line) in x.chunks_exact(k).zip(inverses).zip(&mut lines) {
            let code = |part: usize| {
                let scaled =
                    _mm512_mul_ps(load_lanes(row, step * Int8::PER_ROW + 16 * part), inverse);
                _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled))
            };
            let low = _mm256_set_m128i(code(1), code(0));
            let high = _mm256_set_m128i(code(3), code(2));
            let codes = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            *line = _mm512_castsi512_ps(codes);
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
