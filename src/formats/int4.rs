//! INT4: four bits per weight, a scale and perhaps a zero point per group of a row.
//!
//! `value = (code - zero) · scale`, codes from 0 to 15; without zero points `zero` is 8. A
//! chunk of 64 elements takes 32 bytes: byte `j` holds element `j` in its low half and element
//! `32 + j` in its high half, so that either half of a chunk is one row of a tile.
//! Q4_0 is this layout with groups of 32.

use half::f16;

use super::{Format, ROW_ALIGN, RowQuantizer, ScaleGrid, round};

/// The zero point of symmetric codes.
pub const MIDDLE: f32 = 8.0;

/// The code of element `col` of a row's bytes, as a number.
pub fn code(row: &[u8], col: usize) -> f32 {
    let byte = row[col / 64 * 32 + col % 32];
    f32::from(if col % 64 < 32 { byte & 15 } else { byte >> 4 })
}

/// Stores the codes of a row, one per byte, in the layout above.
pub fn pack_row(codes: &[u8], row: &mut [u8]) {
    row.fill(0x88);
    for (col, &code) in codes.iter().enumerate() {
        let byte = &mut row[col / 64 * 32 + col % 32];
        let (shift, keep) = if col % 64 < 32 { (0, 0xf0) } else { (4, 0x0f) };
        *byte = *byte & keep | (code & 15) << shift;
    }
}

/// Quantizes groups of this many elements, a multiple of 32, symmetrically.
pub struct Grouped(pub usize);

impl RowQuantizer for Grouped {
    type Code = u8;
    type Scale = f16;

    fn format(&self) -> Format {
        Format::Int4
    }

    fn grid(&self, _: usize) -> ScaleGrid {
        ScaleGrid::groups(self.0)
    }

    fn codes_per_row(&self, num_cols: usize) -> usize {
        num_cols.next_multiple_of(ROW_ALIGN) / 2
    }

    fn quantize_row(&self, values: &[f32], packed: &mut [u8], scales: &mut [f16]) {
        let mut codes = vec![0; values.len()];
        let groups = values.chunks(self.0).zip(codes.chunks_mut(self.0));
        for ((values, codes), scale) in groups.zip(scales) {
            *scale = quantize_group(values, codes);
        }
        pack_row(&codes, packed);
    }
}

/// Where the value of largest magnitude is put. Codes reach from -8 to 7, and clipping a little
/// often costs less than it gains, so the range with the least squared error is taken.
const TRIED_RANGES: [f32; 4] = [-8.0, -7.4, 7.0, 7.6];

/// Codes of a group, and the scale they fit best.
fn quantize_group(values: &[f32], codes: &mut [u8]) -> f16 {
    let largest =
        values.iter().copied().fold(0.0, |a: f32, b| if b.abs() > a.abs() { b } else { a });
    let candidates = TRIED_RANGES.map(|range| f16::from_f32(largest / range));
    let errors = candidates.map(|scale| squared_error(values, scale.to_f32()));
    let less = |best: usize, i: usize| if errors[i] < errors[best] { i } else { best };
    let best = candidates[(1..candidates.len()).fold(0, less)];
    let inverse = inverse_of(best.to_f32());
    for (code, &value) in codes.iter_mut().zip(values) {
        *code = (nearest(value * inverse) + MIDDLE) as u8;
    }
    best
}

fn squared_error(values: &[f32], scale: f32) -> f32 {
    let inverse = inverse_of(scale);
    let error = |value: f32| value - nearest(value * inverse) * scale;
    values.iter().map(|&value| error(value) * error(value)).sum()
}

fn inverse_of(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The nearest multiple of the scale that has a code.
fn nearest(quotient: f32) -> f32 {
    round(quotient.clamp(-8.0, 7.0))
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;
    use crate::tensor::Tensor;

    #[test]
    fn codes_come_back_from_where_they_were_put() {
        let codes: Vec<u8> = (0..100).map(|i| (i * 7 % 16) as u8).collect();
        let mut row = vec![0; 64];
        pack_row(&codes, &mut row);
        for (col, &want) in codes.iter().enumerate() {
            assert_eq!(code(&row, col), f32::from(want), "element {col}");
        }
    }

    #[test]
    fn a_group_comes_back_within_a_step() {
        let values: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let matrix = quantize(&Grouped(64), [1, 128], 1, |_, to| to.copy_from_slice(&values));
        for (got, want) in matrix.row(0).iter().zip(&values) {
            assert!((got - want).abs() <= 1.0 / 7.0, "{got} for {want}");
        }
    }

    #[test]
    fn zero_points_move_the_codes() {
        let mut matrix = quantize(&Grouped(32), [1, 64], 1, |_, to| to.fill(1.0));
        let before = matrix.row(0);
        let zeros = Tensor::from_slice(&[8u8, 0], [1, 2]);
        matrix.quantized.as_mut().unwrap().zero_points = Some(zeros);
        let after = matrix.row(0);
        assert_eq!(before[..32], after[..32]);
        let scale = matrix.scale(0, 40);
        assert!((after[40] - before[40] - 8.0 * scale).abs() < 1e-6);
    }
}
