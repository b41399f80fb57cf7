//! AVX-512 (F, BW, DQ, VL): vectors of sixteen f32.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2;
use super::byte_simd::ByteKernel;
use super::simd::{Kernel, Simd};

/// Proof that the machine has AVX-512 F, BW, DQ and VL, and AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512(());

/// Proof that the machine has VNNI too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vnni(Avx512);

impl Avx512 {
    /// The token, on a machine that has the instructions.
    pub fn detect() -> Option<Avx512> {
        let found = avx2::Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        found.then_some(Avx512(()))
    }

    /// The token for products of bytes, on a machine that has VNNI.
    pub fn vnni(self) -> Option<Vnni> {
        is_x86_feature_detected!("avx512vnni").then_some(Vnni(self))
    }

    /// The token, inside a function that is compiled for the instructions and was entered with it.
    ///
    /// # Safety
    /// The machine must have the instructions.
    #[inline(always)]
    pub unsafe fn assume() -> Avx512 {
        Avx512(())
    }

    /// Runs a kernel compiled for these instructions.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves that the instructions exist.
        unsafe { enter(self, kernel) }
    }

    /// As [`Avx512::run`], for products of bytes, with VNNI where the machine has it.
    pub fn run_bytes<K: ByteKernel>(self, kernel: K) {
        match self.vnni() {
            Some(vnni) => vnni.run(kernel),
            None => self.run_bytes_without_vnni(kernel),
        }
    }

    /// As [`Avx512::run`], for products of bytes.
    pub fn run_bytes_without_vnni<K: ByteKernel>(self, kernel: K) {
        // SAFETY: as above.
        unsafe { enter_bytes(self, kernel) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn enter<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
}

impl Vnni {
    /// The vectors of f32 beside it.
    #[inline(always)]
    pub fn vectors(self) -> Avx512 {
        self.0
    }

    /// Runs a kernel compiled for these instructions.
    pub fn run<K: ByteKernel>(self, kernel: K) {
        // SAFETY: the token proves that the instructions exist.
        unsafe { enter_vnni(self, kernel) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn enter_vnni<K: ByteKernel>(simd: Vnni, kernel: K) {
    kernel.run(simd);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn enter_bytes<K: ByteKernel>(simd: Avx512, kernel: K) {
    kernel.run(simd);
}

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 6;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves that the instructions exist; so for all functions below.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_div_ps(a, b) }
    }
    // An estimate of 14 bits and one step of Newton's method take a third of a division's time.
    #[inline(always)]
    fn recip(self, x: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe {
            let estimate = _mm512_rcp14_ps(x);
            let error = _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(1.0));
            _mm512_fmadd_ps(error, estimate, estimate)
        }
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    fn scale_by_pow2(self, y: __m512, n: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_scalef_ps(y, n) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn keep_where_at_least(self, y: __m512, x: __m512, bound: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, bound), y) }
    }
    #[inline(always)]
    fn at_least(self, a: __m512, b: __m512) -> u32 {
        // SAFETY: see `splat`.
        u32::from(unsafe { _mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b) })
    }
    #[inline(always)]
    fn sum4(self, vectors: [__m512; 4]) -> [f32; 4] {
        // SAFETY: see `splat`.
        let mut halves = unsafe { [_mm256_setzero_ps(); 4] };
        for (half, v) in halves.iter_mut().zip(vectors) {
            // SAFETY: see `splat`.
            *half =
                unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)) };
        }
        avx2::sum4(halves)
    }
    #[inline(always)]
    fn max_lane(self, v: __m512) -> f32 {
        // SAFETY: see `splat`.
        unsafe { _mm512_reduce_max_ps(v) }
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> __m512 {
        // SAFETY: see `splat`; the caller vouches for the memory, so for all below.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: see `load_f32`.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: see `load_f32`.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m512 {
        // SAFETY: see `load_f32`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> __m512 {
        // The bits of an E4M3 number are those of an f16 that is 2⁸ times smaller.
        // SAFETY: see `load_f32`.
        unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(from.cast()));
            let magnitude =
                _mm256_slli_epi16::<7>(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)));
            let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)));
            let halves = _mm512_cvtph_ps(_mm256_or_si256(magnitude, sign));
            _mm512_mul_ps(halves, _mm512_set1_ps(256.0))
        }
    }
    #[inline(always)]
    unsafe fn load_i8_words(self, from: *const u8) -> [__m512; 4] {
        // SAFETY: see `load_f32`.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            [
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<24>(words))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<16>(words))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(words))),
                _mm512_cvtepi32_ps(_mm512_srai_epi32::<24>(words)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3_words(self, from: *const u8) -> [__m512; 4] {
        // Codes are sorted so that the lower halves of 128 bits are codes 0 and 1 of all words and
        // the upper ones codes 2 and 3.
        // SAFETY: see `load_f32`.
        unsafe {
            let by_code = _mm512_set4_epi32(0x0f0b_0703, 0x0e0a_0602, 0x0d09_0501, 0x0c08_0400);
            let order = _mm512_setr_epi32(0, 4, 2, 6, 8, 12, 10, 14, 1, 5, 3, 7, 9, 13, 11, 15);
            let codes = _mm512_shuffle_epi8(_mm512_loadu_si512(from.cast()), by_code);
            let codes = _mm512_permutexvar_epi32(order, codes);
            let zero = _mm512_setzero_si512();
            let lower = e4m3_as_f16(_mm512_unpacklo_epi8(zero, codes));
            let upper = e4m3_as_f16(_mm512_unpackhi_epi8(zero, codes));
            [
                _mm512_cvtph_ps(_mm512_castsi512_si256(lower)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(lower)),
                _mm512_cvtph_ps(_mm512_castsi512_si256(upper)),
                _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(upper)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_words(self, from: *const u8) -> [__m512; 2] {
        // SAFETY: see `load_f32`.
        unsafe {
            let words = _mm512_loadu_si512(from.cast());
            let upper = _mm512_and_si512(words, _mm512_set1_epi32(!0xffff));
            [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words)), _mm512_castsi512_ps(upper)]
        }
    }
    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32, v: __m512) {
        // SAFETY: see `load_f32`.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: __m512) {
        // SAFETY: `self` proves the instructions; the caller vouches for the bytes.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))) }
    }
    #[inline(always)]
    unsafe fn stream_f32(self, to: *mut f32, v: __m512) {
        // SAFETY: see `load_f32`; the caller vouches for the alignment.
        unsafe { _mm512_stream_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: __m512) {
        // Not the AVX-512 BF16 conversion: that one flushes subnormals, the referee does not.
        // SAFETY: see `load_f32`.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_add_epi32(bits, bias);
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let upper = _mm512_srli_epi32::<16>(_mm512_mask_mov_epi32(rounded, is_nan, quiet));
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(upper));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, v: __m512) {
        // SAFETY: see `load_f32`.
        unsafe {
            _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        }
    }
    #[inline(always)]
    unsafe fn transpose(
        self,
        from: *const f32,
        from_stride: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        // SAFETY: sixteen rows of sixteen elements at both ends, by the caller's contract.
        unsafe {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(i * from_stride));
            }
            for (i, column) in transpose16(rows).into_iter().enumerate() {
                _mm512_storeu_ps(to.add(i * to_stride), column);
            }
        }
    }
}

/// E4M3 numbers in upper bytes as the f16 with the same bits: 2⁸ times smaller.
///
/// # Safety
/// The machine must have AVX-512 BW.
#[inline(always)]
unsafe fn e4m3_as_f16(codes: __m512i) -> __m512i {
    // SAFETY: the same contract.
    unsafe { _mm512_and_si512(_mm512_srai_epi16::<1>(codes), _mm512_set1_epi16(!0x4000)) }
}

/// The columns of sixteen rows of sixteen 32-bit elements of any kind.
///
/// # Safety
/// The machine must have AVX-512 F.
#[inline(always)]
pub unsafe fn transpose16(mut rows: [__m512; 16]) -> [__m512; 16] {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        // Within groups of four rows: 2 × 2 squares, then 4 × 4 squares in each quarter.
        for i in [0, 4, 8, 12] {
            let (a, b, c, d) = (rows[i], rows[i + 1], rows[i + 2], rows[i + 3]);
            let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
            rows[i] = _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd);
            rows[i + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd);
            rows[i + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high);
            rows[i + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high);
        }
        // Quarter q of rows[4 g + c] holds column 4 q + c of rows 4 g .. 4 g + 4.
        let mut columns = rows;
        for c in 0..4 {
            let upper_even = _mm512_shuffle_f32x4::<0x88>(rows[c], rows[c + 4]);
            let upper_odd = _mm512_shuffle_f32x4::<0xdd>(rows[c], rows[c + 4]);
            let lower_even = _mm512_shuffle_f32x4::<0x88>(rows[c + 8], rows[c + 12]);
            let lower_odd = _mm512_shuffle_f32x4::<0xdd>(rows[c + 8], rows[c + 12]);
            columns[c] = _mm512_shuffle_f32x4::<0x88>(upper_even, lower_even);
            columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(upper_odd, lower_odd);
            columns[8 + c] = _mm512_shuffle_f32x4::<0xdd>(upper_even, lower_even);
            columns[12 + c] = _mm512_shuffle_f32x4::<0xdd>(upper_odd, lower_odd);
        }
        columns
    }
}
