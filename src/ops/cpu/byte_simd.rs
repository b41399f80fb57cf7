//! Vectors of sixteen integer sums: what products of bytes need beside [`Simd`].
//!
//! The lanes are the sixteen columns of a block of weights. A line holds four codes of each
//! column; four codes of a row of activations go with it. All sums are exact.

use half::f16;

use super::scalar::Scalar;
use super::simd::Simd;
use crate::formats::blocks::{BLOCK_ROWS, LINE_BYTES, WORD_BYTES};
use crate::formats::{int4, mxfp4};

/// What folded codes stand for, as bytes without a sign.
pub trait FoldedCodes {
    /// The number of each code; `None` where it is the code.
    const VALUES: Option<[u8; 16]>;
    /// The number that stands for 0 where groups have no zero points.
    const MIDDLE: u8;
}

/// INT4.
pub struct Int4Codes;

impl FoldedCodes for Int4Codes {
    const VALUES: Option<[u8; 16]> = None;
    const MIDDLE: u8 = int4::MIDDLE;
}

/// MXFP4: twice what codes stand for.
pub struct Mxfp4Codes;

impl FoldedCodes for Mxfp4Codes {
    const VALUES: Option<[u8; 16]> = Some(mxfp4::OFFSET_VALUES);
    const MIDDLE: u8 = mxfp4::OFFSET;
}

/// Sixteen sums and what can be done with them.
pub trait ByteSimd: Copy + Send + Sync + 'static {
    /// The vectors of f32 beside them.
    type Base: Simd;
    /// Sixteen i32.
    type Ints: Copy;
    /// Sixteen f32.
    type Floats: Copy;
    /// Most rows of activations that share a pass over weights without spilling: a power of two
    /// up to sixteen.
    const MAX_ROWS: usize;
    /// The same where groups are scaled.
    const MAX_GROUP_ROWS: usize;
    /// What [`ByteSimd::add_bytes`] adds to every code of the weights.
    const BYTES_OFFSET: i32;

    /// The vectors of f32 beside them.
    fn base(self) -> Self::Base;
    /// All sums equal to `x`.
    fn ints(self, x: i32) -> Self::Ints;
    /// `a + b`.
    fn add_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// Adds the products of a line of signed codes, plus the offset, with four codes of each row.
    ///
    /// # Safety
    /// A line and four bytes of every row must be readable.
    unsafe fn add_bytes<const R: usize>(
        self,
        sums: &mut [Self::Ints; R],
        line: *const u8,
        x: [*const i8; R],
    );
    /// Adds the products of the two lines that lie folded at `line`: of the one in the low
    /// halves with four codes of each row, of the other with those at `high` bytes further.
    ///
    /// # Safety
    /// As [`ByteSimd::add_bytes`], for both places of every row.
    unsafe fn add_folded<C: FoldedCodes, const R: usize>(
        self,
        sums: &mut [[Self::Ints; 2]; R],
        line: *const u8,
        x: [*const i8; R],
        high: usize,
    );
    /// `sums - zeros · factor`, for sixteen unsigned bytes and a factor of 16 bits.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn sub_zeros(self, sums: Self::Ints, zeros: *const u8, factor: i32) -> Self::Ints;

    /// All lanes equal to 0.
    fn no_floats(self) -> Self::Floats;
    /// Sixteen scales of f16.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn half_scales(self, scales: *const f16) -> Self::Floats;
    /// Half of what sixteen scales of MXFP4 stand for.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn power_scales(self, scales: *const u8) -> Self::Floats;
    /// `acc + (sums · x_scale) · scales`: one product is rounded, then the rest once where the
    /// instruction set can.
    fn add_scaled(
        self,
        acc: Self::Floats,
        sums: Self::Ints,
        x_scale: f32,
        scales: Self::Floats,
    ) -> Self::Floats;
    /// `sums · (x_scale · scales)`.
    ///
    /// # Safety
    /// Sixteen scales must be readable.
    unsafe fn scaled(self, sums: Self::Ints, x_scale: f32, scales: *const f32) -> Self::Floats;
    /// The lanes.
    fn lanes(self, floats: Self::Floats) -> [f32; BLOCK_ROWS];
}

/// A computation on [`ByteSimd`]; run by `Isa::run_bytes`.
pub trait ByteKernel {
    /// Computes; must be `#[inline(always)]`.
    fn run<S: ByteSimd>(self, simd: S);
}

impl ByteSimd for Scalar {
    type Base = Scalar;
    type Ints = [i32; BLOCK_ROWS];
    type Floats = [f32; BLOCK_ROWS];
    const MAX_ROWS: usize = 1;
    const MAX_GROUP_ROWS: usize = 1;
    const BYTES_OFFSET: i32 = 0;

    #[inline(always)]
    fn base(self) -> Scalar {
        self
    }
    #[inline(always)]
    fn ints(self, x: i32) -> Self::Ints {
        [x; BLOCK_ROWS]
    }
    #[inline(always)]
    fn add_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn add_bytes<const R: usize>(
        self,
        sums: &mut [Self::Ints; R],
        line: *const u8,
        x: [*const i8; R],
    ) {
        // SAFETY: the caller's contract.
        let line = unsafe { &*line.cast::<[[i8; WORD_BYTES]; BLOCK_ROWS]>() };
        for (sums, x) in sums.iter_mut().zip(x) {
            // SAFETY: as above.
            add_words(sums, line, unsafe { &*x.cast() });
        }
    }
    #[inline(always)]
    unsafe fn add_folded<C: FoldedCodes, const R: usize>(
        self,
        sums: &mut [[Self::Ints; 2]; R],
        line: *const u8,
        x: [*const i8; R],
        high: usize,
    ) {
        // SAFETY: the caller's contract.
        let folded = unsafe { &*line.cast::<[u8; LINE_BYTES]>() };
        let half = |shift: u8| {
            let value = |code: u8| C::VALUES.map_or(code, |values| values[usize::from(code)]);
            let code = |i: usize| value(folded[i] >> shift & 15) as i8;
            std::array::from_fn(|n| std::array::from_fn(|j| code(n * WORD_BYTES + j)))
        };
        let lines = [half(0), half(4)];
        for (sums, x) in sums.iter_mut().zip(x) {
            for (i, (sums, line)) in sums.iter_mut().zip(&lines).enumerate() {
                // SAFETY: as above.
                add_words(sums, line, unsafe { &*x.add(i * high).cast() });
            }
        }
    }
    #[inline(always)]
    unsafe fn sub_zeros(self, sums: Self::Ints, zeros: *const u8, factor: i32) -> Self::Ints {
        // SAFETY: the caller's contract.
        let zeros = unsafe { &*zeros.cast::<[u8; BLOCK_ROWS]>() };
        std::array::from_fn(|i| sums[i] - i32::from(zeros[i]) * factor)
    }
    #[inline(always)]
    fn no_floats(self) -> Self::Floats {
        [0.0; BLOCK_ROWS]
    }
    #[inline(always)]
    unsafe fn half_scales(self, scales: *const f16) -> Self::Floats {
        // SAFETY: the caller's contract.
        unsafe { &*scales.cast::<[f16; BLOCK_ROWS]>() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn power_scales(self, scales: *const u8) -> Self::Floats {
        // SAFETY: the caller's contract.
        unsafe { &*scales.cast::<[u8; BLOCK_ROWS]>() }.map(mxfp4::half_scale)
    }
    #[inline(always)]
    fn add_scaled(
        self,
        acc: Self::Floats,
        sums: Self::Ints,
        x_scale: f32,
        scales: Self::Floats,
    ) -> Self::Floats {
        std::array::from_fn(|i| acc[i] + sums[i] as f32 * x_scale * scales[i])
    }
    #[inline(always)]
    unsafe fn scaled(self, sums: Self::Ints, x_scale: f32, scales: *const f32) -> Self::Floats {
        // SAFETY: the caller's contract.
        let scales = unsafe { &*scales.cast::<[f32; BLOCK_ROWS]>() };
        std::array::from_fn(|i| sums[i] as f32 * (x_scale * scales[i]))
    }
    #[inline(always)]
    fn lanes(self, floats: Self::Floats) -> [f32; BLOCK_ROWS] {
        floats
    }
}

#[inline(always)]
fn add_words(
    sums: &mut [i32; BLOCK_ROWS],
    line: &[[i8; WORD_BYTES]; BLOCK_ROWS],
    x: &[i8; WORD_BYTES],
) {
    for (sum, word) in sums.iter_mut().zip(line) {
        for (&code, &x) in word.iter().zip(x) {
            *sum += i32::from(code) * i32::from(x);
        }
    }
}
