//! [`ByteSimd`] on AVX2 and AVX-512, with VNNI and without.
//!
//! The instructions multiply unsigned by signed bytes. VNNI adds 128 to signed weights, which the
//! caller takes off again; the others give the weights' signs to the activations.

use std::arch::x86_64::*;

use half::f16;

use super::avx2::{Avx2, AvxVnni};
use super::avx512::{Avx512, Vnni};
use super::byte_simd::{ByteSimd, FoldedCodes};
use crate::formats::blocks::BLOCK_ROWS;

/// Bytes from what is read to what is asked for: a block is one run of memory, and two pages
/// ahead hide its latency at a core's whole bandwidth.
const AHEAD: usize = 8192;

/// Bits of 2^-127, the least power of two that a scale of MXFP4 stands for: it has no exponent of
/// its own in an f32.
const LEAST_POWER: i32 = 1 << 22;

/// Asks for the line that will be needed soon.
#[inline(always)]
fn prefetch(line: *const u8) {
    // SAFETY: a prefetch never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD).cast()) }
}

/// Both halves of sixteen lanes. Not a closure: those are not always inlined where there are many
/// of them, and without the instructions of its caller every intrinsic is a call.
macro_rules! halves {
    (|$half:ident| $value:expr) => {
        [
            {
                let $half = 0;
                $value
            },
            {
                let $half = 1;
                $value
            },
        ]
    };
}

/// Methods that AVX-512 and VNNI share.
macro_rules! sixteen_lanes {
    () => {
        #[inline(always)]
        fn ints(self, x: i32) -> __m512i {
            // SAFETY: `self` proves that the instructions exist; so for all functions below.
            unsafe { _mm512_set1_epi32(x) }
        }
        #[inline(always)]
        fn add_ints(self, a: __m512i, b: __m512i) -> __m512i {
            // SAFETY: see `ints`.
            unsafe { _mm512_add_epi32(a, b) }
        }
        #[inline(always)]
        unsafe fn sub_zeros(self, sums: __m512i, zeros: *const u8, factor: i32) -> __m512i {
            // SAFETY: see `ints`; the caller vouches for the bytes.
            unsafe {
                let zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(zeros.cast()));
                // Sums of codes of a group fit 16 bits, and the upper halves of zero points are 0.
                _mm512_sub_epi32(sums, _mm512_madd_epi16(zeros, _mm512_set1_epi32(factor)))
            }
        }
        #[inline(always)]
        fn no_floats(self) -> __m512 {
            // SAFETY: see `ints`.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn half_scales(self, scales: *const f16) -> __m512 {
            // SAFETY: see `ints`; the caller vouches for the scales.
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(scales.cast())) }
        }
        #[inline(always)]
        unsafe fn power_scales(self, scales: *const u8) -> __m512 {
            // SAFETY: see `ints`; the caller vouches for the scales.
            unsafe {
                let scales = _mm512_cvtepu8_epi32(_mm_loadu_si128(scales.cast()));
                let least = _mm512_set1_epi32(LEAST_POWER);
                let bits = _mm512_max_epi32(_mm512_slli_epi32::<23>(scales), least);
                _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0.5))
            }
        }
        #[inline(always)]
        fn add_scaled(self, acc: __m512, sums: __m512i, x_scale: f32, scales: __m512) -> __m512 {
            // SAFETY: see `ints`.
            unsafe {
                let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(x_scale));
                _mm512_fmadd_ps(sums, scales, acc)
            }
        }
        #[inline(always)]
        unsafe fn scaled(self, sums: __m512i, x_scale: f32, scales: *const f32) -> __m512 {
            // SAFETY: see `ints`; the caller vouches for the scales.
            unsafe {
                let scales = _mm512_mul_ps(_mm512_set1_ps(x_scale), _mm512_loadu_ps(scales));
                _mm512_mul_ps(_mm512_cvtepi32_ps(sums), scales)
            }
        }
        #[inline(always)]
        fn lanes(self, floats: __m512) -> [f32; BLOCK_ROWS] {
            // SAFETY: both are sixteen f32.
            unsafe { std::mem::transmute(floats) }
        }
    };
}

impl ByteSimd for Vnni {
    type Base = Avx512;
    type Ints = __m512i;
    type Floats = __m512;
    const MAX_ROWS: usize = 16;
    const MAX_GROUP_ROWS: usize = 8;
    const BYTES_OFFSET: i32 = 128;

    sixteen_lanes!();

    #[inline(always)]
    fn base(self) -> Avx512 {
        self.vectors()
    }
    #[inline(always)]
    unsafe fn add_bytes<const R: usize>(
        self,
        sums: &mut [__m512i; R],
        line: *const u8,
        x: [*const i8; R],
    ) {
        prefetch(line);
        // SAFETY: `self` proves that the instructions exist; the caller vouches for the bytes.
        unsafe {
            let codes = _mm512_loadu_si512(line.cast());
            let codes = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm512_dpbusd_epi32(*sum, codes, broadcast(x));
            }
        }
    }
    #[inline(always)]
    unsafe fn add_folded<C: FoldedCodes, const R: usize>(
        self,
        sums: &mut [[__m512i; 2]; R],
        line: *const u8,
        x: [*const i8; R],
        high: usize,
    ) {
        prefetch(line);
        // SAFETY: as above.
        unsafe {
            let [first, second] = unfold::<C>(line);
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[0] = _mm512_dpbusd_epi32(sums[0], first, broadcast(x));
                sums[1] = _mm512_dpbusd_epi32(sums[1], second, broadcast(x.add(high)));
            }
        }
    }
}

impl ByteSimd for Avx512 {
    type Base = Avx512;
    type Ints = __m512i;
    type Floats = __m512;
    const MAX_ROWS: usize = 8;
    const MAX_GROUP_ROWS: usize = 8;
    const BYTES_OFFSET: i32 = 0;

    sixteen_lanes!();

    #[inline(always)]
    fn base(self) -> Avx512 {
        self
    }
    #[inline(always)]
    unsafe fn add_bytes<const R: usize>(
        self,
        sums: &mut [__m512i; R],
        line: *const u8,
        x: [*const i8; R],
    ) {
        prefetch(line);
        // SAFETY: as for VNNI; two products of codes up to 127 fit 16 bits.
        unsafe {
            let codes = _mm512_loadu_si512(line.cast());
            let (magnitudes, negative) = (_mm512_abs_epi8(codes), _mm512_movepi8_mask(codes));
            for (sum, x) in sums.iter_mut().zip(x) {
                let x = broadcast(x);
                let x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
                *sum = add_pairs(*sum, _mm512_maddubs_epi16(magnitudes, x));
            }
        }
    }
    #[inline(always)]
    unsafe fn add_folded<C: FoldedCodes, const R: usize>(
        self,
        sums: &mut [[__m512i; 2]; R],
        line: *const u8,
        x: [*const i8; R],
        high: usize,
    ) {
        prefetch(line);
        // SAFETY: as above.
        unsafe {
            let [first, second] = unfold::<C>(line);
            for (sums, x) in sums.iter_mut().zip(x) {
                sums[0] = add_pairs(sums[0], _mm512_maddubs_epi16(first, broadcast(x)));
                sums[1] = add_pairs(sums[1], _mm512_maddubs_epi16(second, broadcast(x.add(high))));
            }
        }
    }
}

/// Four bytes in every lane.
///
/// # Safety
/// They must be readable, and the machine must have AVX-512 F.
#[inline(always)]
unsafe fn broadcast(x: *const i8) -> __m512i {
    // SAFETY: the same contract.
    unsafe { _mm512_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

/// The two lines that lie folded.
///
/// # Safety
/// 64 bytes must be readable, and the machine must have AVX-512 BW.
#[inline(always)]
pub unsafe fn unfold<C: FoldedCodes>(line: *const u8) -> [__m512i; 2] {
    // SAFETY: the same contract.
    unsafe {
        let (folded, mask) = (_mm512_loadu_si512(line.cast()), _mm512_set1_epi8(15));
        let high = _mm512_and_si512(_mm512_srli_epi16::<4>(folded), mask);
        let codes = [_mm512_and_si512(folded, mask), high];
        let Some(values) = C::VALUES else { return codes };
        let values = _mm512_broadcast_i32x4(_mm_loadu_si128(values.as_ptr().cast()));
        [_mm512_shuffle_epi8(values, codes[0]), _mm512_shuffle_epi8(values, codes[1])]
    }
}

/// The same of 32 bytes.
///
/// # Safety
/// They must be readable, and the machine must have AVX2.
#[inline(always)]
pub unsafe fn unfold8<C: FoldedCodes>(line: *const u8) -> [__m256i; 2] {
    // SAFETY: the same contract.
    unsafe {
        let (folded, mask) = (_mm256_loadu_si256(line.cast()), _mm256_set1_epi8(15));
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(folded), mask);
        let codes = [_mm256_and_si256(folded, mask), high];
        let Some(values) = C::VALUES else { return codes };
        let values = _mm256_broadcastsi128_si256(_mm_loadu_si128(values.as_ptr().cast()));
        [_mm256_shuffle_epi8(values, codes[0]), _mm256_shuffle_epi8(values, codes[1])]
    }
}

/// Adds neighbouring pairs of 16-bit sums.
///
/// # Safety
/// The machine must have AVX-512 BW.
#[inline(always)]
unsafe fn add_pairs(sums: __m512i, pairs: __m512i) -> __m512i {
    // SAFETY: the same contract.
    unsafe { _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))) }
}

impl ByteSimd for Avx2 {
    type Base = Avx2;
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];
    const MAX_ROWS: usize = 4;
    const MAX_GROUP_ROWS: usize = 2;
    const BYTES_OFFSET: i32 = 0;

    #[inline(always)]
    fn base(self) -> Avx2 {
        self
    }
    #[inline(always)]
    fn ints(self, x: i32) -> [__m256i; 2] {
        // SAFETY: `self` proves that the instructions exist; so for all functions below.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }
    #[inline(always)]
    fn add_ints(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: see `ints`.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn add_bytes<const R: usize>(
        self,
        sums: &mut [[__m256i; 2]; R],
        line: *const u8,
        x: [*const i8; R],
    ) {
        prefetch(line);
        // SAFETY: see `ints`; two products of codes up to 127 fit 16 bits.
        unsafe {
            for half in 0..2 {
                let codes = _mm256_loadu_si256(line.add(32 * half).cast());
                let magnitudes = _mm256_abs_epi8(codes);
                for (sums, x) in sums.iter_mut().zip(x) {
                    let x = _mm256_sign_epi8(broadcast8(x), codes);
                    sums[half] = add_pairs8(sums[half], _mm256_maddubs_epi16(magnitudes, x));
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn add_folded<C: FoldedCodes, const R: usize>(
        self,
        sums: &mut [[[__m256i; 2]; 2]; R],
        line: *const u8,
        x: [*const i8; R],
        high: usize,
    ) {
        prefetch(line);
        // SAFETY: see `ints`.
        unsafe {
            for half in 0..2 {
                let [first, second] = unfold8::<C>(line.add(32 * half));
                for (sums, x) in sums.iter_mut().zip(x) {
                    let low = _mm256_maddubs_epi16(first, broadcast8(x));
                    sums[0][half] = add_pairs8(sums[0][half], low);
                    let high = _mm256_maddubs_epi16(second, broadcast8(x.add(high)));
                    sums[1][half] = add_pairs8(sums[1][half], high);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn sub_zeros(self, sums: [__m256i; 2], zeros: *const u8, factor: i32) -> [__m256i; 2] {
        // SAFETY: see `ints`; the caller vouches for the bytes.
        halves!(|half| unsafe {
            let zeros = _mm256_cvtepu8_epi32(_mm_loadl_epi64(zeros.add(8 * half).cast()));
            _mm256_sub_epi32(sums[half], _mm256_madd_epi16(zeros, _mm256_set1_epi32(factor)))
        })
    }
    #[inline(always)]
    fn no_floats(self) -> [__m256; 2] {
        // SAFETY: see `ints`.
        unsafe { [_mm256_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn half_scales(self, scales: *const f16) -> [__m256; 2] {
        // SAFETY: see `ints`; the caller vouches for the scales.
        halves!(|half| unsafe { _mm256_cvtph_ps(_mm_loadu_si128(scales.add(8 * half).cast())) })
    }
    #[inline(always)]
    unsafe fn power_scales(self, scales: *const u8) -> [__m256; 2] {
        // SAFETY: see `ints`; the caller vouches for the scales.
        halves!(|half| unsafe {
            let scales = _mm256_cvtepu8_epi32(_mm_loadl_epi64(scales.add(8 * half).cast()));
            let least = _mm256_set1_epi32(LEAST_POWER);
            let bits = _mm256_max_epi32(_mm256_slli_epi32::<23>(scales), least);
            _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_set1_ps(0.5))
        })
    }
    #[inline(always)]
    fn add_scaled(
        self,
        acc: [__m256; 2],
        sums: [__m256i; 2],
        x_scale: f32,
        scales: [__m256; 2],
    ) -> [__m256; 2] {
        // SAFETY: see `ints`.
        halves!(|half| unsafe {
            let sums = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), _mm256_set1_ps(x_scale));
            _mm256_fmadd_ps(sums, scales[half], acc[half])
        })
    }
    #[inline(always)]
    unsafe fn scaled(self, sums: [__m256i; 2], x_scale: f32, scales: *const f32) -> [__m256; 2] {
        // SAFETY: see `ints`; the caller vouches for the scales.
        halves!(|half| unsafe {
            let scales = _mm256_loadu_ps(scales.add(8 * half));
            let scales = _mm256_mul_ps(_mm256_set1_ps(x_scale), scales);
            _mm256_mul_ps(_mm256_cvtepi32_ps(sums[half]), scales)
        })
    }
    #[inline(always)]
    fn lanes(self, floats: [__m256; 2]) -> [f32; BLOCK_ROWS] {
        // SAFETY: both are sixteen f32.
        unsafe { std::mem::transmute(floats) }
    }
}

impl ByteSimd for AvxVnni {
    type Base = Avx2;
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];
    const MAX_ROWS: usize = 4;
    const MAX_GROUP_ROWS: usize = 2;
    const BYTES_OFFSET: i32 = 128;

    #[inline(always)]
    fn base(self) -> Avx2 {
        self.vectors()
    }
    #[inline(always)]
    fn ints(self, x: i32) -> [__m256i; 2] {
        self.vectors().ints(x)
    }
    #[inline(always)]
    fn add_ints(self, a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        self.vectors().add_ints(a, b)
    }
    #[inline(always)]
    unsafe fn add_bytes<const R: usize>(
        self,
        sums: &mut [[__m256i; 2]; R],
        line: *const u8,
        x: [*const i8; R],
    ) {
        prefetch(line);
        // SAFETY: `self` proves that the instructions exist; the caller vouches for the bytes.
        unsafe {
            for half in 0..2 {
                let codes = _mm256_loadu_si256(line.add(32 * half).cast());
                let codes = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                for (sums, x) in sums.iter_mut().zip(x) {
                    sums[half] = _mm256_dpbusd_avx_epi32(sums[half], codes, broadcast8(x));
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn add_folded<C: FoldedCodes, const R: usize>(
        self,
        sums: &mut [[[__m256i; 2]; 2]; R],
        line: *const u8,
        x: [*const i8; R],
        high: usize,
    ) {
        prefetch(line);
        // SAFETY: as above.
        unsafe {
            for half in 0..2 {
                let [first, second] = unfold8::<C>(line.add(32 * half));
                for (sums, x) in sums.iter_mut().zip(x) {
                    let high = broadcast8(x.add(high));
                    sums[0][half] = _mm256_dpbusd_avx_epi32(sums[0][half], first, broadcast8(x));
                    sums[1][half] = _mm256_dpbusd_avx_epi32(sums[1][half], second, high);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn sub_zeros(self, sums: [__m256i; 2], zeros: *const u8, factor: i32) -> [__m256i; 2] {
        // SAFETY: the same contract.
        unsafe { self.vectors().sub_zeros(sums, zeros, factor) }
    }
    #[inline(always)]
    fn no_floats(self) -> [__m256; 2] {
        self.vectors().no_floats()
    }
    #[inline(always)]
    unsafe fn half_scales(self, scales: *const f16) -> [__m256; 2] {
        // SAFETY: the same contract.
        unsafe { self.vectors().half_scales(scales) }
    }
    #[inline(always)]
    unsafe fn power_scales(self, scales: *const u8) -> [__m256; 2] {
        // SAFETY: the same contract.
        unsafe { self.vectors().power_scales(scales) }
    }
    #[inline(always)]
    fn add_scaled(
        self,
        acc: [__m256; 2],
        sums: [__m256i; 2],
        x_scale: f32,
        scales: [__m256; 2],
    ) -> [__m256; 2] {
        self.vectors().add_scaled(acc, sums, x_scale, scales)
    }
    #[inline(always)]
    unsafe fn scaled(self, sums: [__m256i; 2], x_scale: f32, scales: *const f32) -> [__m256; 2] {
        // SAFETY: the same contract.
        unsafe { self.vectors().scaled(sums, x_scale, scales) }
    }
    #[inline(always)]
    fn lanes(self, floats: [__m256; 2]) -> [f32; BLOCK_ROWS] {
        self.vectors().lanes(floats)
    }
}

/// As [`broadcast`], for AVX2.
///
/// # Safety
/// Four bytes must be readable, and the machine must have AVX2.
#[inline(always)]
pub unsafe fn broadcast8(x: *const i8) -> __m256i {
    // SAFETY: the same contract.
    unsafe { _mm256_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

/// As [`add_pairs`], for AVX2.
///
/// # Safety
/// The machine must have AVX2.
#[inline(always)]
pub unsafe fn add_pairs8(sums: __m256i, pairs: __m256i) -> __m256i {
    // SAFETY: the same contract.
    unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))) }
}

#[cfg(test)]
mod tests {
    use super::super::byte_simd::{ByteKernel, Int4Codes, Mxfp4Codes};
    use super::super::scalar::Scalar;
    use super::*;
    use crate::formats::blocks::LINE_BYTES;

    /// Products of one line with two rows of activations, as sums of f32: of its bytes, and of
    /// both halves of what lies folded in it, less zero points.
    struct Products<'a> {
        line: &'a [u8; LINE_BYTES],
        x: &'a [i8; 64],
        sums: &'a mut Vec<f32>,
    }

    impl ByteKernel for Products<'_> {
        #[inline(always)]
        fn run<S: ByteSimd>(self, simd: S) {
            let Products { line, x, sums } = self;
            let line = line.as_ptr();
            let ones = [1.0f32; BLOCK_ROWS];
            let sum = |x: &[i8]| x.iter().map(|&x| i32::from(x)).sum::<i32>();
            let offset = |x: &[i8]| simd.ints(-S::BYTES_OFFSET * sum(&x[..4]));
            let mut bytes = [offset(x), offset(&x[4..])];
            let (mut folded, mut looked_up) = ([[simd.ints(0); 2]; 1], [[simd.ints(0); 2]; 1]);
            // SAFETY: a line, sixteen scales and 36 bytes of activations are readable.
            unsafe {
                simd.add_bytes(&mut bytes, line, [x.as_ptr(), x[4..].as_ptr()]);
                simd.add_folded::<Int4Codes, _>(&mut folded, line, [x.as_ptr()], 32);
                simd.add_folded::<Mxfp4Codes, _>(&mut looked_up, line, [x.as_ptr()], 32);
                let [[low, high]] = folded;
                let less = simd.sub_zeros(simd.add_ints(low, high), line, sum(x));
                for ints in [bytes[0], bytes[1], low, high, less, looked_up[0][0], looked_up[0][1]]
                {
                    sums.extend(simd.lanes(simd.scaled(ints, 1.0, ones.as_ptr())));
                }
                // Bytes as scales: of MXFP4, whose least one is no normal f32.
                let scales: [u8; BLOCK_ROWS] = std::array::from_fn(|i| i as u8 * 17 % 255);
                sums.extend(simd.lanes(simd.power_scales(scales.as_ptr())));
            }
        }
    }

    #[test]
    fn all_instructions_give_the_same_sums() {
        for seed in 0..50usize {
            // Codes from -127 to 127, among them both ends.
            let code = |i: usize| ((i * 97 + seed * 31) % 255) as i32 - 127;
            let line = std::array::from_fn(|i| code(i) as i8 as u8);
            let x = std::array::from_fn(|i| code(i * i + 7) as i8);
            let mut all: Vec<(&str, Vec<f32>)> = Vec::new();
            let mut add = |name, run: &dyn Fn(Products<'_>)| {
                let mut sums = Vec::new();
                run(Products { line: &line, x: &x, sums: &mut sums });
                all.push((name, sums));
            };
            add("scalar", &|products| products.run(Scalar));
            if let Some(avx2) = Avx2::detect() {
                add("avx2", &|products| avx2.run_bytes_without_vnni(products));
                if let Some(vnni) = avx2.vnni() {
                    add("avx-vnni", &|products| vnni.run(products));
                }
            }
            if let Some(avx512) = Avx512::detect() {
                add("avx512", &|products| avx512.run_bytes_without_vnni(products));
                if let Some(vnni) = avx512.vnni() {
                    add("avx512 vnni", &|products| vnni.run(products));
                }
            }
            for (name, sums) in &all[1..] {
                assert_eq!(*sums, all[0].1, "{name}");
            }
        }
    }
}
