//! AVX-512 (F, BW, DQ, VL): vectors of sixteen f32.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2;
use super::simd::{Kernel, Simd};

/// Proof that the machine has AVX-512 F, BW, DQ and VL, and AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Avx512 {
    has_vnni: bool,
}

impl Avx512 {
    /// The token, on a machine that has the instructions.
    pub fn detect() -> Option<Avx512> {
        let found = avx2::Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        let has_vnni = is_x86_feature_detected!("avx512vnni");
        found.then_some(Avx512 { has_vnni })
    }

    /// The token, inside a function that is compiled for the instructions and was entered with it.
    ///
    /// # Safety
    /// The machine must have the instructions.
    #[inline(always)]
    pub unsafe fn assume() -> Avx512 {
        Avx512 { has_vnni: false }
    }

    /// Runs a kernel compiled for these instructions.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token proves that the instructions exist.
        unsafe { enter(self, kernel) }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn enter<K: Kernel>(simd: Avx512, kernel: K) -> K::Output {
    kernel.run(simd)
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
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_max_ps(a, b) }
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
    unsafe fn load_low_nibbles(self, from: *const u8) -> __m512 {
        // SAFETY: see `load_f32`.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_cvtepi32_ps(_mm512_and_si512(bytes, _mm512_set1_epi32(15)))
        }
    }
    #[inline(always)]
    unsafe fn load_high_nibbles(self, from: *const u8) -> __m512 {
        // SAFETY: see `load_f32`.
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(bytes))
        }
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
    unsafe fn dot4_i8(self, x: *const i8, rows: [*const i8; 4], len: usize) -> [i32; 4] {
        // SAFETY: see `load_f32`; pairs of 16-bit products fit 32 bits.
        unsafe {
            if self.has_vnni {
                return dot4_vnni(x, rows, len);
            }
            let mut sums = [_mm512_setzero_si512(); 4];
            for at in (0..len).step_by(32) {
                let wide =
                    |from: *const i8| _mm512_cvtepi8_epi16(_mm256_loadu_si256(from.add(at).cast()));
                let x = wide(x);
                for (sum, row) in sums.iter_mut().zip(rows) {
                    *sum = _mm512_add_epi32(*sum, _mm512_madd_epi16(x, wide(row)));
                }
            }
            sums.map(|sum| _mm512_reduce_add_epi32(sum))
        }
    }
    #[inline(always)]
    fn splat_f16(self, x: f16) -> __m512 {
        // SAFETY: see `splat`.
        unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(x.to_bits() as i16)) }
    }
    #[inline(always)]
    unsafe fn store_f32(self, to: *mut f32, v: __m512) {
        // SAFETY: see `load_f32`.
        unsafe { _mm512_storeu_ps(to, v) }
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

/// As [`Simd::dot4_i8`]. The instruction multiplies unsigned by signed bytes: 128 is added to `x`,
/// and 128 times the sum of the row taken off again.
///
/// # Safety
/// That of [`Simd::dot4_i8`], and the machine must have AVX-512 VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn dot4_vnni(x: *const i8, rows: [*const i8; 4], len: usize) -> [i32; 4] {
    let offset = _mm512_set1_epi8(-128);
    let mut sums = [_mm512_setzero_si512(); 4];
    let mut surplus = [_mm512_setzero_si512(); 4];
    for at in (0..len).step_by(64) {
        // SAFETY: inside the caller's bytes.
        unsafe {
            let x = _mm512_xor_si512(_mm512_loadu_si512(x.add(at).cast()), offset);
            for ((sum, surplus), row) in sums.iter_mut().zip(&mut surplus).zip(rows) {
                let row = _mm512_loadu_si512(row.add(at).cast());
                *sum = _mm512_dpbusd_epi32(*sum, x, row);
                *surplus = _mm512_dpbusd_epi32(*surplus, offset, row);
            }
        }
    }
    std::array::from_fn(|i| _mm512_reduce_add_epi32(_mm512_sub_epi32(sums[i], surplus[i])))
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
