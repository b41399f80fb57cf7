//! AVX-512 BF16: products of pairs of bf16 with f32 sums, and codes widened to such pairs.
//!
//! `vdpbf16ps` rounds each of the two products of a pair into the sum in turn, subnormals being
//! 0. Codes become bf16 through two tables of 128 bytes, the upper and the lower halves of the
//! number that a magnitude stands for (VBMI); the sign is moved over.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::avx512::Avx512;
use super::wide_simd::{Bytes, E4m3, Pairs, Products, Words};

/// Proof that the machine has AVX-512 with BF16, VBMI and VNNI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512Bf16(Avx512);

impl Avx512Bf16 {
    /// The token, on a machine that has the instructions.
    pub fn detect() -> Option<Avx512Bf16> {
        let vectors = Avx512::detect()?;
        let found = is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vnni");
        found.then_some(Avx512Bf16(vectors))
    }

    /// The vectors of f32 beside it.
    #[inline(always)]
    pub fn vectors(self) -> Avx512 {
        self.0
    }

    /// Runs a kernel compiled for these instructions.
    pub fn run<K: PairKernel>(self, kernel: K) {
        // SAFETY: the token proves that the instructions exist.
        unsafe { enter(self, kernel) }
    }
}

/// A computation on pairs of bf16.
pub trait PairKernel {
    /// Computes; must be `#[inline(always)]`.
    fn run(self, products: Avx512Bf16);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
#[target_feature(enable = "avx2,fma,f16c")]
fn enter<K: PairKernel>(products: Avx512Bf16, kernel: K) {
    kernel.run(products);
}

impl Products for Avx512Bf16 {
    type Sums = Avx512;
    type Units = __m512i;
    const UNIT: usize = 2;

    #[inline(always)]
    fn sums(self) -> Avx512 {
        self.0
    }
    #[inline(always)]
    unsafe fn load(self, from: *const u8) -> __m512i {
        // SAFETY: `self` proves that the instructions exist; the caller vouches for the memory.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut u8, units: __m512i) {
        // SAFETY: see `load`.
        unsafe { _mm512_storeu_si512(to.cast(), units) }
    }
    #[inline(always)]
    unsafe fn add_products(self, sums: __m512, units: __m512i, x: *const u8) -> __m512 {
        // SAFETY: see `load`; vectors of the same size, all of whose bits are valid.
        unsafe {
            let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
            let x = transmute::<__m512i, __m512bh>(x);
            _mm512_dpbf16_ps(sums, transmute::<__m512i, __m512bh>(units), x)
        }
    }
}

impl Words<Avx512Bf16> for Pairs {
    const UNITS: usize = 1;
    const SCALE: f32 = 1.0;

    #[inline(always)]
    unsafe fn widen(products: Avx512Bf16, from: *const u8) -> [__m512i; 4] {
        // SAFETY: the same contract.
        [unsafe { products.load(from) }; 4]
    }
}

impl Words<Avx512Bf16> for E4m3 {
    const UNITS: usize = 2;
    const SCALE: f32 = 1.0;

    #[inline(always)]
    unsafe fn widen(_: Avx512Bf16, from: *const u8) -> [__m512i; 4] {
        // SAFETY: the token proves that the instructions exist; the caller vouches for the line.
        unsafe {
            let codes = load_ordered(from);
            pairs_of(codes, codes, &E4M3)
        }
    }
}

impl Words<Avx512Bf16> for Bytes {
    const UNITS: usize = 2;
    const SCALE: f32 = 1.0;

    #[inline(always)]
    unsafe fn widen(_: Avx512Bf16, from: *const u8) -> [__m512i; 4] {
        // SAFETY: the token proves that the instructions exist; the caller vouches for the line.
        unsafe {
            let codes = load_ordered(from);
            pairs_of(codes, _mm512_abs_epi8(codes), &BYTES)
        }
    }
}

/// The two bytes of the bf16 of every magnitude.
#[repr(C, align(64))]
struct Halves {
    upper: [u8; 128],
    lower: [u8; 128],
}

static E4M3: Halves = Halves::of(true);
static BYTES: Halves = Halves::of(false);

impl Halves {
    const fn of(is_e4m3: bool) -> Halves {
        let mut halves = Halves { upper: [0; 128], lower: [0; 128] };
        let mut code = 1;
        while code < 128 {
            let bits = match code {
                // The exponent's bias grows from 7 to 127.
                8.. if is_e4m3 => (code << 4) + (120 << 7),
                _ if is_e4m3 => integer_times(code, -9),
                _ => integer_times(code, 0),
            };
            [halves.lower[code as usize], halves.upper[code as usize]] = bits.to_le_bytes();
            code += 1;
        }
        halves
    }
}

/// The bits of the bf16 `integer · 2^exponent`, for integers from 1 to 255.
const fn integer_times(integer: u16, exponent: i32) -> u16 {
    let leading = integer.ilog2();
    let biased = (127 + exponent + leading as i32) as u16;
    biased << 7 | (integer << (7 - leading) & 0x7f)
}

/// A line whose words have codes 1 and 2 exchanged: codes 0 and 1 are their even bytes then.
///
/// # Safety
/// A line must be readable, and the machine must have AVX-512 BW.
#[inline(always)]
unsafe fn load_ordered(line: *const u8) -> __m512i {
    // SAFETY: the same contract.
    unsafe {
        let order = _mm512_set4_epi32(0x0f0d_0e0c, 0x0b09_0a08, 0x0705_0604, 0x0301_0200);
        _mm512_shuffle_epi8(_mm512_loadu_si512(line.cast()), order)
    }
}

/// Codes 0 and 1 of every word as a pair, and codes 2 and 3, from an ordered line and the
/// magnitudes of its codes.
///
/// # Safety
/// The machine must have AVX-512 BW and VBMI.
#[inline(always)]
unsafe fn pairs_of(codes: __m512i, magnitudes: __m512i, halves: &Halves) -> [__m512i; 4] {
    // SAFETY: the same contract.
    unsafe {
        let upper = look_up(&halves.upper, magnitudes);
        let lower = look_up(&halves.lower, magnitudes);
        // `upper | (codes & 0x80)`.
        let upper = _mm512_ternarylogic_epi32::<0xf8>(upper, codes, _mm512_set1_epi8(i8::MIN));
        // Bits of the second where the mask is set, of the third elsewhere.
        let mask = _mm512_set1_epi16(0x00ff);
        let even = _mm512_ternarylogic_epi32::<0xca>(mask, lower, _mm512_slli_epi16::<8>(upper));
        let odd = _mm512_ternarylogic_epi32::<0xca>(mask, _mm512_srli_epi16::<8>(lower), upper);
        [even, odd, even, odd]
    }
}

/// The entries of a table at the lower seven bits of every byte.
///
/// # Safety
/// The machine must have AVX-512 VBMI.
#[inline(always)]
unsafe fn look_up(table: &[u8; 128], at: __m512i) -> __m512i {
    // SAFETY: the same contract; a table has two vectors.
    unsafe {
        let first = _mm512_loadu_si512(table.as_ptr().cast());
        let second = _mm512_loadu_si512(table.as_ptr().add(64).cast());
        _mm512_permutex2var_epi8(first, at, second)
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::formats::fp8;

    #[test]
    fn tables_hold_every_magnitude() {
        for code in 0..128u8 {
            let entry = |halves: &Halves| {
                let at = usize::from(code);
                bf16::from_le_bytes([halves.lower[at], halves.upper[at]]).to_f32()
            };
            assert_eq!(entry(&E4M3), fp8::decode(code));
            assert_eq!(entry(&BYTES), f32::from(code));
        }
    }
}
