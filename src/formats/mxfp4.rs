//! MXFP4 (OCP Microscaling Formats 1.0): four bits per weight and a power of two per 32 of a row.
//!
//! A code is E2M1: a sign, two bits of exponent, one of mantissa, hence 0, 0.5, 1, 1.5, 2, 3, 4 or
//! 6. A scale is E8M0: a byte that stands for 2^(byte - 127); 255 would be no number and does not
//! occur. Folded blocks of sixteen rows (see `blocks`), with scales as the bytes that they are, so
//! that a weight takes 4.25 bits: f16, which other formats have, would take 4.5 and not reach as
//! far, and a shift makes an f32 of a byte.
//!
//! Twice a code is a whole number up to 12, so that products are those of integers: as for INT4,
//! activations are quantized to bytes per group, and the half goes to the scale.

use super::{
    Format, PackedMatrix, RowLayout, RowParts, RowQuantizer, ScaleGrid, largest_magnitude,
    pack_rows, round, round_to_byte, sum_lanes,
};

/// Elements that share a scale.
pub const GROUP: usize = 32;
/// The scale that is no number.
pub const NAN_SCALE: u8 = 255;
/// Added to twice a code, so that it is a byte without a sign.
pub const OFFSET: u8 = 12;
/// Twice what each code stands for, and [`OFFSET`].
pub const OFFSET_VALUES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
/// The largest code without its sign.
const MAX_CODE: f32 = 7.0;
/// Bits of an f32's mantissa.
const MANTISSA_BITS: u32 = 23;
/// The sign of a code.
const SIGN: u8 = 8;
/// The largest exponent that is chosen: its inverse is a normal f32 still.
const MAX_SCALE: i32 = 253;
/// Lanes of sums: the compiler may use vectors.
const LANES: usize = 16;

/// Twice what a code stands for.
#[inline(always)]
pub fn doubled(code: u8) -> i32 {
    i32::from(OFFSET_VALUES[usize::from(code & 15)]) - i32::from(OFFSET)
}

/// Half of what a scale stands for.
#[inline(always)]
pub fn half_scale(scale: u8) -> f32 {
    /// 2^-127, which has no exponent of its own in an f32.
    const LEAST: u32 = 1 << (MANTISSA_BITS - 1);
    f32::from_bits((u32::from(scale) << MANTISSA_BITS).max(LEAST)) * 0.5
}

/// Quantizes rows.
pub struct Mxfp4;

impl RowQuantizer for Mxfp4 {
    type Scale = u8;

    fn format(&self) -> Format {
        Format::Mxfp4
    }

    fn grid(&self, _: usize) -> ScaleGrid {
        ScaleGrid::groups(GROUP)
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [u8], _: &mut [u8]) {
        let (codes, _) = codes.as_chunks_mut::<GROUP>();
        for (i, (codes, scale)) in codes.iter_mut().zip(scales).enumerate() {
            let mut padded = [0.0; GROUP];
            let rest = &values[(i * GROUP).min(values.len())..];
            let group = match rest.first_chunk() {
                Some(group) => group,
                None => {
                    padded[..rest.len()].copy_from_slice(rest);
                    &padded
                }
            };
            *scale = best_scale(group);
            let inverse = inverse_of(*scale);
            for (code, &value) in codes.iter_mut().zip(group) {
                let sign = (value.to_bits() >> 28) as u8 & SIGN;
                *code = round_to_byte(nearest(value.abs() * inverse).0) | sign;
            }
        }
    }
}

/// The scale of a group. The standard's, 2^(floor(log2(largest)) - 2), cuts off what is above 6 of
/// it, up to a quarter of the largest value; twice as much cuts off nothing, with steps twice as
/// far apart. The one that leaves less squared error is taken: on the bundled model 3 % less of it.
#[inline(always)]
fn best_scale(values: &[f32; GROUP]) -> u8 {
    let exponent = (largest_magnitude(values).to_bits() >> MANTISSA_BITS) as i32;
    let scale = (exponent - 2).clamp(0, MAX_SCALE - 1) as u8;
    let inverse = inverse_of(scale);
    let (mut fine, mut coarse) = ([0.0f32; LANES], [0.0f32; LANES]);
    for lanes in values.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            let y = lanes[i].abs() * inverse;
            let (by_fine, by_coarse) = (y - nearest(y).1, y - 2.0 * nearest(y * 0.5).1);
            fine[i] += by_fine * by_fine;
            coarse[i] += by_coarse * by_coarse;
        }
    }
    scale + u8::from(sum_lanes(coarse) < sum_lanes(fine))
}

/// The inverse of what a scale up to [`MAX_SCALE`] stands for.
#[inline(always)]
fn inverse_of(scale: u8) -> f32 {
    f32::from_bits((254 - u32::from(scale)) << MANTISSA_BITS)
}

/// The code nearest to a magnitude, ties to an even code, and what it stands for. Codes are half,
/// one or two apart.
#[inline(always)]
fn nearest(magnitude: f32) -> (f32, f32) {
    let (per_one, distance, first) = match magnitude {
        y if y < 2.0 => (2.0, 0.5, 0.0),
        y if y < 4.0 => (1.0, 1.0, 2.0),
        _ => (0.5, 2.0, 4.0),
    };
    let code = round(magnitude * per_one) + first;
    let code = if code < MAX_CODE { code } else { MAX_CODE };
    (code, (code - first) * distance)
}

/// Packs codes and scales as checkpoints have them, on `threads` threads: `row` gives a row's
/// codes, two to a byte with the first in the low half, and its scales.
pub fn pack<'a>(
    [num_rows, num_cols]: [usize; 2],
    threads: usize,
    row: impl Fn(usize) -> (&'a [u8], &'a [u8]) + Sync,
) -> PackedMatrix {
    let layout =
        RowLayout { format: Format::Mxfp4, grid: ScaleGrid::groups(GROUP), has_zero_points: false };
    let fill = |i: usize, parts: RowParts<'_, u8>| {
        let (codes, scales) = row(i);
        parts.codes.fill(0);
        for (at, code) in parts.codes[..num_cols].iter_mut().enumerate() {
            *code = codes[at / 2] >> (at % 2 * 4) & 15;
        }
        parts.scales.fill(0);
        let groups = num_cols.div_ceil(GROUP);
        parts.scales[..groups].copy_from_slice(&scales[..groups]);
    };
    pack_rows(layout, [num_rows, num_cols], threads, || fill)
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;

    /// The numbers of the standard's table 5.
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

    fn quantized(values: &[f32]) -> PackedMatrix {
        quantize(&Mxfp4, [1, values.len()], 1, |_, to| to.copy_from_slice(values))
    }

    #[test]
    fn codes_and_scales_stand_for_the_numbers_of_the_standard() {
        for (code, value) in VALUES.into_iter().enumerate() {
            assert_eq!(doubled(code as u8) as f32, 2.0 * value);
            assert_eq!(doubled(code as u8 | SIGN) as f32, -2.0 * value);
        }
        assert_eq!(half_scale(127), 0.5);
        assert_eq!(half_scale(254), 2f32.powi(126));
        assert_eq!(half_scale(1), 2f32.powi(-127));
        assert_eq!(f64::from(half_scale(0)), 2f64.powi(-128));
    }

    #[test]
    fn magnitudes_go_to_the_nearest_code_and_ties_to_the_even_one() {
        for (code, pair) in VALUES.windows(2).enumerate() {
            let (low, high) = (pair[0], pair[1]);
            let even = code + code % 2;
            assert_eq!(nearest(low), (code as f32, low));
            assert_eq!(nearest(low + (high - low) * 0.49), (code as f32, low));
            assert_eq!(nearest(low + (high - low) * 0.51), (code as f32 + 1.0, high));
            assert_eq!(nearest((low + high) / 2.0), (even as f32, VALUES[even]));
        }
        assert_eq!(nearest(7.9), (7.0, 6.0));
    }

    #[test]
    fn values_that_have_codes_come_back_exactly() {
        for exponent in [-120, -3, 0, 9, 100] {
            let scale = 2f32.powi(exponent);
            let sign = |i: usize| if i.is_multiple_of(3) { -scale } else { scale };
            let value = |i: usize| VALUES[i % 8] * sign(i);
            let values: Vec<f32> = (0..70).map(value).collect();
            assert_eq!(quantized(&values).row(0), values, "2^{exponent}");
        }
    }

    #[test]
    fn a_group_that_would_be_cut_off_has_a_larger_scale_if_that_is_nearer() {
        let mut values = [0.01f32; 32];
        values[3] = -7.6;
        let matrix = quantized(&values);
        assert_eq!((matrix.row(0)[3], matrix.scale(0, 0)), (-8.0, 1.0));
        // One large value, but many that need the finer steps.
        let mut values = [0.5f32; 32];
        values[3] = 6.4;
        let matrix = quantized(&values);
        assert_eq!((matrix.row(0)[3], matrix.row(0)[4], matrix.scale(0, 0)), (6.0, 0.5, 0.5));
    }

    #[test]
    fn every_group_has_its_own_scale_and_zeros_stay_zero() {
        let values: Vec<f32> = (0..100).map(|i| if i < 32 { 0.0 } else { i as f32 }).collect();
        let matrix = quantized(&values);
        assert_eq!(matrix.row(0)[..32], [0.0; 32]);
        for (got, want) in matrix.row(0).iter().zip(&values) {
            assert!((got - want).abs() <= want / 4.0, "{got} for {want}");
        }
        assert_eq!(matrix.size_bytes(), 16 * (64 + 4));
    }

    #[test]
    fn stored_codes_are_read_low_half_first() {
        let codes: Vec<u8> = (0..64).map(|i| (2 * i % 16) | (((2 * i + 1) % 16) << 4)).collect();
        let scales = [127, 128, 126, 127];
        let matrix = pack([2, 64], 2, |row| (&codes[32 * row..][..32], &scales[2 * row..][..2]));
        let want = |code: usize| VALUES[code % 8] * if code % 16 < 8 { 1.0 } else { -1.0 };
        for row in 0..2 {
            for (col, got) in matrix.row(row).into_iter().enumerate() {
                let scale = [[1.0, 2.0], [0.5, 1.0]][row][col / 32];
                assert_eq!(got, want(col) * scale, "row {row}, column {col}");
            }
        }
    }
}
