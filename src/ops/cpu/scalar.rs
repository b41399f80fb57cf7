//! Portable vectors: eight f32 in an array, left to the compiler to vectorise.

use half::{bf16, f16};

use super::simd::Simd;
use crate::formats::fp8;

const LANES: usize = 8;

/// Needs nothing beyond the baseline of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scalar;

/// The f16 with the bits of an E4M3 number: 2⁸ times smaller.
#[inline(always)]
fn e4m3_as_f16(code: u8) -> f16 {
    f16::from_bits(u16::from(code & 0x7f) << 7 | u16::from(code & 0x80) << 8)
}

#[inline(always)]
fn zip(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type V = [f32; LANES];
    const LANES: usize = LANES;
    const TILE_ROWS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn keep_where_at_least(self, y: Self::V, x: Self::V, bound: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] >= bound[i] { y[i] } else { 0.0 })
    }
    #[inline(always)]
    fn at_least(self, a: Self::V, b: Self::V) -> u32 {
        (0..LANES).fold(0, |mask, i| mask | u32::from(a[i] >= b[i]) << i)
    }
    #[inline(always)]
    fn sum4(self, vectors: [Self::V; 4]) -> [f32; 4] {
        vectors.map(|v| ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])))
    }
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> Self::V {
        // SAFETY: the caller's contract; an array of f32 has the alignment of f32.
        unsafe { *from.cast::<Self::V>() }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller's contract.
        unsafe { *from.cast::<[bf16; LANES]>() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::V {
        // SAFETY: the caller's contract.
        unsafe { *from.cast::<[f16; LANES]>() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::V {
        // SAFETY: the caller's contract.
        unsafe { *from.cast::<[i8; LANES]>() }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V {
        // SAFETY: the caller's contract.
        unsafe { *from.cast::<[u8; LANES]>() }.map(fp8::decode)
    }
    #[inline(always)]
    unsafe fn load_i8_words(self, from: *const u8) -> [Self::V; 4] {
        // SAFETY: the caller's contract.
        let words = unsafe { &*from.cast::<[[i8; 4]; LANES]>() };
        std::array::from_fn(|i| words.map(|word| f32::from(word[i])))
    }
    #[inline(always)]
    unsafe fn load_e4m3_words(self, from: *const u8) -> [Self::V; 4] {
        // SAFETY: the caller's contract.
        let words = unsafe { &*from.cast::<[[u8; 4]; LANES]>() };
        std::array::from_fn(|i| words.map(|word| e4m3_as_f16(word[i]).to_f32()))
    }
    #[inline(always)]
    unsafe fn load_bf16_words(self, from: *const u8) -> [Self::V; 2] {
        // SAFETY: the caller's contract; words may lie anywhere.
        let words = unsafe { from.cast::<[[bf16; 2]; LANES]>().read_unaligned() };
        std::array::from_fn(|i| words.map(|word| word[i].to_f32()))
    }
    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32, v: Self::V) {
        // SAFETY: the caller's contract.
        unsafe { *to.cast::<Self::V>() = v }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: Self::V) {
        // SAFETY: the caller's contract.
        unsafe { *to.cast::<[i8; LANES]>() = v.map(|x| x.round_ties_even() as i8) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: Self::V) {
        // SAFETY: the caller's contract.
        unsafe { *to.cast::<[bf16; LANES]>() = v.map(bf16::from_f32) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, v: Self::V) {
        // SAFETY: the caller's contract.
        unsafe { *to.cast::<[f16; LANES]>() = v.map(f16::from_f32) }
    }
    #[inline(always)]
    unsafe fn transpose(
        self,
        from: *const f32,
        from_stride: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        for row in 0..LANES {
            for col in 0..LANES {
                // SAFETY: inside the square of the caller's contract.
                unsafe { *to.add(col * to_stride + row) = *from.add(row * from_stride + col) }
            }
        }
    }
}
