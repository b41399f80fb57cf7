//! Rows of f32 as the right operand of tile products: what queries of an attention become.
//!
//! Word `i` of a step (two bf16 that follow each other) of sixteen rows lie side by side.

use std::arch::x86_64::*;

use super::amx::{Amx, Bf16, TILE_LEN, TILE_ROWS, TileElement};
use super::avx512::transpose16;

/// Packs sixteen rows of words of f32, `x [16, k]`, as bf16, a tile per 32 elements, which divide `k`.
pub fn pack(_: Amx, x: &[u32], k: usize, tiles: &mut [u32]) {
    assert!(x.len() == TILE_ROWS * k && k.is_multiple_of(Bf16::PER_ROW));
    // SAFETY: the token proves that the instructions exist.
    unsafe { pack_bf16(x, k, tiles) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pack_bf16(x: &[u32], k: usize, tiles: &mut [u32]) {
    for (step, tile) in tiles.chunks_exact_mut(TILE_LEN).enumerate() {
        let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
        for (row, line) in x.chunks_exact(k).zip(&mut lines) {
            let part = &row[step * Bf16::PER_ROW..][..Bf16::PER_ROW];
            // SAFETY: 32 elements are read; vectors of the same size, all of whose bits are valid.
            *line = unsafe {
                let (low, high) = (part.as_ptr(), part.as_ptr().add(16));
                let pairs =
                    _mm512_cvtne2ps_pbh(_mm512_loadu_ps(high.cast()), _mm512_loadu_ps(low.cast()));
                std::mem::transmute::<__m512bh, __m512>(pairs)
            };
        }
        // SAFETY: the instructions exist here; a tile has sixteen lines of sixteen words.
        unsafe {
            for (words, line) in tile.chunks_exact_mut(TILE_ROWS).zip(transpose16(lines)) {
                _mm512_storeu_ps(words.as_mut_ptr().cast(), line);
            }
        }
    }
}
