//! What codes are multiplied as by `short_matmul`, and how slices of them are prepared.

use std::arch::x86_64::*;
use std::hint::black_box;
use std::marker::PhantomData;
use std::ops::Range;

use super::avx2::Avx2;
use super::byte_matmul::{ByteScales, ByteWeights};
use super::byte_simd::{ByteSimd, FoldedCodes};
use super::byte_vectors::{add_pairs8, broadcast8, unfold8};
use super::lines::{CodedLines, LINE_BYTES};
use crate::formats::blocks::{BLOCK_ROWS, FOLDED_BYTES, WORD_BYTES};

/// Steps of a slice: its weights, once prepared, take half of a first-level cache of 32 KiB, and
/// the activations of a pass a fifth.
pub const SLICE_STEPS: usize = 8;
/// Lines of a step: words of 64 codes.
pub const LINES: usize = LINE_BYTES / WORD_BYTES;
/// Lines of the least group.
const GROUP_LINES: usize = LINES / 2;
/// Most groups of a slice.
pub const MAX_GROUPS: usize = SLICE_STEPS * LINES / GROUP_LINES;

/// Sixteen sums.
pub type Ints = <Avx2 as ByteSimd>::Ints;

/// What the codes of a matrix are.
pub trait Codes {
    /// Bytes of a code once it is prepared, of weights and of activations.
    const BYTES: usize;
    /// Bytes of a block for one step.
    const STEP_BYTES: usize;
    /// Whether codes have scales per group.
    const HAS_GROUPS: bool;

    /// Prepares step `i` of a slice of a block: its lines, each with a word of all sixteen rows.
    ///
    /// # Safety
    /// The block must have the step, and there must be room for the slice.
    unsafe fn prepare(avx2: Avx2, part: &Part<'_>, i: usize, to: *mut u8);
    /// Prepares a line of activations.
    ///
    /// # Safety
    /// A line must be readable, and there must be room for it.
    unsafe fn prepare_x(avx2: Avx2, line: *const i8, to: *mut u8);
    /// Sums of the products of some lines of a slice, those of a group or all, with `R` rows.
    ///
    /// # Safety
    /// The slice must be prepared.
    unsafe fn sums<const R: usize>(
        avx2: Avx2,
        slice: &Slice<'_>,
        row: usize,
        lines: Range<usize>,
    ) -> [Ints; R];
}

/// A slice of a block, which is to be prepared.
pub struct Part<'a> {
    /// The matrix.
    pub weights: &'a ByteWeights<'a>,
    /// Which block.
    pub block: usize,
    /// The first step.
    pub first: usize,
}

impl Part<'_> {
    /// Codes of step `i`.
    #[inline(always)]
    fn codes<C: Codes>(&self, i: usize) -> *const u8 {
        self.weights.blocks.block(self.block).wrapping_add((self.first + i) * C::STEP_BYTES)
    }
}

/// A slice of activations and of a block of weights, both prepared.
pub struct Slice<'a> {
    /// All rows.
    pub x: CodedLines<'a>,
    /// The first row of the row block.
    pub first_row: usize,
    /// Steps of the summed axis.
    pub steps: Range<usize>,
    /// Lines of a group.
    pub group_lines: usize,
    /// Prepared activations of the row block, [`Slice::x_bytes`] for each row.
    pub rows: *const u8,
    /// Prepared weights of the block at hand.
    pub weights: *const u8,
}

impl Slice<'_> {
    /// Bytes of the prepared codes of a row.
    pub const fn codes_bytes<C: Codes>() -> usize {
        SLICE_STEPS * LINE_BYTES * C::BYTES
    }

    /// Bytes from the prepared activations of a row to those of the next: codes, then scales of
    /// their groups.
    pub const fn x_bytes<C: Codes>() -> usize {
        let scales = if C::HAS_GROUPS { MAX_GROUPS * size_of::<f32>() } else { 0 };
        Slice::codes_bytes::<C>() + scales
    }

    /// Bytes of prepared weights: codes, then with what the sums of the least groups start.
    pub const fn weight_bytes<C: Codes>() -> usize {
        BLOCK_ROWS * Slice::codes_bytes::<C>() + MAX_GROUPS * LINE_BYTES
    }

    /// Where the sums of the least groups start.
    const fn starts<C: Codes>() -> usize {
        BLOCK_ROWS * Slice::codes_bytes::<C>()
    }

    /// Prepared activations of a row.
    #[inline(always)]
    pub fn row<C: Codes>(&self, row: usize) -> *const u8 {
        self.rows.wrapping_add((row - self.first_row) * Slice::x_bytes::<C>())
    }

    /// Groups of the slice.
    #[inline(always)]
    pub fn groups(&self) -> Range<usize> {
        let lines = self.steps.start * LINES..self.steps.end * LINES;
        lines.start / self.group_lines..lines.end.div_ceil(self.group_lines)
    }
}

/// Sixteen integers.
///
/// # Safety
/// They must be readable, and the machine must have AVX2.
#[inline(always)]
pub unsafe fn load(from: *const u8) -> Ints {
    // SAFETY: the same contract.
    unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
}

/// Writes them.
///
/// # Safety
/// Sixteen integers must be writable, and the machine must have AVX2.
#[inline(always)]
pub unsafe fn store(to: *mut u8, ints: Ints) {
    // SAFETY: the same contract.
    unsafe {
        _mm256_storeu_si256(to.cast(), ints[0]);
        _mm256_storeu_si256(to.add(32).cast(), ints[1]);
    }
}

/// Signed bytes, a scale per row of weights.
pub struct Bytes;

/// Signed bytes, scales per group (Q8_0).
pub struct GroupedBytes;

/// Both become sixteen bits, of which a word of four is two pairs: codes 0 and 2, then 1 and 3.
macro_rules! signed_bytes {
    ($codes:ty, $has_groups:literal) => {
        impl Codes for $codes {
            const BYTES: usize = 2;
            const STEP_BYTES: usize = LINES * LINE_BYTES;
            const HAS_GROUPS: bool = $has_groups;

            #[inline(always)]
            unsafe fn prepare(_: Avx2, part: &Part<'_>, i: usize, to: *mut u8) {
                let codes = part.codes::<Self>(i);
                // SAFETY: the same contract; the token proves that the instructions exist.
                unsafe {
                    let to = to.add(i * LINES * 2 * LINE_BYTES);
                    for line in 0..LINES {
                        for half in [0, 32] {
                            let codes = codes.add(line * LINE_BYTES + half);
                            let codes = _mm256_loadu_si256(codes.cast());
                            let even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(codes));
                            let odd = _mm256_srai_epi16::<8>(codes);
                            let to = to.add(line * 2 * LINE_BYTES + half);
                            _mm256_storeu_si256(to.cast(), even);
                            _mm256_storeu_si256(to.add(LINE_BYTES).cast(), odd);
                        }
                    }
                }
            }
            #[inline(always)]
            unsafe fn prepare_x(_: Avx2, line: *const i8, to: *mut u8) {
                // SAFETY: the same contract; the token proves that the instructions exist.
                unsafe {
                    let order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
                    for at in (0..LINE_BYTES).step_by(16) {
                        let codes = _mm_loadu_si128(line.add(at).cast());
                        let codes = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(codes, order));
                        _mm256_storeu_si256(to.add(2 * at).cast(), codes);
                    }
                }
            }
            #[inline(always)]
            unsafe fn sums<const R: usize>(
                avx2: Avx2,
                slice: &Slice<'_>,
                row: usize,
                lines: Range<usize>,
            ) -> [Ints; R] {
                let x = slice.row::<Self>(row);
                let mut sums = [avx2.ints(0); R];
                for pair in 2 * lines.start..2 * lines.end {
                    // SAFETY: the same contract; the token proves that the instructions exist.
                    unsafe {
                        let codes = load(slice.weights.add(pair * LINE_BYTES));
                        for (i, sums) in sums.iter_mut().enumerate() {
                            let at = i * Slice::x_bytes::<Self>() + pair * WORD_BYTES;
                            let x = broadcast8(x.add(at).cast());
                            for (sum, codes) in sums.iter_mut().zip(codes) {
                                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(codes, x));
                            }
                        }
                    }
                }
                sums
            }
        }
    };
}

signed_bytes!(Bytes, false);
signed_bytes!(GroupedBytes, true);

/// Codes of four bits, scales per group.
pub struct Folded<C>(PhantomData<C>);

impl<C: FoldedCodes> Folded<C> {
    /// Zero points of the least group `group` of a block, four for each of its rows.
    #[inline(always)]
    fn zeros(avx2: Avx2, part: &Part<'_>, group: usize) -> Ints {
        let ByteScales::Groups(scales) = part.weights.scales else {
            panic!("codes of four bits have scales per group")
        };
        let group = group * GROUP_LINES * WORD_BYTES / scales.size;
        let Some(zeros) = scales.zeros(part.block, group) else {
            return avx2.ints(i32::from_ne_bytes([C::MIDDLE; 4]));
        };
        // SAFETY: there are sixteen zero points; the token proves that the instructions exist.
        unsafe {
            let four = _mm256_set1_epi32(0x0101_0101);
            let low = _mm256_cvtepu8_epi32(_mm_loadl_epi64(zeros.as_ptr().cast()));
            let high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(zeros.as_ptr().add(8).cast()));
            [_mm256_mullo_epi32(low, four), _mm256_mullo_epi32(high, four)]
        }
    }

    /// Sums of the lines of a least group, in pairs of sixteen bits.
    ///
    /// # Safety
    /// They must be prepared.
    #[inline(always)]
    unsafe fn shorts<const R: usize>(slice: &Slice<'_>, row: usize, group: usize) -> [Ints; R] {
        let x = slice.row::<Self>(row);
        let first = group * GROUP_LINES;
        // SAFETY: the caller's contract, who has a token for the instructions.
        unsafe {
            let start = slice.weights.add(Slice::starts::<Self>() + group * LINE_BYTES);
            let mut shorts = [load(start); R];
            // Of a known number of lines, the compiler would add up sums in an order for which
            // there are not enough registers.
            for line in first..first + black_box(GROUP_LINES) {
                let codes = load(slice.weights.add(line * LINE_BYTES));
                for (i, shorts) in shorts.iter_mut().enumerate() {
                    let at = i * Slice::x_bytes::<Self>() + line * WORD_BYTES;
                    let x = broadcast8(x.add(at).cast());
                    for (sum, codes) in shorts.iter_mut().zip(codes) {
                        *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(x, codes));
                    }
                }
            }
            shorts
        }
    }
}

/// What makes activations unsigned: 128 more, which flips their highest bit.
const HIGHEST_BIT: i8 = -128;

impl<C: FoldedCodes> Codes for Folded<C> {
    const BYTES: usize = 1;
    const STEP_BYTES: usize = FOLDED_BYTES;
    const HAS_GROUPS: bool = true;

    #[inline(always)]
    unsafe fn prepare(avx2: Avx2, part: &Part<'_>, i: usize, to: *mut u8) {
        let codes = part.codes::<Self>(i);
        let first = 2 * (part.first + i);
        let zeros = [Self::zeros(avx2, part, first), Self::zeros(avx2, part, first + 1)];
        let mut starts = [avx2.ints(0); 2];
        // SAFETY: the same contract; the token proves that the instructions exist.
        unsafe {
            let lines = to.add(2 * i * FOLDED_BYTES);
            let more = _mm256_set1_epi8(HIGHEST_BIT);
            for line in 0..GROUP_LINES {
                for half in 0..2 {
                    let at = line * LINE_BYTES + half * 32;
                    let folded = unfold8::<C>(codes.add(at));
                    for group in 0..2 {
                        let codes = _mm256_sub_epi8(folded[group], zeros[group][half]);
                        _mm256_storeu_si256(lines.add(group * FOLDED_BYTES + at).cast(), codes);
                        let gained = _mm256_maddubs_epi16(more, codes);
                        starts[group][half] = _mm256_sub_epi16(starts[group][half], gained);
                    }
                }
            }
            let to = to.add(Slice::starts::<Self>() + 2 * i * LINE_BYTES);
            store(to, starts[0]);
            store(to.add(LINE_BYTES), starts[1]);
        }
    }
    #[inline(always)]
    unsafe fn prepare_x(_: Avx2, line: *const i8, to: *mut u8) {
        // SAFETY: the same contract; the token proves that the instructions exist.
        unsafe {
            for at in (0..LINE_BYTES).step_by(32) {
                let codes = _mm256_loadu_si256(line.add(at).cast());
                let codes = _mm256_xor_si256(codes, _mm256_set1_epi8(HIGHEST_BIT));
                _mm256_storeu_si256(to.add(at).cast(), codes);
            }
        }
    }
    #[inline(always)]
    unsafe fn sums<const R: usize>(
        avx2: Avx2,
        slice: &Slice<'_>,
        row: usize,
        lines: Range<usize>,
    ) -> [Ints; R] {
        let mut sums = [avx2.ints(0); R];
        let (first, end) = (lines.start / GROUP_LINES, lines.end / GROUP_LINES);
        // SAFETY: the same contract; the token proves that the instructions exist.
        unsafe {
            add_shorts(&mut sums, Self::shorts::<R>(slice, row, first));
            for group in first + 1..end {
                add_shorts(&mut sums, Self::shorts::<R>(slice, row, group));
            }
        }
        sums
    }
}

/// Adds pairs of sums of sixteen bits.
///
/// # Safety
/// The machine must have AVX2.
#[inline(always)]
unsafe fn add_shorts<const R: usize>(sums: &mut [Ints; R], shorts: [Ints; R]) {
    for (sums, shorts) in sums.iter_mut().zip(shorts) {
        for (sum, shorts) in sums.iter_mut().zip(shorts) {
            // SAFETY: the same contract.
            *sum = unsafe { add_pairs8(*sum, shorts) };
        }
    }
}
