//! Bytes with a scale per group of a row.
//!
//! `value = code · scale`, codes from -127 to 127, in blocks of sixteen rows (see `blocks`).
//! Q8_0 has groups of 32 with f16 scales; activations are quantized to bytes per group, as for
//! INT4. W8A16 is INT8 ([`int8::PerRow`]) whose activations keep their precision.

use half::f16;

use super::{Format, RowQuantizer, ScaleGrid, int8};

/// Group of Q8_0.
pub const Q8_0_GROUP: usize = 32;

/// Q8_0.
pub struct Q8_0;

impl RowQuantizer for Q8_0 {
    type Scale = f16;

    fn format(&self) -> Format {
        Format::Q8
    }

    fn grid(&self, _: usize) -> ScaleGrid {
        ScaleGrid::groups(Q8_0_GROUP)
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f16], _: &mut [u8]) {
        codes.fill(0);
        let groups = values.chunks(Q8_0_GROUP).zip(codes.chunks_mut(Q8_0_GROUP));
        for ((values, codes), scale) in groups.zip(scales) {
            *scale = int8::quantize_group(values, codes);
        }
    }
}

/// W8A16.
pub struct W8A16;

impl RowQuantizer for W8A16 {
    type Scale = f32;

    fn format(&self) -> Format {
        Format::W8A16
    }

    fn grid(&self, num_cols: usize) -> ScaleGrid {
        ScaleGrid::per_row(num_cols)
    }

    #[inline(always)]
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [f32], _: &mut [u8]) {
        int8::PerRow.quantize_row(values, codes, scales, &mut []);
    }
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;

    #[test]
    fn every_group_has_its_own_scale() {
        let values: Vec<f32> = (0..70).map(|i| if i < 32 { i as f32 } else { 0.01 }).collect();
        let matrix = quantize(&Q8_0, [1, 70], 1, |_, to| to.copy_from_slice(&values));
        for (got, want) in matrix.row(0).iter().zip(&values) {
            assert!((got - want).abs() <= want.abs() * 2e-3 + 0.13, "{got} for {want}");
        }
        assert!((matrix.row(0)[69] - 0.01).abs() < 1e-5);
    }
}
