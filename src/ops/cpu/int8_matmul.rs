//! `out = x · weightᵀ` on vectors of bytes: INT8 weights and activations quantized per row.
//!
//! Sums of integers are exact, so neither order nor instruction set can change a result.

use std::ops::Range;

use super::share::Parts;
use super::simd::{Kernel, Simd};
use super::weight_rows::{Bytes, Coded, Scales, WeightRows};
use crate::formats::ROW_ALIGN;
use crate::formats::int8::quantize_row;

/// Output columns that share a pass over a row of `x`.
const COLS: usize = 4;

/// Activations as bytes.
#[derive(Clone, Copy)]
pub struct QuantizedRows<'a> {
    /// `[num_rows, k]`, rows padded with zeros to [`ROW_ALIGN`].
    pub codes: &'a [i8],
    /// One per row.
    pub scales: &'a [f32],
}

/// Quantizes one row of `x` to its padded codes; returns its scale.
pub fn quantize_padded(x: &[f32], codes: &mut [i8]) -> f32 {
    codes[x.len()..].fill(0);
    quantize_row(x, &mut codes[..x.len()])
}

/// One task: output columns for all rows.
pub struct Int8Columns<'a> {
    /// Activations.
    pub x: QuantizedRows<'a>,
    /// Weights.
    pub weights: Coded<'a, Bytes>,
    /// Added to every row.
    pub bias: Option<&'a [f32]>,
    /// Output columns of the whole matrix.
    pub num_cols: usize,
    /// Which columns to compute.
    pub cols: Range<usize>,
    /// Output; tasks write disjoint columns.
    pub out: &'a Parts<'a, f32>,
}

impl Kernel for Int8Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let width = self.weights.row_bytes();
        assert!(width.is_multiple_of(ROW_ALIGN));
        for col in self.cols.clone().step_by(COLS) {
            let cols = col..self.cols.end.min(col + COLS);
            let row_of = |i: usize| self.weights.row((col + i).min(cols.end - 1)).cast();
            let weights = std::array::from_fn(row_of);
            for (row, codes) in self.x.codes.chunks_exact(width).enumerate() {
                // SAFETY: `codes` and rows of weights have `width` bytes.
                let sums = unsafe { simd.dot4_i8(codes.as_ptr(), weights, width) };
                self.write(row, cols.clone(), sums);
            }
        }
    }
}

impl Int8Columns<'_> {
    /// Scales in the referee's order.
    #[inline(always)]
    fn write(&self, row: usize, cols: Range<usize>, sums: [i32; COLS]) {
        let Scales::F32(col_scales) = self.weights.scales() else {
            unreachable!("INT8 rows have f32 scales")
        };
        let at = row * self.num_cols;
        // SAFETY: this task alone writes these columns.
        let out = unsafe { self.out.part(at + cols.start..at + cols.end) };
        for ((out, sum), col) in out.iter_mut().zip(sums).zip(cols) {
            let scaled = sum as f32 * (self.x.scales[row] * col_scales[col]);
            *out = self.bias.map_or(scaled, |bias| scaled + bias[col]);
        }
    }
}
