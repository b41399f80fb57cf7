//! Weights of every format as the left operand of tile products.
//!
//! Dense bf16 and INT8 rows are tile rows already. The other formats are converted to bf16, the
//! scale multiplied in and rounded once.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::amx::{Bf16, Int8, ROW_BYTES, TILE_BYTES, TILE_ROWS, TileElement};
use super::avx512::Avx512;
use super::weight_rows::{Bytes, Code, Coded, E4m3, Nibbles, WeightRows};

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
    /// `[num_cols of the output, k]`.
    pub elements: &'a [bf16],
    /// Length of a row.
    pub k: usize,
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

/// Rows of bytes that are multiplied as integers.
#[derive(Clone, Copy)]
pub struct Int8Rows<'a>(pub Coded<'a, Bytes>);

impl TileWeights for Int8Rows<'_> {
    type Element = Int8;

    fn in_place(&self, row: usize) -> Option<(*const u8, usize)> {
        Some((self.0.row(row), self.0.row_bytes()))
    }

    unsafe fn fill(&self, _: Avx512, rows: Range<usize>, steps: Range<usize>, to: *mut u8) {
        for i in 0..TILE_ROWS {
            for (tile, step) in steps.clone().enumerate() {
                // SAFETY: rows are padded to whole tile rows; `to` has room for the tiles.
                unsafe {
                    let to = to.add(tile * TILE_BYTES + i * ROW_BYTES);
                    if i < rows.len() {
                        let from = self.0.row(rows.start + i).add(step * ROW_BYTES);
                        to.copy_from_nonoverlapping(from, ROW_BYTES);
                    } else {
                        to.write_bytes(0, ROW_BYTES);
                    }
                }
            }
        }
    }
}

/// A code that is converted to bf16.
pub trait TileCode: Code {
    /// Converts `steps` of one row to tile rows, a tile apart from each other.
    ///
    /// # Safety
    /// The row must exist and `to` must have room; the machine must have AVX-512 with BF16.
    unsafe fn convert(rows: &Coded<'_, Self>, row: usize, steps: Range<usize>, to: *mut u8);
}

impl<C: TileCode> TileWeights for Coded<'_, C> {
    type Element = Bf16;

    fn in_place(&self, _: usize) -> Option<(*const u8, usize)> {
        None
    }

    unsafe fn fill(&self, _: Avx512, rows: Range<usize>, steps: Range<usize>, to: *mut u8) {
        for i in 0..TILE_ROWS {
            // SAFETY: the caller's contract; tiles are open only where BF16 vectors exist.
            unsafe {
                let to = to.add(i * ROW_BYTES);
                if i < rows.len() {
                    C::convert(self, rows.start + i, steps.clone(), to);
                } else {
                    for tile in 0..steps.len() {
                        to.add(tile * TILE_BYTES).write_bytes(0, ROW_BYTES);
                    }
                }
            }
        }
    }
}

impl TileCode for Bytes {
    unsafe fn convert(rows: &Coded<'_, Bytes>, row: usize, steps: Range<usize>, to: *mut u8) {
        // SAFETY: the same contract.
        unsafe { convert_lanes(rows, row, steps, to) }
    }
}

impl TileCode for E4m3 {
    unsafe fn convert(rows: &Coded<'_, E4m3>, row: usize, steps: Range<usize>, to: *mut u8) {
        // SAFETY: the same contract.
        unsafe { convert_lanes(rows, row, steps, to) }
    }
}

impl TileCode for Nibbles {
    unsafe fn convert(rows: &Coded<'_, Nibbles>, row: usize, steps: Range<usize>, to: *mut u8) {
        // SAFETY: the same contract.
        unsafe { look_up_nibbles(rows, row, steps, to) }
    }
}

/// # Safety
/// As [`TileCode::convert`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn convert_lanes<C: Code>(
    rows: &Coded<'_, C>,
    row: usize,
    steps: Range<usize>,
    to: *mut u8,
) {
    // SAFETY: this function is only entered where the instructions exist.
    let simd = unsafe { Avx512::assume() };
    for (tile, step) in steps.enumerate() {
        let at = step * Bf16::PER_ROW;
        // SAFETY: the row is padded to 64 elements; `to` has room; a prefetch never faults.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(rows.address(row + AHEAD_ROWS, at).cast());
            let (low, high) = (rows.lanes(simd, row, at), rows.lanes(simd, row, at + 16));
            store_line(_mm512_cvtne2ps_pbh(high, low), to.add(tile * TILE_BYTES));
        }
    }
}

/// A group has sixteen different values: they are computed once, and codes pick theirs.
///
/// # Safety
/// As [`TileCode::convert`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn look_up_nibbles(rows: &Coded<'_, Nibbles>, row: usize, steps: Range<usize>, to: *mut u8) {
    // SAFETY: this function is only entered where the instructions exist.
    let simd = unsafe { Avx512::assume() };
    let codes = _mm512_setr_ps(
        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    );
    let from = rows.row(row);
    let (mut cell, mut values) = (usize::MAX, _mm512_setzero_si512());
    for (tile, step) in steps.enumerate() {
        let wanted = rows.cell(row, step * Bf16::PER_ROW);
        if wanted != cell {
            cell = wanted;
            let zero = _mm512_set1_ps(rows.zero_point(cell));
            let scaled = _mm512_mul_ps(_mm512_sub_ps(codes, zero), rows.scale(simd, cell));
            // The table twice, because an index has five bits and the fifth belongs to the
            // other half of the byte.
            let table = _mm512_cvtne2ps_pbh(scaled, scaled);
            // SAFETY: both are 64 bytes.
            values = unsafe { std::mem::transmute::<__m512bh, __m512i>(table) };
        }
        // SAFETY: a chunk of two steps has 32 bytes; `to` has room; a prefetch never faults.
        unsafe {
            let bytes = from.add(step / 2 * 32);
            _mm_prefetch::<_MM_HINT_T1>(bytes.wrapping_add(AHEAD_ROWS * rows.row_bytes()).cast());
            let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes.cast()));
            let index = if step % 2 == 0 { words } else { _mm512_srli_epi16::<4>(words) };
            let line = _mm512_permutexvar_epi16(index, values);
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
