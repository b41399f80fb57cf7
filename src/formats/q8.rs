//! Bytes with a scale per group of a row, for weight-only quantization: Q8_0 (groups of 32,
//! f16 scales) and W8A16 (one group per row).
//!
//! `value = code · scale`. Activations keep their precision.

use half::f16;

use super::{Format, ROW_ALIGN, RowQuantizer, ScaleGrid, int8};

/// Group of Q8_0.
pub const Q8_0_GROUP: usize = 32;

/// Quantizes groups of this many elements, or whole rows.
pub struct Grouped(pub Option<usize>);

impl RowQuantizer for Grouped {
    type Code = i8;
    type Scale = f16;

    fn format(&self) -> Format {
        Format::Q8
    }

    fn grid(&self, num_cols: usize) -> ScaleGrid {
        self.0.map_or(ScaleGrid::per_row(num_cols), ScaleGrid::groups)
    }

    fn codes_per_row(&self, num_cols: usize) -> usize {
        num_cols.next_multiple_of(ROW_ALIGN)
    }

    fn quantize_row(&self, values: &[f32], codes: &mut [i8], scales: &mut [f16]) {
        let group = self.grid(values.len()).cols;
        let groups = values.chunks(group).zip(codes.chunks_mut(group));
        for ((values, codes), scale) in groups.zip(scales) {
            *scale = int8::quantize_group(values, codes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;

    #[test]
    fn every_group_has_its_own_scale() {
        let values: Vec<f32> = (0..70).map(|i| if i < 32 { i as f32 } else { 0.01 }).collect();
        let by_group = Grouped(Some(Q8_0_GROUP));
        let matrix = quantize(&by_group, [1, 70], 1, |_, to| to.copy_from_slice(&values));
        for (got, want) in matrix.row(0).iter().zip(&values) {
            assert!((got - want).abs() <= want.abs() * 2e-3 + 0.13, "{got} for {want}");
        }
        assert!((matrix.row(0)[69] - 0.01).abs() < 1e-5);
    }
}
