//! Words of weights in blocks, widened to what activations are multiplied by.
//!
//! A line holds one word of sixteen rows: four codes or two bf16. Widening it yields as many
//! lines of units, four bytes for each row: an f32, or two bf16 that follow each other. A unit
//! goes with four bytes of a row of activations, so that one kernel serves both.

use super::simd::Simd;

/// Elements of a row of weights whose products are summed before they are scaled: what divides
/// every group, and two blocks of which fit the first-level cache in f32.
pub const SLICE: usize = 128;
/// Rows for which words are widened in registers at once: their sums and a line fit them.
pub const STREAMED_ROWS: usize = 4;

/// Products of units.
pub trait Products: Copy + Send + Sync + 'static {
    /// Vectors of sums.
    type Sums: Simd;
    /// As many units as a vector of sums has lanes.
    type Units: Copy;
    /// Elements of a unit.
    const UNIT: usize;

    /// Vectors of sums.
    fn sums(self) -> Self::Sums;
    /// Reads units.
    ///
    /// # Safety
    /// A vector must be readable.
    unsafe fn load(self, from: *const u8) -> Self::Units;
    /// Writes units.
    ///
    /// # Safety
    /// A vector must be writable.
    unsafe fn store(self, to: *mut u8, units: Self::Units);
    /// Adds the products of all units with the unit at `x`.
    ///
    /// # Safety
    /// Four bytes must be readable.
    unsafe fn add_products(
        self,
        sums: <Self::Sums as Simd>::V,
        units: Self::Units,
        x: *const u8,
    ) -> <Self::Sums as Simd>::V;
}

/// What the words of a matrix hold, and how they become units.
pub trait Words<P: Products>: Copy + Send + Sync + 'static {
    /// Units of a word.
    const UNITS: usize;
    /// What units must be multiplied by.
    const SCALE: f32;
    /// Up to this many rows, words are widened anew for every few rows.
    const MOST_STREAMED_ROWS: usize = STREAMED_ROWS;

    /// Reads and widens a vector of words; the first [`Words::UNITS`] results are theirs.
    ///
    /// # Safety
    /// A vector must be readable.
    unsafe fn widen(products: P, from: *const u8) -> [P::Units; 4];
}

/// Signed bytes.
#[derive(Clone, Copy)]
pub struct Bytes;
/// FP8 E4M3.
#[derive(Clone, Copy)]
pub struct E4m3;
/// bf16.
#[derive(Clone, Copy)]
pub struct Pairs;

/// Units of f32.
#[derive(Clone, Copy)]
pub struct Floats<S>(pub S);

impl<S: Simd> Products for Floats<S> {
    type Sums = S;
    type Units = S::V;
    const UNIT: usize = 1;

    #[inline(always)]
    fn sums(self) -> S {
        self.0
    }
    #[inline(always)]
    unsafe fn load(self, from: *const u8) -> S::V {
        // SAFETY: the same contract.
        unsafe { self.0.load_f32(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut u8, units: S::V) {
        // SAFETY: the same contract.
        unsafe { self.0.store_f32(to.cast(), units) }
    }
    #[inline(always)]
    unsafe fn add_products(self, sums: S::V, units: S::V, x: *const u8) -> S::V {
        // SAFETY: the same contract.
        let x = unsafe { x.cast::<f32>().read_unaligned() };
        self.0.mul_add(units, self.0.splat(x), sums)
    }
}

/// Words that every machine widens to f32.
pub trait FloatWords: Copy + Send + Sync + 'static {
    /// Numbers of a word.
    const UNITS: usize = 4;
    /// What they must be multiplied by.
    const SCALE: f32;
    /// As for [`Words`].
    const MOST_STREAMED_ROWS: usize = STREAMED_ROWS;

    /// Number `i` of `S::LANES` words is result `i`; those that words do not have are anything.
    ///
    /// # Safety
    /// The words must be readable.
    unsafe fn floats<S: Simd>(simd: S, from: *const u8) -> [S::V; 4];
}

impl FloatWords for Bytes {
    const SCALE: f32 = 1.0;

    #[inline(always)]
    unsafe fn floats<S: Simd>(simd: S, from: *const u8) -> [S::V; 4] {
        // SAFETY: the same contract.
        unsafe { simd.load_i8_words(from) }
    }
}

impl FloatWords for E4m3 {
    const SCALE: f32 = 256.0;

    #[inline(always)]
    unsafe fn floats<S: Simd>(simd: S, from: *const u8) -> [S::V; 4] {
        // SAFETY: the same contract.
        unsafe { simd.load_e4m3_words(from) }
    }
}

impl FloatWords for Pairs {
    const UNITS: usize = 2;
    const SCALE: f32 = 1.0;
    // A shift and a mask take less than to leave what they yield in memory and to read it again.
    const MOST_STREAMED_ROWS: usize = 3 * STREAMED_ROWS;

    #[inline(always)]
    unsafe fn floats<S: Simd>(simd: S, from: *const u8) -> [S::V; 4] {
        // SAFETY: the same contract.
        let [first, second] = unsafe { simd.load_bf16_words(from) };
        [first, second, first, second]
    }
}

impl<S: Simd, W: FloatWords> Words<Floats<S>> for W {
    const UNITS: usize = <W as FloatWords>::UNITS;
    const MOST_STREAMED_ROWS: usize = <W as FloatWords>::MOST_STREAMED_ROWS;
    const SCALE: f32 = <W as FloatWords>::SCALE;

    #[inline(always)]
    unsafe fn widen(products: Floats<S>, from: *const u8) -> [S::V; 4] {
        // SAFETY: the same contract.
        unsafe { W::floats(products.0, from) }
    }
}
