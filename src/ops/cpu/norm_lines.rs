//! Norms whose results are only multiplied: a row goes from the norm to its lines through the
//! first-level cache, and is never written as floats.

use std::ops::Range;

use super::lines::{FillRows, LINE_BYTES, LineForm};
use super::rows::{scale_row, sum_row};
use super::simd::{Float, Kernel, Simd};

/// Rows of `x / rms(x) * weight` as lines; with a residual, `residual += x` first and the norm is
/// that of the residual. The arithmetic of `rows::Norm`, then of the form.
pub struct NormLines<'a, W, F> {
    /// The rows, of `width` elements each.
    pub x: &'a [f32],
    /// As many, updated.
    pub residual: Option<&'a mut [f32]>,
    /// `[width]`.
    pub weight: &'a [W],
    /// Added to the mean square.
    pub eps: f32,
    /// Room for a row.
    pub normed: &'a mut [f32],
    /// Which rows these are; no other task has them.
    pub rows: Range<usize>,
    /// Where they go.
    pub to: &'a FillRows<'a>,
    /// As what.
    pub form: F,
}

impl<W: Float, F: LineForm> Kernel for NormLines<'_, W, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let NormLines { x, mut residual, weight, eps, normed, rows, to, form } = self;
        let width = weight.len();
        for (i, row) in rows.enumerate() {
            let x = &x[i * width..][..width];
            let residual = residual.as_mut().map(|rows| &mut rows[i * width..][..width]);
            ask_for_next(simd, x);
            if let Some(residual) = &residual {
                ask_for_next(simd, residual);
            }
            let summed = sum_row(simd, x, residual);
            scale_row(simd, normed, summed, (weight, eps));
            form.fill_row(simd, normed, row, to);
        }
    }
}

/// Asks for the row that follows this one in memory, most often that of the next turn or task: it comes
/// while this one is computed.
#[inline(always)]
fn ask_for_next<S: Simd>(simd: S, row: &[f32]) {
    const LINE: usize = LINE_BYTES / size_of::<f32>();
    for at in (0..row.len()).step_by(LINE) {
        simd.prefetch(row.as_ptr().wrapping_add(row.len() + at));
    }
}
