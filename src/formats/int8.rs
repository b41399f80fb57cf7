//! INT8, W8A8: a byte per weight, a scale per output row, and activations that are quantized
//! to bytes per token while computing. Blocks of sixteen rows (see `blocks`).
//!
//! `value = code · scale`, codes from -127 to 127. A product sums integers, exactly, in any
//! order; the sum is multiplied by the token's scale and by the row's.

use half::f16;

use super::{Format, RowQuantizer, ScaleGrid, largest_magnitude, round_to_byte};

/// Largest magnitude of a code.
pub const MAX_CODE: f32 = 127.0;

/// Quantizes every row with its own scale.
pub struct PerRow;

impl RowQuantizer for PerRow {
    type Scale = f32;

    fn format(&self) -> Format {
        Format::Int8
    }

    fn grid(&self, num_cols: usize) -> ScaleGrid {
        ScaleGrid::per_row(num_cols)
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f32], _: &mut [u8]) {
        codes.fill(0);
        let (scale, inverse) = scale_of(values);
        for (code, value) in codes.iter_mut().zip(values) {
            *code = round_to_byte(value * inverse);
        }
        scales[0] = scale;
    }
}

/// The scale that makes the largest magnitude 127, and what values are multiplied by.
#[inline(always)]
fn scale_of(values: &[f32]) -> (f32, f32) {
    let largest = largest_magnitude(values);
    (largest / MAX_CODE, inverse_scale(largest))
}

/// What a value is multiplied by to become a code, when this is the largest magnitude of its
/// group. Finite even for the smallest numbers: 0 times it has to stay 0.
#[inline(always)]
pub fn inverse_scale(largest: f32) -> f32 {
    if largest > 0.0 { (MAX_CODE / largest).min(f32::MAX) } else { 0.0 }
}

/// Quantizes values to codes with one scale, which is returned: the largest magnitude becomes
/// 127 and the others are rounded to nearest, ties to even.
pub fn quantize_row(values: &[f32], codes: &mut [i8]) -> f32 {
    let (scale, inverse) = scale_of(values);
    for (code, value) in codes.iter_mut().zip(values) {
        *code = round_to_byte(value * inverse) as i8;
    }
    scale
}

/// As [`quantize_row`], for a scale that is stored as f16: codes fit the stored scale.
#[inline(always)]
pub fn quantize_group(values: &[f32], codes: &mut [u8]) -> f16 {
    let largest = largest_magnitude(values);
    let scale = f16::from_f32(largest / MAX_CODE);
    let inverse = if scale > f16::ZERO { 1.0 / scale.to_f32() } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = round_to_byte((value * inverse).clamp(-MAX_CODE, MAX_CODE));
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;

    #[test]
    fn a_row_comes_back_within_half_a_step() {
        let values = [0.5f32, -1.0, 0.25, 0.0, 0.999];
        let matrix = quantize(&PerRow, [1, 5], 1, |_, to| to.copy_from_slice(&values));
        for (got, want) in matrix.row(0).iter().zip(values) {
            assert!((got - want).abs() <= 0.5 / 127.0 + 1e-7, "{got} for {want}");
        }
        assert_eq!(matrix.data.size_bytes(), 16 * 64, "padded to a block of whole rows");
    }

    #[test]
    fn a_row_of_zeros_stays_zero() {
        let matrix = quantize(&PerRow, [2, 3], 1, |_, to| to.fill(0.0));
        assert_eq!(matrix.row(1), [0.0; 3]);
    }

    #[test]
    fn zeros_beside_the_smallest_numbers_stay_zero() {
        let mut codes = [1i8; 3];
        let scale = quantize_row(&[0.0, 1e-40, -1e-40], &mut codes);
        assert_eq!(codes[0], 0);
        assert!(codes.iter().all(|&code| (f32::from(code) * scale).abs() <= 1e-40), "{codes:?}");
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let read = |row: usize, to: &mut [f32]| {
            to.iter_mut().enumerate().for_each(|(i, x)| *x = ((row * 7 + i * 3) % 11) as f32);
        };
        let alone = quantize(&PerRow, [67, 70], 1, read);
        for threads in [2, 3, 16] {
            let shared = quantize(&PerRow, [67, 70], threads, read);
            assert_eq!(shared.data.as_slice::<u8>(), alone.data.as_slice::<u8>());
            assert_eq!(shared.row(66), alone.row(66));
        }
    }
}
