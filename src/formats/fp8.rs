//! FP8 E4M3 (the variant without infinities): a byte per weight and a scale per block, which may
//! be a row, 128 × 128 elements or the whole matrix.
//!
//! `value = e4m3 · scale`. The two codes that mean "not a number" do not occur in weights: they
//! would read as ±480 here.

use super::{Format, RowQuantizer, ScaleGrid, largest_magnitude, round};

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
pub fn encode(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(MAX_VALUE);
    // Adding this rounds to a multiple of the step between codes: 2⁻³ of the power of two
    // below, but never finer than the subnormal step 2⁻⁹.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = 2f32.powi(exponent - 3);
    let steps = round(magnitude / step) as i32;
    // Sixteen steps are the next power of two, which the exponent field counts by itself.
    sign | (steps + 8 * (exponent + 6)) as u8
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
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f32]) {
        let largest = largest_magnitude(values);
        codes.fill(0);
        scales[0] = if largest > 0.0 { largest / MAX_VALUE } else { 1.0 };
        for (code, value) in codes.iter_mut().zip(values) {
            *code = encode(value / scales[0]);
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
    }
}
