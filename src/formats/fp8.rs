//! FP8 E4M3 (the variant without infinities): a byte per weight, in blocks of sixteen rows (see
//! `blocks`), and a scale per row or per group of 128 elements of a row. Where a checkpoint has a
//! scale per 128 × 128 elements, its rows repeat it.
//!
//! `value = e4m3 · scale`. The two codes that mean "not a number" do not occur in weights: they
//! would read as ±480 here.

use super::{Format, RowQuantizer, ScaleGrid, largest_magnitude, round_to_byte};

/// Largest finite value.
pub const MAX_VALUE: f32 = 448.0;

/// The number that a code stands for.
pub fn decode(code: u8) -> f32 {
    let magnitude = f32::from(code & 7);
    let value = match i32::from(code >> 3 & 15) {
        0 => magnitude / 8.0 * 2f32.powi(-6),
        exponent => (1.0 + magnitude / 8.0) * 2f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { value } else { -value }
}

/// The nearest code, ties to even; values beyond the largest become the largest.
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    /// Bits of an f32's mantissa beyond the three of a code.
    const REST: u32 = 20;
    const LEAST_NORMAL: f32 = 1.0 / 64.0;
    const STEPS_PER_ONE: f32 = 512.0;
    let magnitude = value.abs();
    let magnitude = if magnitude < MAX_VALUE { magnitude } else { MAX_VALUE };
    let bits = magnitude.to_bits();
    let rounded = bits + (1 << (REST - 1)) - 1 + (bits >> REST & 1);
    // The exponent's bias shrinks from 127 to 7; numbers below the least normal one are steps.
    let normal = (rounded >> REST).wrapping_sub(120 << 3) as u8;
    let steps = round_to_byte(magnitude * STEPS_PER_ONE);
    let code = if magnitude < LEAST_NORMAL { steps } else { normal };
    code | (value.to_bits() >> 24) as u8 & 0x80
}

/// Quantizes every row with its own scale.
pub struct PerRow;

impl RowQuantizer for PerRow {
    type Scale = f32;

    fn format(&self) -> Format {
        Format::Fp8
    }

    fn grid(&self, num_cols: usize) -> ScaleGrid {
        ScaleGrid::per_row(num_cols)
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f32], _: &mut [u8]) {
        let largest = largest_magnitude(values);
        codes.fill(0);
        scales[0] = if largest > 0.0 { largest / MAX_VALUE } else { 1.0 };
        let scale = scales[0];
        for (code, value) in codes.iter_mut().zip(values) {
            *code = encode(value / scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_comes_back() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(encode(decode(code)), code, "{}", decode(code));
        }
        assert_eq!(decode(0x7e), MAX_VALUE);
        assert_eq!(decode(0x01), 2f32.powi(-9));
    }

    #[test]
    fn values_between_codes_go_to_the_nearest() {
        assert_eq!(decode(encode(1.06)), 1.0);
        assert_eq!(decode(encode(1.07)), 1.125);
        assert_eq!(decode(encode(1.0625)), 1.0, "a tie goes to the even code");
        assert_eq!(decode(encode(1.1875)), 1.25, "a tie goes to the even code");
        assert_eq!(decode(encode(1e9)), MAX_VALUE);
        assert_eq!(decode(encode(-0.0007)), 0.0);
        for code in 0..0x7e {
            let (low, high) = (decode(code), decode(code + 1));
            assert_eq!(encode(low + (high - low) * 0.49), code);
            assert_eq!(encode(low + (high - low) * 0.51), code + 1);
            assert_eq!(encode((low + high) / 2.0) & 1, 0, "between {low} and {high}");
        }
    }
}
