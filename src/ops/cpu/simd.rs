//! The small vocabulary of vector operations that every CPU kernel is written in.
//!
//! A [`Simd`] value is a proof that this machine has the instructions: tokens are only made by
//! detection (`isa`). A [`Kernel`] is written once, generic over the token, and compiled once
//! per instruction set. Everything here must inline into the function that enables the
//! instructions, hence `#[inline(always)]` throughout.

use half::{bf16, f16};

use crate::tensor::{Element, Fp8};

/// The widest vector of any instruction set, in f32 lanes.
pub const MAX_LANES: usize = 16;

/// Vectors of `LANES` f32 and what can be done with them.
pub trait Simd: Copy + Send + Sync + 'static {
    /// One vector register.
    type V: Copy;
    /// Elements of a vector; divides [`MAX_LANES`].
    const LANES: usize;
    /// Most rows of a matmul register tile of four columns without spilling.
    const TILE_ROWS: usize;

    /// All lanes equal to `x`.
    fn splat(self, x: f32) -> Self::V;
    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `1 / x` within 2 ulp, for normal `x`.
    #[inline(always)]
    fn recip(self, x: Self::V) -> Self::V {
        self.div(self.splat(1.0), x)
    }
    /// The larger; `b` where `a` is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where `a` is NaN.
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        let zero = self.splat(0.0);
        self.sub(zero, self.max(self.sub(zero, a), self.sub(zero, b)))
    }
    /// `a * b + c`, rounded once where the instruction set can.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `2^n` for integral `n` in `-126..=127`.
    fn pow2(self, n: Self::V) -> Self::V;
    /// `y · 2^n`, for the same `n`.
    #[inline(always)]
    fn scale_by_pow2(self, y: Self::V, n: Self::V) -> Self::V {
        self.mul(y, self.pow2(n))
    }
    /// `y` where `x >= bound`, else 0.
    fn keep_where_at_least(self, y: Self::V, x: Self::V, bound: Self::V) -> Self::V;
    /// Bit `i` is set where `a[i] >= b[i]`.
    fn at_least(self, a: Self::V, b: Self::V) -> u32;
    /// The sums of the lanes of four vectors; each sum has one fixed order.
    fn sum4(self, vectors: [Self::V; 4]) -> [f32; 4];
    /// The largest lane.
    fn max_lane(self, v: Self::V) -> f32;

    /// The sum of the lanes, in the order of [`Simd::sum4`].
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        self.sum4([v; 4])[0]
    }

    /// Asks for the cache line at `address`, which may be anything.
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        let _ = address;
    }

    /// Reads `LANES` elements.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_f32(self, from: *const f32) -> Self::V;
    /// Reads and widens `LANES` elements.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V;
    /// Reads and widens `LANES` elements.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_f16(self, from: *const f16) -> Self::V;
    /// Reads and widens `LANES` signed bytes.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_i8(self, from: *const i8) -> Self::V;
    /// Reads and widens `LANES` FP8 E4M3 numbers.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_e4m3(self, from: *const u8) -> Self::V;
    /// Reads `LANES` words of four signed bytes: byte `i` of every word, widened, is result `i`.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_i8_words(self, from: *const u8) -> [Self::V; 4];
    /// As [`Simd::load_i8_words`] for FP8 E4M3 numbers, all of them 2⁸ times too small.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_e4m3_words(self, from: *const u8) -> [Self::V; 4];
    /// Reads `LANES` words of two bf16: number `i` of every word, widened, is result `i`.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_bf16_words(self, from: *const u8) -> [Self::V; 2];
    /// Rounds to nearest even and writes `LANES` signed bytes; lanes are below 128 in magnitude.
    ///
    /// # Safety
    /// They must be writable.
    unsafe fn store_i8(self, to: *mut i8, v: Self::V);
    /// Writes `LANES` elements.
    ///
    /// # Safety
    /// They must be writable.
    unsafe fn store_f32(self, to: *mut f32, v: Self::V);
    /// Writes `LANES` elements past the caches, where the machine can: they are read only much
    /// later.
    ///
    /// # Safety
    /// They must be writable and aligned to a vector.
    #[inline(always)]
    unsafe fn stream_f32(self, to: *mut f32, v: Self::V) {
        // SAFETY: the same contract.
        unsafe { self.store_f32(to, v) }
    }
    /// Rounds to nearest even and writes `LANES` elements.
    ///
    /// # Safety
    /// They must be writable.
    unsafe fn store_bf16(self, to: *mut bf16, v: Self::V);
    /// Rounds to nearest even and writes `LANES` elements.
    ///
    /// # Safety
    /// They must be writable.
    unsafe fn store_f16(self, to: *mut f16, v: Self::V);
    /// Transposes a square of `LANES` × `LANES` elements; strides count elements.
    ///
    /// # Safety
    /// `LANES` rows of `LANES` elements must be readable at `from` and writable at `to`.
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);
}

/// A computation written once for every instruction set; run by `Isa::run`.
pub trait Kernel {
    /// What it returns.
    type Output;
    /// Computes; must be `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Element types that kernels read.
pub trait Lanes: Element + Default + Send + Sync {
    /// Reads and widens `S::LANES` elements.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_lanes<S: Simd>(simd: S, from: *const Self) -> S::V;
}

/// Element types that kernels read and write.
pub trait Float: Lanes {
    /// Rounds and writes `S::LANES` elements.
    ///
    /// # Safety
    /// They must be writable.
    unsafe fn store_lanes<S: Simd>(simd: S, to: *mut Self, v: S::V);
}

macro_rules! lanes {
    ($type:ty, $load:ident) => {
        impl Lanes for $type {
            #[inline(always)]
            unsafe fn load_lanes<S: Simd>(simd: S, from: *const Self) -> S::V {
                // SAFETY: the same contract.
                unsafe { simd.$load(from.cast()) }
            }
        }
    };
}

macro_rules! float {
    ($type:ty, $load:ident, $store:ident) => {
        lanes!($type, $load);
        impl Float for $type {
            #[inline(always)]
            unsafe fn store_lanes<S: Simd>(simd: S, to: *mut Self, v: S::V) {
                // SAFETY: the same contract.
                unsafe { simd.$store(to, v) }
            }
        }
    };
}

float!(f32, load_f32, store_f32);
float!(bf16, load_bf16, store_bf16);
float!(f16, load_f16, store_f16);
lanes!(i8, load_i8);
lanes!(Fp8, load_e4m3);

/// Reads up to `S::LANES` elements of `values` from index `at` on; lanes beyond its end are 0.
#[inline(always)]
pub fn load<S: Simd, E: Lanes>(simd: S, values: &[E], at: usize) -> S::V {
    if at + S::LANES <= values.len() {
        // SAFETY: just checked.
        return unsafe { E::load_lanes(simd, values.as_ptr().add(at)) };
    }
    let mut lanes = [E::default(); MAX_LANES];
    let rest = &values[at..];
    lanes[..rest.len()].copy_from_slice(rest);
    // SAFETY: `lanes` has at least `S::LANES` elements.
    unsafe { E::load_lanes(simd, lanes.as_ptr()) }
}

/// Writes up to `S::LANES` elements of `values` from index `at` on; lanes beyond its end are
/// dropped.
#[inline(always)]
pub fn store<S: Simd, E: Float>(simd: S, values: &mut [E], at: usize, v: S::V) {
    if at + S::LANES <= values.len() {
        // SAFETY: just checked.
        return unsafe { E::store_lanes(simd, values.as_mut_ptr().add(at), v) };
    }
    let mut lanes = [E::default(); MAX_LANES];
    // SAFETY: `lanes` has at least `S::LANES` elements.
    unsafe { E::store_lanes(simd, lanes.as_mut_ptr(), v) };
    let rest = &mut values[at..];
    rest.copy_from_slice(&lanes[..rest.len()]);
}

/// The largest magnitude, 0 of none.
#[inline(always)]
pub fn largest_magnitude<S: Simd>(simd: S, values: &[f32]) -> f32 {
    let zero = simd.splat(0.0);
    let mut largest = zero;
    for at in (0..values.len()).step_by(S::LANES) {
        let x = load(simd, values, at);
        largest = simd.max(simd.max(x, simd.sub(zero, x)), largest);
    }
    simd.max_lane(largest)
}

/// `e^x` within 2 ulp; exactly 0 below -87.3 (the last normal result), finite above 88.3,
/// exactly 1 at 0. Cody-Waite reduction and the polynomial of Cephes' `expf`.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    const ROUNDER: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer
    let least = simd.splat(-87.336_54);
    let clamped = simd.min(simd.max(x, least), simd.splat(88.376_26));
    let shifted = simd.mul_add(clamped, simd.splat(std::f32::consts::LOG2_E), simd.splat(ROUNDER));
    let n = simd.sub(shifted, simd.splat(ROUNDER));
    let r = simd.mul_add(n, simd.splat(-0.693_359_4), clamped);
    let r = simd.mul_add(n, simd.splat(2.121_944_4e-4), r);
    let mut p = simd.splat(1.987_569_1e-4);
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1] {
        p = simd.mul_add(p, r, simd.splat(c));
    }
    let y = simd.add(simd.mul_add(p, simd.mul(r, r), r), simd.splat(1.0));
    simd.keep_where_at_least(simd.scale_by_pow2(y, n), x, least)
}

/// `tanh(x)` within 4 ulp; ±1 beyond ±7.9. The rational function of Eigen's `ptanh`: odd over
/// even polynomial, exact in relative terms near 0.
#[inline(always)]
pub fn tanh<S: Simd>(simd: S, x: S::V) -> S::V {
    let bound = simd.splat(7.905_311);
    let zero = simd.splat(0.0);
    let x = simd.min(simd.max(x, simd.sub(zero, bound)), bound);
    let square = simd.mul(x, x);
    let mut p = simd.splat(-2.760_768_5e-16);
    for c in [
        2.000_188e-13,
        -8.604_672e-11,
        5.122_297_3e-8,
        1.485_722_4e-5,
        6.372_619_5e-4,
        4.893_524_6e-3,
    ] {
        p = simd.mul_add(p, square, simd.splat(c));
    }
    let mut q = simd.splat(1.198_258_4e-6);
    for c in [1.185_347_1e-4, 2.268_434_6e-3, 4.893_525e-3] {
        q = simd.mul_add(q, square, simd.splat(c));
    }
    simd.div(simd.mul(x, p), q)
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;

    struct Tanh<'a>(&'a mut [f32]);

    impl Kernel for Tanh<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for at in (0..self.0.len()).step_by(S::LANES) {
                let y = tanh(simd, load(simd, self.0, at));
                store(simd, self.0, at, y);
            }
        }
    }

    #[test]
    fn tanh_is_right_to_a_few_units_in_the_last_place() {
        let tiny = (0..40).map(|i| 2f32.powi(-i));
        let inputs: Vec<f32> =
            (0..20_000).map(|i| i as f32 * 5e-4).chain(tiny).flat_map(|x| [x, -x]).collect();
        for isa in Isa::supported() {
            let mut outputs = inputs.clone();
            isa.run(Tanh(&mut outputs));
            for (&x, y) in inputs.iter().zip(outputs) {
                let exact = f64::from(x).tanh();
                let error = (f64::from(y) - exact).abs();
                assert!(error <= 5e-7 * exact.abs(), "{} tanh({x}) = {y}", isa.name());
            }
        }
    }
}
