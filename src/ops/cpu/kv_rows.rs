//! Cached keys and values as kernels read and write them: a row is one vector of one token and
//! head, in the cache's dtype.

use half::{bf16, f16};

use super::isa::Isa;
use super::rows::Convert;
use super::share::Parts;
use super::simd::{Kernel, Lanes, Simd, largest_magnitude, load};
use crate::formats::int8::{MAX_CODE, inverse_scale};
use crate::formats::{fp8, round_to_byte};
use crate::ops::kv_tensor::{KvView, KvViewMut};
use crate::tensor::{DType, Fp8};

/// Cached rows. The element type is looked at when rows are loaded, so that everything else is
/// compiled once.
#[derive(Clone, Copy)]
pub enum Cached<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Brain floats.
    Bf16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
    /// Codes, and a scale per row.
    Int8(&'a [i8], &'a [f32]),
    /// FP8 E4M3.
    Fp8(&'a [Fp8]),
}

impl<'a> Cached<'a> {
    /// The rows of a checked cache.
    pub fn of(view: KvView<'a>) -> Cached<'a> {
        match view.data.dtype() {
            DType::F32 => Cached::F32(view.data.as_slice()),
            DType::BF16 => Cached::Bf16(view.data.as_slice()),
            DType::F16 => Cached::F16(view.data.as_slice()),
            DType::I8 => {
                let scales = view.scales.expect("a checked cache of bytes has scales");
                Cached::Int8(view.data.as_slice(), scales.as_slice())
            }
            DType::Fp8 => Cached::Fp8(view.data.as_slice()),
            DType::U32 | DType::U8 => panic!("a cache of {}", view.data.dtype()),
        }
    }
}

/// A cache whose slots are written by tasks, each its own.
pub struct Slots<'a> {
    elements: Elements<'a>,
    num_heads: usize,
    block_size: usize,
    head_dim: usize,
}

enum Elements<'a> {
    F32(Parts<'a, f32>),
    Bf16(Parts<'a, bf16>),
    F16(Parts<'a, f16>),
    Int8(Parts<'a, i8>, Parts<'a, f32>),
    Fp8(Parts<'a, Fp8>),
}

impl<'a> Slots<'a> {
    /// The slots of a checked cache.
    pub fn of(cache: KvViewMut<'a>) -> Slots<'a> {
        let (num_heads, block_size, head_dim) = (cache.size(1), cache.size(2), cache.size(3));
        let dtype = cache.data.dtype();
        let elements = match dtype {
            DType::F32 => Elements::F32(Parts::new(cache.data.into_mut_slice())),
            DType::BF16 => Elements::Bf16(Parts::new(cache.data.into_mut_slice())),
            DType::F16 => Elements::F16(Parts::new(cache.data.into_mut_slice())),
            DType::I8 => {
                let scales = cache.scales.expect("a checked cache of bytes has scales");
                let codes = Parts::new(cache.data.into_mut_slice());
                Elements::Int8(codes, Parts::new(scales.into_mut_slice()))
            }
            DType::Fp8 => Elements::Fp8(Parts::new(cache.data.into_mut_slice())),
            DType::U32 | DType::U8 => panic!("a cache of {dtype}"),
        };
        Slots { elements, num_heads, block_size, head_dim }
    }

    /// Elements of a token's vectors.
    pub fn token_len(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Stores the vectors of a token, one per head.
    ///
    /// # Safety
    /// No other task may write this slot or read it meanwhile.
    pub unsafe fn write(&self, isa: Isa, slot: u32, vectors: &[f32]) {
        let (block, offset) = (slot as usize / self.block_size, slot as usize % self.block_size);
        for (head, from) in vectors.chunks_exact(self.head_dim).enumerate() {
            let row = (block * self.num_heads + head) * self.block_size + offset;
            let part = row * self.head_dim..(row + 1) * self.head_dim;
            // SAFETY: a slot's rows are its own, by the same contract.
            unsafe {
                match &self.elements {
                    Elements::F32(all) => isa.run(Convert { out: all.part(part), from }),
                    Elements::Bf16(all) => isa.run(Convert { out: all.part(part), from }),
                    Elements::F16(all) => isa.run(Convert { out: all.part(part), from }),
                    Elements::Int8(all, scales) => {
                        let scale = &mut scales.part(row..row + 1)[0];
                        isa.run(QuantizeRow { codes: all.part(part), scale, from });
                    }
                    Elements::Fp8(all) => isa.run(EncodeRow { codes: all.part(part), from }),
                }
            }
        }
    }
}

/// Quantizes a row as `formats::int8::quantize_row` does, bit for bit.
pub struct QuantizeRow<'a> {
    /// Codes to write.
    pub codes: &'a mut [i8],
    /// Scale to write.
    pub scale: &'a mut f32,
    /// As many values as codes.
    pub from: &'a [f32],
}

impl Kernel for QuantizeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let largest = largest_magnitude(simd, self.from);
        *self.scale = largest / MAX_CODE;
        let inverse = inverse_scale(largest);
        for (code, x) in self.codes.iter_mut().zip(self.from) {
            *code = round_to_byte(x * inverse) as i8;
        }
    }
}

/// Rounds a row to E4M3 as `formats::fp8::encode` does, bit for bit.
pub struct EncodeRow<'a> {
    /// Numbers to write.
    pub codes: &'a mut [Fp8],
    /// As many values.
    pub from: &'a [f32],
}

impl Kernel for EncodeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (code, x) in self.codes.iter_mut().zip(self.from) {
            *code = Fp8(encode(*x));
        }
    }
}

/// `formats::fp8::encode` without branches, so that the compiler makes vectors of it.
#[inline(always)]
fn encode(value: f32) -> u8 {
    /// The smallest magnitude with an exponent of its own.
    const NORMAL: f32 = 1.0 / 64.0;
    /// A unit in its last place is the subnormal step, 2⁻⁹.
    const STEPS: f32 = 16_384.0;
    let magnitude = value.abs().min(fp8::MAX_VALUE);
    let subnormal = (magnitude + STEPS).to_bits() - STEPS.to_bits();
    // To nearest even at three bits of mantissa; then the exponent's bias falls from 127 to 7.
    let bits = magnitude.to_bits();
    let rounded = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
    let normal = rounded.wrapping_sub(120 << 3);
    let code = if magnitude < NORMAL { subnormal } else { normal };
    (value.to_bits() >> 24 & 0x80 | code) as u8
}

/// Reads `len` elements of one row from `at` on, or fewer at its end, times the row's scale.
#[inline(always)]
pub fn widen<S: Simd, E: Lanes>(simd: S, row: &[E], at: usize, scale: Option<f32>) -> S::V {
    let lanes = load(simd, row, at);
    match scale {
        Some(scale) => simd.mul(lanes, simd.splat(scale)),
        None => lanes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::int8;

    /// Every bit pattern of the upper 20 bits of an f32, and its neighbours.
    fn numbers() -> impl Iterator<Item = f32> {
        (0..1u32 << 20).flat_map(|upper| [0, 1, 0xfff].map(|low| f32::from_bits(upper << 12 | low)))
    }

    #[test]
    fn e4m3_is_rounded_as_weights_are() {
        for x in numbers().filter(|x| !x.is_nan()) {
            assert_eq!(encode(x), fp8::encode(x), "{x}");
        }
    }

    #[test]
    fn rows_are_quantized_as_weights_are_on_every_instruction_set() {
        for len in [1, 15, 20, 32, 64, 80, 256] {
            for scale in [0.0, 1e-30, 1.0, 1e30] {
                let from: Vec<f32> =
                    (0..len).map(|i| ((i * 37 % 101) as f32 - 50.0) * scale).collect();
                let mut expected = vec![0; len];
                let expected_scale = int8::quantize_row(&from, &mut expected);
                for isa in Isa::supported() {
                    let (mut codes, mut scale) = (vec![1; len], f32::NAN);
                    isa.run(QuantizeRow { codes: &mut codes, scale: &mut scale, from: &from });
                    assert_eq!((scale, &codes), (expected_scale, &expected), "{}", isa.name());
                }
            }
        }
    }
}
