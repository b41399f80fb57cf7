//! AVX2 with FMA and F16C: vectors of eight f32.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::byte_simd::ByteKernel;
use super::simd::{Kernel, Simd};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx2(());

impl Avx2 {
    /// The token, on a machine that has the instructions.
    pub fn detect() -> Option<Avx2> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }

    /// Runs a kernel compiled for these instructions.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves that the instructions exist.
        unsafe { enter(self, kernel) }
    }

    /// The token for products of bytes, on a machine that has AVX-VNNI.
    pub fn vnni(self) -> Option<AvxVnni> {
        is_x86_feature_detected!("avxvnni").then_some(AvxVnni(self))
    }

    /// As [`Avx2::run`], for products of bytes, with AVX-VNNI where the machine has it.
    pub fn run_bytes<K: ByteKernel>(self, kernel: K) {
        match self.vnni() {
            Some(vnni) => vnni.run(kernel),
            None => self.run_bytes_without_vnni(kernel),
        }
    }

    /// As [`Avx2::run`], for products of bytes.
    pub fn run_bytes_without_vnni<K: ByteKernel>(self, kernel: K) {
        // SAFETY: as above.
        unsafe { enter_bytes(self, kernel) }
    }
}

/// Proof that the machine has AVX-VNNI too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AvxVnni(Avx2);

impl AvxVnni {
    /// The vectors of f32 beside it.
    #[inline(always)]
    pub fn vectors(self) -> Avx2 {
        self.0
    }

    /// Runs a kernel compiled for these instructions.
    pub fn run<K: ByteKernel>(self, kernel: K) {
        // SAFETY: the token proves that the instructions exist.
        unsafe { enter_vnni(self, kernel) }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
    kernel.run(simd)
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter_bytes<K: ByteKernel>(simd: Avx2, kernel: K) {
    kernel.run(simd);
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
fn enter_vnni<K: ByteKernel>(simd: AvxVnni, kernel: K) {
    kernel.run(simd);
}

/// Sums of the lanes of four vectors: neighbours, then pairs, then halves.
#[inline(always)]
pub(super) fn sum4(v: [__m256; 4]) -> [f32; 4] {
    let mut sums = [0.0; 4];
    // SAFETY: callers hold a token whose instructions include AVX; `sums` takes 16 bytes.
    unsafe {
        let pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        let halves = (_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
        _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(halves.0, halves.1));
    }
    sums
}

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` proves that the instructions exist; so for all functions below.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn pow2(self, n: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn keep_where_at_least(self, y: __m256, x: __m256, bound: __m256) -> __m256 {
        // SAFETY: see `splat`.
        unsafe { _mm256_and_ps(y, _mm256_cmp_ps::<_CMP_GE_OQ>(x, bound)) }
    }
    #[inline(always)]
    fn at_least(self, a: __m256, b: __m256) -> u32 {
        // SAFETY: see `splat`.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(a, b)) as u32 }
    }
    #[inline(always)]
    fn sum4(self, vectors: [__m256; 4]) -> [f32; 4] {
        sum4(vectors)
    }
    #[inline(always)]
    fn max_lane(self, v: __m256) -> f32 {
        // SAFETY: see `splat`.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> __m256 {
        // SAFETY: see `splat`; the caller vouches for the memory, so for all below.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        // SAFETY: see `load_f32`.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        // SAFETY: see `load_f32`.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m256 {
        // SAFETY: see `load_f32`.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(self, from: *const u8) -> __m256 {
        // The bits of an E4M3 number are those of an f16 that is 2⁸ times smaller.
        // SAFETY: see `load_f32`.
        unsafe {
            let bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(from.cast()));
            let magnitude = _mm_slli_epi16::<7>(_mm_and_si128(bytes, _mm_set1_epi16(0x7f)));
            let sign = _mm_slli_epi16::<8>(_mm_and_si128(bytes, _mm_set1_epi16(0x80)));
            let halves = _mm256_cvtph_ps(_mm_or_si128(magnitude, sign));
            _mm256_mul_ps(halves, _mm256_set1_ps(256.0))
        }
    }
    #[inline(always)]
    unsafe fn load_i8_words(self, from: *const u8) -> [__m256; 4] {
        // SAFETY: see `load_f32`.
        unsafe {
            let words = _mm256_loadu_si256(from.cast());
            [
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<24>(words))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<16>(words))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(_mm256_slli_epi32::<8>(words))),
                _mm256_cvtepi32_ps(_mm256_srai_epi32::<24>(words)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3_words(self, from: *const u8) -> [__m256; 4] {
        // Codes are sorted: 0 and 1 of all words in the lower 128 bits, 2 and 3 in the upper.
        // SAFETY: see `load_f32`.
        unsafe {
            let by_code = _mm256_set_epi32(
                0x0f0b_0703,
                0x0e0a_0602,
                0x0d09_0501,
                0x0c08_0400,
                0x0f0b_0703,
                0x0e0a_0602,
                0x0d09_0501,
                0x0c08_0400,
            );
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let codes = _mm256_shuffle_epi8(_mm256_loadu_si256(from.cast()), by_code);
            let codes = _mm256_permutevar8x32_epi32(codes, order);
            let zero = _mm256_setzero_si256();
            let even = e4m3_as_f16(_mm256_unpacklo_epi8(zero, codes));
            let odd = e4m3_as_f16(_mm256_unpackhi_epi8(zero, codes));
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(even)),
                _mm256_cvtph_ps(_mm256_castsi256_si128(odd)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(even)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(odd)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_words(self, from: *const u8) -> [__m256; 2] {
        // SAFETY: see `load_f32`.
        unsafe {
            let words = _mm256_loadu_si256(from.cast());
            let upper = _mm256_and_si256(words, _mm256_set1_epi32(!0xffff));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)), _mm256_castsi256_ps(upper)]
        }
    }
    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32, v: __m256) {
        // SAFETY: see `load_f32`.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, v: __m256) {
        // SAFETY: `self` proves the instructions; the caller vouches for the bytes.
        unsafe {
            let ints = _mm256_cvtps_epi32(v);
            let (low, high) = (_mm256_castsi256_si128(ints), _mm256_extracti128_si256::<1>(ints));
            let words = _mm_packs_epi32(low, high);
            _mm_storel_epi64(to.cast(), _mm_packs_epi16(words, words));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, v: __m256) {
        // SAFETY: see `load_f32`.
        unsafe {
            let bits = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_add_epi32(bits, bias);
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let upper = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, is_nan));
            let halves = (_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
            _mm_storeu_si128(to.cast(), _mm_packus_epi32(halves.0, halves.1));
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, v: __m256) {
        // SAFETY: see `load_f32`.
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn transpose(
        self,
        from: *const f32,
        from_stride: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        // SAFETY: eight rows of eight elements at both ends, by the caller's contract.
        unsafe {
            let mut rows = [_mm256_setzero_ps(); 8];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm256_loadu_ps(from.add(i * from_stride));
            }
            // Within groups of four rows: 2 × 2 squares, then 4 × 4 squares in each half.
            for i in [0, 4] {
                let (a, b, c, d) = (rows[i], rows[i + 1], rows[i + 2], rows[i + 3]);
                let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
                let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
                rows[i] = _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd);
                rows[i + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd);
                rows[i + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high);
                rows[i + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high);
            }
            for c in 0..4 {
                let (low, high) = (rows[c], rows[c + 4]);
                let (left, right) = (
                    _mm256_permute2f128_ps::<0x20>(low, high),
                    _mm256_permute2f128_ps::<0x31>(low, high),
                );
                _mm256_storeu_ps(to.add(c * to_stride), left);
                _mm256_storeu_ps(to.add((c + 4) * to_stride), right);
            }
        }
    }
}

/// E4M3 numbers in upper bytes as the f16 with the same bits: 2⁸ times smaller.
///
/// # Safety
/// The machine must have AVX2.
#[inline(always)]
unsafe fn e4m3_as_f16(codes: __m256i) -> __m256i {
    // SAFETY: the same contract.
    unsafe { _mm256_and_si256(_mm256_srai_epi16::<1>(codes), _mm256_set1_epi16(!0x4000)) }
}
