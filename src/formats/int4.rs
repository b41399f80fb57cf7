//! INT4: four bits per weight, a scale and perhaps a zero point per group of a row.
//!
//! `value = (code - zero) · scale`, codes from 0 to 15; without zero points `zero` is 8. Folded
//! blocks of sixteen rows (see `blocks`). Q4_0 is this layout with groups of 32.
//!
//! Activations are quantized to bytes with a scale per group of the same size, so that a group's
//! products are integers: their sum is exact, and it is scaled once.

use half::f16;

use super::{Format, RowQuantizer, ScaleGrid, largest_magnitude, round, round_to_byte, sum_lanes};

/// The zero point of symmetric codes.
pub const MIDDLE: u8 = 8;

/// Quantizes groups of this many elements, a multiple of 32, symmetrically.
pub struct Grouped(pub usize);

impl RowQuantizer for Grouped {
    type Scale = f16;

    fn format(&self) -> Format {
        Format::Int4
    }

    fn grid(&self, _: usize) -> ScaleGrid {
        ScaleGrid::groups(self.0)
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f16]) {
        codes.fill(MIDDLE);
        let groups = values.chunks(self.0).zip(codes.chunks_mut(self.0));
        for ((values, codes), scale) in groups.zip(scales) {
            *scale = quantize_group(values, codes);
        }
    }
}

/// Where the value of largest magnitude may be put, besides the ends of the codes' range (-8 to
/// 7): clipping a little often costs less than it gains. The one with the least squared error is
/// taken, so more of them only cost time at load.
const TRIED_RANGES: [f32; 4] = [-8.0, -7.3, 7.0, 7.8];

/// Codes of a group, and the scale they fit best.
#[inline(always)]
fn quantize_group(values: &[f32], codes: &mut [u8]) -> f16 {
    let magnitude = largest_magnitude(values);
    let largest = if values.contains(&magnitude) { magnitude } else { -magnitude };
    let mut best = Fit { scale: f16::ZERO, gain: 0.0 };
    // No closure: it would not inherit the vectors that this function is compiled for.
    for range in TRIED_RANGES {
        let fit = Fit::new(values, largest / range);
        if fit.gain > best.gain {
            best = fit;
        }
    }
    let inverse = inverse_of(best.scale.to_f32());
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = round_to_byte(nearest(value * inverse) + f32::from(MIDDLE));
    }
    best.scale
}

/// The scale that fits best the codes that some scale gives.
struct Fit {
    scale: f16,
    /// How much of the values' squares the codes explain.
    gain: f32,
}

impl Fit {
    /// Least squares: with products `v · c` and squares `c²` summed, the best scale is their
    /// quotient, and what remains of `v²` is less by `(Σ v · c)² / Σ c²`.
    #[inline(always)]
    fn new(values: &[f32], scale: f32) -> Fit {
        // Lanes, so that the compiler may use vectors.
        let (mut products, mut squares) = ([0.0f32; 16], [0.0f32; 16]);
        let inverse = inverse_of(scale);
        let (whole, rest) = values.as_chunks::<16>();
        let mut last = [0.0; 16];
        last[..rest.len()].copy_from_slice(rest);
        for part in 0..=whole.len() {
            let lanes = if part < whole.len() { &whole[part] } else { &last };
            for i in 0..16 {
                let (value, code) = (lanes[i], nearest(lanes[i] * inverse));
                products[i] += value * code;
                squares[i] += code * code;
            }
        }
        let (product, square) = (sum_lanes(products), sum_lanes(squares));
        if square == 0.0 {
            return Fit { scale: f16::ZERO, gain: 0.0 };
        }
        Fit { scale: f16::from_f32(product / square), gain: product * product / square }
    }
}

#[inline(always)]
fn inverse_of(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The nearest multiple of the scale that has a code.
#[inline(always)]
fn nearest(quotient: f32) -> f32 {
    round(quotient.clamp(-8.0, 7.0))
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;
    use crate::tensor::Tensor;

    #[test]
    fn a_group_comes_back_within_a_step() {
        let values: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let matrix = quantize(&Grouped(64), [1, 128], 1, |_, to| to.copy_from_slice(&values));
        for (got, want) in matrix.row(0).iter().zip(&values) {
            assert!((got - want).abs() <= 1.0 / 7.0, "{got} for {want}");
        }
    }

    #[test]
    fn values_that_have_codes_come_back_exactly() {
        let values: Vec<f32> = (0..64).map(|i| ((i % 16) as f32 - 8.0) * 0.25).collect();
        let matrix = quantize(&Grouped(32), [1, 64], 1, |_, to| to.copy_from_slice(&values));
        assert_eq!(matrix.row(0), values);
    }

    #[test]
    fn zero_points_move_the_codes() {
        let mut matrix = quantize(&Grouped(32), [1, 64], 1, |_, to| to.fill(1.0));
        let before = matrix.row(0);
        let mut zeros = [MIDDLE; 32];
        zeros[16] = 0; // Row 0 of the block's second group.
        matrix.quantized.as_mut().unwrap().zero_points =
            Some(Tensor::from_slice(&zeros, [1, 2, 16]));
        let after = matrix.row(0);
        assert_eq!(before[..32], after[..32]);
        let scale = matrix.scale(0, 40);
        assert!((after[40] - before[40] - 8.0 * scale).abs() < 1e-6);
    }
}
