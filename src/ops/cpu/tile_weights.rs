//! Row-major weights as the left operand of tile products.
//!
//! Dense bf16 rows are tile rows already. Codes are converted to bf16: exactly where a row has one
//! scale, else with the scale multiplied in and rounded once.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::amx::{Bf16, ROW_BYTES, TILE_BYTES, TILE_ROWS, TileElement};
use super::avx512::Avx512;
use super::weight_rows::{Bytes, Code, Coded, Dense, E4m3, WeightRows};
use crate::formats::PackedMatrix;

/// Rows from one pair of tiles to the next: what is asked for ahead of time.
const AHEAD_ROWS: usize = 2 * TILE_ROWS;

/// A weight matrix whose rows can be put into tiles.
pub trait TileWeights: Copy + Send + Sync {
    /// What the tiles hold.
    type Element: TileElement;

    /// Address of a row and bytes to the next when rows can be read as tile rows where they
    /// are.
    fn in_place(&self, row: usize) -> Option<(*const u8, usize)>;

    /// Fills consecutive tiles with `rows` (at most sixteen) over `steps`; rows that are missing
    /// become 0, columns beyond the matrix anything finite.
    ///
    /// # Safety
    /// Rows must exist, and `to` must have room for the tiles.
    unsafe fn fill(&self, vectors: Avx512, rows: Range<usize>, steps: Range<usize>, to: *mut u8);
}

/// Dense rows of bf16.
#[derive(Clone, Copy)]
pub struct DenseRows<'a> {
    elements: &'a [bf16],
    k: usize,
}

impl<'a> DenseRows<'a> {
    /// The rows of a dense matrix of bf16; panics when elements are missing.
    pub fn of(matrix: &'a PackedMatrix) -> DenseRows<'a> {
        let Dense { elements, stride } = Dense::of(matrix);
        DenseRows { elements, k: stride }
    }
}

impl TileWeights for DenseRows<'_> {
    type Element = Bf16;

    fn in_place(&self, row: usize) -> Option<(*const u8, usize)> {
        let row = self.elements[row * self.k..].as_ptr().cast();
        self.k.is_multiple_of(32).then_some((row, 2 * self.k))
    }

    unsafe fn fill(&self, _: Avx512, rows: Range<usize>, steps: Range<usize>, to: *mut u8) {
        // SAFETY: the vectors' token proves the instructions; the rest is the same contract.
        unsafe { copy_dense(*self, rows, steps, to) }
    }
}

/// # Safety
/// As [`TileWeights::fill`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn copy_dense(dense: DenseRows<'_>, rows: Range<usize>, steps: Range<usize>, to: *mut u8) {
    let DenseRows { elements, k } = dense;
    for i in 0..TILE_ROWS {
        for (tile, step) in steps.clone().enumerate() {
            let at = step * Bf16::PER_ROW;
            let lanes: __mmask32 = match k - at {
                32.. => !0,
                rest => (1 << rest) - 1,
            };
            // SAFETY: masked lanes are not read; `to` has room for the tiles.
            unsafe {
                let line = if i < rows.len() {
                    let from = elements[(rows.start + i) * k + at..].as_ptr();
                    _mm512_maskz_loadu_epi16(lanes, from.cast())
                } else {
                    _mm512_setzero_si512()
                };
                _mm512_storeu_si512(to.add(tile * TILE_BYTES + i * ROW_BYTES).cast(), line);
            }
        }
    }
}

/// A code that is converted to bf16.
pub trait TileCode: Code {
    /// Converts `steps` of one row to tile rows, a tile apart from each other; scales are
    /// multiplied in when `SCALE`, else left to the sums.
    ///
    /// # Safety
    /// The row must exist and `to` must have room; the machine must have AVX-512 with BF16.
    unsafe fn convert<const SCALE: bool>(
        rows: &Coded<'_, Self>,
        row: usize,
        steps: Range<usize>,
        to: *mut u8,
    );
}

impl<C: TileCode> TileWeights for Coded<'_, C> {
    type Element = Bf16;

    fn in_place(&self, _: usize) -> Option<(*const u8, usize)> {
        None
    }

    unsafe fn fill(&self, _: Avx512, rows: Range<usize>, steps: Range<usize>, to: *mut u8) {
        // SAFETY: the same contract; tiles are open only where BF16 vectors exist.
        unsafe { fill_rows::<C, true>(self, rows, steps, to) }
    }
}

/// Rows of codes with one scale each, which is left to the sums: codes are exact in bf16.
#[derive(Clone, Copy)]
pub struct Unscaled<'a, C>(pub Coded<'a, C>);

impl<C: TileCode> TileWeights for Unscaled<'_, C> {
    type Element = Bf16;

    fn in_place(&self, _: usize) -> Option<(*const u8, usize)> {
        None
    }

    unsafe fn fill(&self, _: Avx512, rows: Range<usize>, steps: Range<usize>, to: *mut u8) {
        // SAFETY: as above.
        unsafe { fill_rows::<C, false>(&self.0, rows, steps, to) }
    }
}

/// # Safety
/// As [`TileWeights::fill`] and [`TileCode::convert`].
unsafe fn fill_rows<C: TileCode, const SCALE: bool>(
    codes: &Coded<'_, C>,
    rows: Range<usize>,
    steps: Range<usize>,
    to: *mut u8,
) {
    for i in 0..TILE_ROWS {
        // SAFETY: the same contract.
        unsafe {
            let to = to.add(i * ROW_BYTES);
            if i < rows.len() {
                C::convert::<SCALE>(codes, rows.start + i, steps.clone(), to);
            } else {
                for tile in 0..steps.len() {
                    to.add(tile * TILE_BYTES).write_bytes(0, ROW_BYTES);
                }
            }
        }
    }
}

impl TileCode for Bytes {
    unsafe fn convert<const SCALE: bool>(
        rows: &Coded<'_, Bytes>,
        row: usize,
        steps: Range<usize>,
        to: *mut u8,
    ) {
        // SAFETY: the same contract.
        unsafe { convert_lanes::<Bytes, SCALE>(rows, row, steps, to) }
    }
}

impl TileCode for E4m3 {
    unsafe fn convert<const SCALE: bool>(
        rows: &Coded<'_, E4m3>,
        row: usize,
        steps: Range<usize>,
        to: *mut u8,
    ) {
        // SAFETY: the same contract.
        unsafe {
            if SCALE {
                convert_lanes::<E4m3, SCALE>(rows, row, steps, to);
            } else {
                rebias_e4m3(rows, row, steps, to);
            }
        }
    }
}

/// # Safety
/// As [`TileCode::convert`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn convert_lanes<C: Code, const SCALE: bool>(
    rows: &Coded<'_, C>,
    row: usize,
    steps: Range<usize>,
    to: *mut u8,
) {
    // SAFETY: this function is only entered where the instructions exist.
    let simd = unsafe { Avx512::assume() };
    let codes = rows.row(row);
    for (tile, step) in steps.enumerate() {
        let at = step * Bf16::PER_ROW;
        // SAFETY: the row is padded to 64 elements; `to` has room; a prefetch never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(rows.address(row + AHEAD_ROWS, at).cast());
            let (low, high) = if SCALE {
                (rows.lanes(simd, row, at), rows.lanes(simd, row, at + 16))
            } else {
                (C::lanes(simd, codes, at), C::lanes(simd, codes, at + 16))
            };
            store_line(_mm512_cvtne2ps_pbh(high, low), to.add(tile * TILE_BYTES));
        }
    }
}

/// E4M3 to bf16 by moving the fields: the exponent's bias grows from 7 to 127. The seven
/// subnormal magnitudes come from a table.
///
/// # Safety
/// As [`TileCode::convert`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn rebias_e4m3(rows: &Coded<'_, E4m3>, row: usize, steps: Range<usize>, to: *mut u8) {
    let subnormals = std::array::from_fn::<bf16, 32, _>(|i| {
        bf16::from_f32(crate::formats::fp8::decode(i as u8 & 7))
    });
    // SAFETY: an array of 64 bytes.
    let subnormals = unsafe { _mm512_loadu_si512(subnormals.as_ptr().cast()) };
    let (magnitude, sign) = (_mm512_set1_epi16(0x07f0), _mm512_set1_epi16(i16::MIN));
    let (exponent, bias) = (_mm512_set1_epi16(0x78), _mm512_set1_epi16(120 << 7));
    let codes = rows.row(row);
    for (tile, step) in steps.enumerate() {
        // SAFETY: the row is padded to 64 elements; `to` has room; a prefetch never faults.
        unsafe {
            let from = codes.add(step * Bf16::PER_ROW);
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD_ROWS * rows.row_bytes()).cast());
            let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from.cast()));
            let shifted = _mm512_and_si512(_mm512_slli_epi16::<4>(words), magnitude);
            let is_subnormal = _mm512_testn_epi16_mask(words, exponent);
            let number = _mm512_add_epi16(shifted, bias);
            let number = _mm512_mask_permutexvar_epi16(number, is_subnormal, words, subnormals);
            // The sign bit of the code, above the magnitude.
            let line =
                _mm512_ternarylogic_epi32::<0xf8>(number, _mm512_slli_epi16::<8>(words), sign);
            _mm512_storeu_si512(to.add(tile * TILE_BYTES).cast(), line);
        }
    }
}

/// # Safety
/// 64 bytes must be writable, and the machine must have AVX-512.
#[inline(always)]
unsafe fn store_line(line: __m512bh, to: *mut u8) {
    // SAFETY: the same contract; both types are 64 bytes.
    unsafe { _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(line)) }
}
