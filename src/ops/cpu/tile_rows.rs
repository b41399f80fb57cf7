//! Cached rows as bf16, which is what tiles multiply: where they lie, or converted into scratch.
//!
//! Every E4M3 number is a bf16, and so is every signed byte; a byte times its row's scale is
//! rounded to one, unless the scale is left to whoever asked for the rows.

use std::arch::x86_64::*;

use half::bf16;

use super::kv_rows::Cached;
use crate::formats::fp8;
use crate::tensor::Fp8;

/// Whether rows can be had as bf16 without losing what a wider type holds.
pub fn fits(cache: Cached<'_>) -> bool {
    matches!(cache, Cached::Bf16(_) | Cached::Int8(..) | Cached::Fp8(_))
}

/// Rows of `dim` elements that [`fits`].
#[derive(Clone, Copy)]
pub struct TileRows<'a> {
    cache: Cached<'a>,
    dim: usize,
    leaves_scales: bool,
}

impl<'a> TileRows<'a> {
    /// All rows of a cache; `dim` is a multiple of 32.
    pub fn new(cache: Cached<'a>, dim: usize) -> TileRows<'a> {
        assert!(fits(cache) && dim.is_multiple_of(32), "tiles read rows of bf16");
        TileRows { cache, dim, leaves_scales: false }
    }

    /// The same rows without their scales, which the caller will apply.
    pub fn without_scales(self) -> TileRows<'a> {
        TileRows { leaves_scales: true, ..self }
    }

    /// Scales of `count` rows from `row` on that were left to the caller, if there are any.
    pub fn scales(self, row: usize, count: usize) -> Option<&'a [f32]> {
        match self.cache {
            Cached::Int8(_, scales) if self.leaves_scales => Some(&scales[row..row + count]),
            _ => None,
        }
    }

    /// `count` rows from `row` on, when they lie in memory as bf16.
    pub fn in_place(self, row: usize, count: usize) -> Option<&'a [bf16]> {
        match self.cache {
            Cached::Bf16(elements) => Some(&elements[row * self.dim..(row + count) * self.dim]),
            _ => None,
        }
    }

    /// Writes rows from `row` on as bf16, as many as `to` has room for: two elements per word.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub fn widen(self, row: usize, to: &mut [u32]) {
        let lines = to.chunks_exact_mut(self.dim / 2);
        let elements = row * self.dim..(row + lines.len()) * self.dim;
        match self.cache {
            Cached::Bf16(rows) => {
                for (line, row) in lines.zip(rows[elements].chunks_exact(self.dim)) {
                    // SAFETY: as many bytes are readable as are writable, and scratch is not
                    // the cache.
                    unsafe {
                        let to = line.as_mut_ptr().cast();
                        row.as_ptr().copy_to_nonoverlapping(to, self.dim);
                    }
                }
            }
            Cached::Int8(codes, scales) => {
                let rows = codes[elements].chunks_exact(self.dim).zip(&scales[row..]);
                for (line, (codes, scale)) in lines.zip(rows) {
                    scale_bytes(codes, if self.leaves_scales { 1.0 } else { *scale }, line);
                }
            }
            Cached::Fp8(codes) => {
                for (line, codes) in lines.zip(codes[elements].chunks_exact(self.dim)) {
                    rebias(codes, line);
                }
            }
            Cached::F32(_) | Cached::F16(_) => unreachable!("checked when made"),
        }
    }

    /// Asks for `count` rows from `row` on, to be in the second-level cache later.
    pub fn prefetch(self, row: usize, count: usize) {
        let (start, element_bytes): (*const u8, usize) = match self.cache {
            Cached::F32(elements) => (elements.as_ptr().cast(), 4),
            Cached::Bf16(elements) => (elements.as_ptr().cast(), 2),
            Cached::F16(elements) => (elements.as_ptr().cast(), 2),
            Cached::Int8(codes, scales) => {
                ask(scales.as_ptr().wrapping_add(row).cast());
                (codes.as_ptr().cast(), 1)
            }
            Cached::Fp8(codes) => (codes.as_ptr().cast(), 1),
        };
        let row_bytes = self.dim * element_bytes;
        for at in (row * row_bytes..(row + count) * row_bytes).step_by(64) {
            ask(start.wrapping_add(at));
        }
    }
}

fn ask(address: *const u8) {
    // SAFETY: a prefetch never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
}

/// Codes times `scale`, rounded.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn scale_bytes(codes: &[i8], scale: f32, to: &mut [u32]) {
    let scale = _mm512_set1_ps(scale);
    for (codes, to) in codes.as_chunks::<32>().0.iter().zip(to.as_chunks_mut::<16>().0) {
        let wide = |bytes| _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)), scale);
        // SAFETY: 32 codes are read, sixteen words written; vectors of the same size, all of
        // whose bits are valid.
        unsafe {
            let low = _mm_loadu_si128(codes.as_ptr().cast());
            let high = _mm_loadu_si128(codes.as_ptr().add(16).cast());
            let line: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(wide(high), wide(low)));
            _mm512_storeu_si512(to.as_mut_ptr().cast(), line);
        }
    }
}

/// E4M3 to bf16 by moving the fields: the exponent's bias grows from 7 to 127. The seven
/// subnormal magnitudes, and zero, come from a table.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn rebias(codes: &[Fp8], to: &mut [u32]) {
    let subnormals: [bf16; 32] = std::array::from_fn(|i| bf16::from_f32(fp8::decode(i as u8 & 7)));
    // SAFETY: an array of 64 bytes.
    let subnormals = unsafe { _mm512_loadu_si512(subnormals.as_ptr().cast()) };
    let (magnitude, sign) = (_mm512_set1_epi16(0x07f0), _mm512_set1_epi16(i16::MIN));
    let (exponent, bias) = (_mm512_set1_epi16(0x78), _mm512_set1_epi16(120 << 7));
    for (codes, to) in codes.as_chunks::<32>().0.iter().zip(to.as_chunks_mut::<16>().0) {
        // SAFETY: 32 codes are read.
        let words = unsafe { _mm512_cvtepu8_epi16(_mm256_loadu_si256(codes.as_ptr().cast())) };
        let shifted = _mm512_and_si512(_mm512_slli_epi16::<4>(words), magnitude);
        let is_subnormal = _mm512_testn_epi16_mask(words, exponent);
        let number = _mm512_add_epi16(shifted, bias);
        let number = _mm512_mask_permutexvar_epi16(number, is_subnormal, words, subnormals);
        // The sign bit of the code, above the magnitude.
        let line = _mm512_ternarylogic_epi32::<0xf8>(number, _mm512_slli_epi16::<8>(words), sign);
        // SAFETY: sixteen words are written.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) }
    }
}
