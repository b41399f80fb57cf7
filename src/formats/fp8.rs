//! FP8 E4M3 (the variant without infinities): a byte per weight, in blocks of sixteen rows (see
//! `blocks`), and a scale per row or per group of 128 elements of a row. Where a checkpoint has a
//! scale per 128 × 128 elements, its rows repeat it.
//!
//! `value = e4m3 · scale`. The two codes that mean "not a number" do not occur in weights: they
//! would read as ±480 here.
//!
//! FP8 tensor cores want both operands row-major ([`into_rows`]).

use super::blocks::{BLOCK_ROWS, deinterleave};
use super::{Format, PackedMatrix, RowQuantizer, ScaleGrid, largest_magnitude, round_to_byte};
use crate::tensor::{DType, Fp8, Tensor};

/// Largest finite value.
pub const MAX_VALUE: f32 = 448.0;

/// Sizes of row-major matrices are multiples of this: what products of FP8 count on.
pub const ROWS_UNIT: usize = 16;

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

/// Whether [`into_rows`] takes a matrix: one scale per row, and sizes that need no padding.
pub fn has_rows(matrix: &PackedMatrix) -> bool {
    let groups = matrix.quantized.as_ref().map(|q| q.scales.shape().sizes()[1]);
    let is_whole = |size: usize| size.is_multiple_of(ROWS_UNIT);
    matrix.format == Format::Fp8
        && groups == Some(1)
        && is_whole(matrix.num_rows)
        && is_whole(matrix.num_cols)
}

/// The same matrix row-major, without what blocks are padded with; any other than
/// [`has_rows`] says stays as it is.
pub fn into_rows(matrix: PackedMatrix) -> PackedMatrix {
    if !has_rows(&matrix) {
        return matrix;
    }
    let PackedMatrix { num_rows, num_cols, .. } = matrix;
    let (padded, width) = (matrix.row_bytes(), num_cols);
    let mut data = Tensor::zeros_on_large_pages(DType::Fp8, [num_rows, num_cols]);
    let mut apart = vec![0; BLOCK_ROWS * padded];
    let blocks = matrix.data.bytes().chunks_exact(BLOCK_ROWS * padded);
    let to = data.as_mut_slice::<Fp8>().chunks_exact_mut(BLOCK_ROWS * width);
    for (block, to) in blocks.zip(to) {
        deinterleave(block, &mut apart);
        for (from, to) in apart.chunks_exact(padded).zip(to.chunks_exact_mut(width)) {
            for (to, code) in to.iter_mut().zip(from) {
                *to = Fp8(*code);
            }
        }
    }
    PackedMatrix { format: Format::Fp8Rows, data, ..matrix }
}

#[cfg(test)]
mod tests {
    use super::super::quantize;
    use super::*;

    /// A matrix of this shape whose neighbouring elements all differ.
    fn matrix(shape: [usize; 2]) -> PackedMatrix {
        let value = move |row: usize, col: usize| ((row * 31 + col * 7) % 113) as f32 - 56.0;
        quantize(&PerRow, shape, 1, |row, to| {
            to.iter_mut().enumerate().for_each(|(col, to)| *to = value(row, col));
        })
    }

    #[test]
    fn rows_hold_what_blocks_held() {
        let blocks = matrix([48, 80]);
        let rows: Vec<_> = (0..48).map(|row| blocks.row(row)).collect();
        let apart = into_rows(blocks);
        assert_eq!((apart.format, apart.data.dtype()), (Format::Fp8Rows, DType::Fp8));
        assert_eq!(apart.data.shape().sizes(), [48, 80]);
        assert_eq!((apart.row_bytes(), apart.size_bytes()), (80, 48 * 80 + 48 * 4));
        assert_eq!((0..48).map(|row| apart.row(row)).collect::<Vec<_>>(), rows);
    }

    #[test]
    fn what_products_of_fp8_cannot_read_stays_in_blocks() {
        for shape in [[40, 80], [48, 72], [1, 16]] {
            assert_eq!(into_rows(matrix(shape)).format, Format::Fp8, "{shape:?}");
        }
        let mut grouped = matrix([16, 128]);
        let scales = Tensor::zeros(DType::F32, [1, 2, 16]);
        let quantized = grouped.quantized.as_mut().expect("it was quantized");
        (quantized.grid, quantized.scales) = (ScaleGrid::groups(64), scales);
        assert_eq!(into_rows(grouped).format, Format::Fp8);
    }

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
