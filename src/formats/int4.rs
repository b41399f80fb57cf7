//! INT4: four bits per weight, a scale and perhaps a zero point per group of a row.
//!
//! `value = (code - zero) · scale`, codes from 0 to 15; without zero points `zero` is 8. Folded
//! blocks of sixteen rows (see `blocks`). Q4_0 is this layout with groups of 32 and no zero points.
//!
//! Activations are quantized to bytes with a scale per group of the same size, so that a group's
//! products are integers: their sum is exact, and it is scaled once.

use half::f16;

use super::{Format, RowQuantizer, ScaleGrid, round, round_to_byte, sum_lanes};

/// The zero point of symmetric codes.
pub const MIDDLE: u8 = 8;
/// The largest code.
const MAX_CODE: f32 = 15.0;
/// Lanes of sums: the compiler may use vectors.
const LANES: usize = 16;

/// Quantizes groups of this many elements (32, 64 or 128), each with a zero point: a group's
/// values lie seldom evenly about 0, and then codes that follow them have a finer scale.
pub struct Grouped(pub usize);

/// Quantizes groups of this many elements (32, 64 or 128) symmetrically.
pub struct Symmetric(pub usize);

impl RowQuantizer for Grouped {
    type Scale = f16;

    fn format(&self) -> Format {
        Format::Int4
    }

    fn grid(&self, _: usize) -> ScaleGrid {
        ScaleGrid::groups(self.0)
    }

    fn has_zero_points(&self) -> bool {
        true
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f16], zeros: &mut [u8]) {
        match self.0 {
            32 => quantize_groups::<32, true>(values, codes, scales, zeros),
            64 => quantize_groups::<64, true>(values, codes, scales, zeros),
            128 => quantize_groups::<128, true>(values, codes, scales, zeros),
            size => panic!("groups of {size}"),
        }
    }
}

impl RowQuantizer for Symmetric {
    type Scale = f16;

    fn format(&self) -> Format {
        Format::Int4
    }

    fn grid(&self, _: usize) -> ScaleGrid {
        ScaleGrid::groups(self.0)
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f16], _: &mut [u8]) {
        let zeros = &mut [0; 0];
        match self.0 {
            32 => quantize_groups::<32, false>(values, codes, scales, zeros),
            64 => quantize_groups::<64, false>(values, codes, scales, zeros),
            128 => quantize_groups::<128, false>(values, codes, scales, zeros),
            size => panic!("groups of {size}"),
        }
    }
}

/// Quantizes a row, padded with zeros to whole groups.
#[inline(always)]
fn quantize_groups<const G: usize, const ZEROS: bool>(
    values: &[f32],
    codes: &mut [u8],
    scales: &mut [f16],
    zeros: &mut [u8],
) {
    for (i, scale) in scales.iter_mut().enumerate() {
        let mut padded = [0.0; G];
        let rest = &values[(i * G).min(values.len())..];
        let group = match rest.first_chunk() {
            Some(group) => group,
            None => {
                padded[..rest.len()].copy_from_slice(rest);
                &padded
            }
        };
        let fit = if ZEROS { fit_with_zero_point(group) } else { fit_symmetric(group) };
        *scale = fit.scale;
        if ZEROS {
            zeros[i] = fit.zero as u8;
        }
        let mut group_codes = [0; G];
        let inverse = inverse_of(fit.scale.to_f32());
        for (code, &value) in group_codes.iter_mut().zip(group) {
            *code = round_to_byte(fit.nearest(value * inverse) + fit.zero);
        }
        let to = &mut codes[i * G..];
        let len = to.len().min(G);
        to[..len].copy_from_slice(&group_codes[..len]);
    }
}

/// Parts of the range from the least to the largest value that all codes may cover: clipping a
/// little costs less than the finer scale gains. The one that leaves the least squared error is
/// taken; more of them gain a hundredth of it.
const TRIED_PARTS: [f32; 3] = [1.0, 0.9, 0.8];

/// The scale and the zero point of a group; 0 has a code.
#[inline(always)]
fn fit_with_zero_point<const G: usize>(values: &[f32; G]) -> Fit {
    let (mut least, mut most) = ([0.0f32; LANES], [0.0f32; LANES]);
    for lanes in values.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            least[i] = if lanes[i] < least[i] { lanes[i] } else { least[i] };
            most[i] = if lanes[i] > most[i] { lanes[i] } else { most[i] };
        }
    }
    let (mut low, mut high) = (0.0, 0.0);
    for i in 0..LANES {
        low = if least[i] < low { least[i] } else { low };
        high = if most[i] > high { most[i] } else { high };
    }
    let inverse = MAX_CODE * inverse_of(high - low);
    let zero = round(-low * inverse);
    Fit::best(values, TRIED_PARTS.map(|part| inverse / part), zero)
}

/// Where the value of largest magnitude may be put, besides the ends of the codes' range (-8 to
/// 7), as for [`TRIED_PARTS`].
const TRIED_RANGES: [f32; 4] = [-8.0, -7.3, 7.0, 7.8];

/// The scale of a symmetric group.
#[inline(always)]
fn fit_symmetric<const G: usize>(values: &[f32; G]) -> Fit {
    let (mut largest, mut lanes_largest) = (0.0f32, [0.0f32; LANES]);
    for lanes in values.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            let is_larger = lanes[i].abs() > lanes_largest[i].abs();
            lanes_largest[i] = if is_larger { lanes[i] } else { lanes_largest[i] };
        }
    }
    for value in lanes_largest {
        largest = if value.abs() > largest.abs() { value } else { largest };
    }
    let inverse = inverse_of(largest);
    Fit::best(values, TRIED_RANGES.map(|range| range * inverse), f32::from(MIDDLE))
}

/// What turns the codes of a group into values.
struct Fit {
    scale: f16,
    zero: f32,
}

impl Fit {
    /// The scale that fits best the codes that one of these inverse scales gives. Least squares:
    /// with products `v · c` and squares `c²` summed, the best scale is their quotient, and what
    /// remains of `v²` is less by `(Σ v · c)² / Σ c²`.
    #[inline(always)]
    fn best<const G: usize, const N: usize>(
        values: &[f32; G],
        inverses: [f32; N],
        zero: f32,
    ) -> Fit {
        let fit = Fit { scale: f16::ZERO, zero };
        let (mut products, mut squares) = ([[0.0f32; LANES]; N], [[0.0f32; LANES]; N]);
        for lanes in values.as_chunks::<LANES>().0 {
            for n in 0..N {
                for i in 0..LANES {
                    let code = fit.nearest(lanes[i] * inverses[n]);
                    products[n][i] += lanes[i] * code;
                    squares[n][i] += code * code;
                }
            }
        }
        let (mut product, mut square) = (0.0, 1.0);
        for n in 0..N {
            let (p, s) = (sum_lanes(products[n]), sum_lanes(squares[n]));
            // Quotients are compared without dividing.
            if p * p * square > product * product * s {
                (product, square) = (p, s);
            }
        }
        Fit { scale: f16::from_f32(product / square), zero }
    }

    /// The nearest multiple of the scale that has a code.
    #[inline(always)]
    fn nearest(&self, quotient: f32) -> f32 {
        let (least, most) = (-self.zero, MAX_CODE - self.zero);
        let clipped = if quotient > least { quotient } else { least };
        round(if clipped < most { clipped } else { most })
    }
}

#[inline(always)]
fn inverse_of(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
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
    fn values_on_one_side_of_zero_use_all_codes() {
        let values: Vec<f32> = (0..128).map(|i| (i * 37 % 128) as f32 / 100.0 - 0.1).collect();
        for size in [32, 64, 128] {
            let read = |_: usize, to: &mut [f32]| to.copy_from_slice(&values);
            let matrix = quantize(&Grouped(size), [1, 128], 1, read);
            for (got, want) in matrix.row(0).iter().zip(&values) {
                assert!((got - want).abs() <= 0.06, "{got} for {want} in groups of {size}");
            }
        }
    }

    #[test]
    fn a_row_may_end_within_a_group() {
        // Every group has its least and its largest value fifteen steps apart, the short one too.
        let values: Vec<f32> = (0..140).map(|i| (i % 4 * 5) as f32 - 3.0).collect();
        for size in [32, 64, 128] {
            let read = |_: usize, to: &mut [f32]| to.copy_from_slice(&values);
            assert_eq!(quantize(&Grouped(size), [1, 140], 1, read).row(0), values);
        }
    }

    #[test]
    fn values_that_have_codes_come_back_exactly() {
        let values: Vec<f32> = (0..64).map(|i| ((i % 16) as f32 - 8.0) * 0.25).collect();
        let read = |_: usize, to: &mut [f32]| to.copy_from_slice(&values);
        assert_eq!(quantize(&Symmetric(32), [1, 64], 1, read).row(0), values);
        assert_eq!(quantize(&Grouped(32), [1, 64], 1, read).row(0), values);
    }

    #[test]
    fn a_group_of_zeros_stays_zero() {
        let matrix = quantize(&Grouped(64), [1, 64], 1, |_, to| to.fill(0.0));
        assert_eq!(matrix.row(0), [0.0; 64]);
    }

    #[test]
    fn zero_points_move_the_codes() {
        let mut matrix = quantize(&Symmetric(32), [1, 64], 1, |_, to| to.fill(1.0));
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
