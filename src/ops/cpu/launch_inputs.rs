//! How activations are brought once into the forms that the weights of an operation want.
//!
//! Rows that are to be normed first are normed, row by row, on their way there: what a norm yields
//! stays in the first-level cache, and is written as lines only. Where matrices want several
//! forms, or floats, the norm runs by itself.

use std::ops::Range;

use super::isa::Isa;
use super::lines::{
    AsBf16, AsCodes, CodedLines, FillLines, FillRows, LineBuffers, LineForm, Lines,
};
use super::norm_lines::NormLines;
use super::share::Parts;
use super::simd::{Float, Kernel};
use super::{CpuOps, with_float};
use crate::formats::{Format, PackedMatrix};
use crate::ops::args::{AddNormArgs, NormArgs, NormedRows, RowOperand};
use crate::tensor::{DType, View};

/// Rows of activations that one task prepares.
const FILL_ROWS: usize = 4;

/// What a product begins with.
pub(super) enum Activations<'a> {
    /// As they are.
    Rows(View<'a>),
    /// To be normed first.
    Normed(NormedRows<'a>),
}

impl<'a> Activations<'a> {
    pub(super) fn num_rows(&self) -> usize {
        match self {
            Activations::Rows(x) => x.num_rows(),
            Activations::Normed(rows) => rows.num_rows(),
        }
    }

    pub(super) fn width(&self) -> usize {
        match self {
            Activations::Rows(x) => x.width(),
            Activations::Normed(rows) => rows.width(),
        }
    }

    /// As they are, after the norm ran by itself.
    pub(super) fn settled(self, ops: &CpuOps) -> View<'a> {
        match self {
            Activations::Rows(x) => x,
            Activations::Normed(rows) => rows.run(ops),
        }
    }
}

/// A form in which kernels want activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// As they are.
    Floats,
    /// bf16 in lines.
    Bf16,
    /// Codes in lines, this many sharing a scale.
    Codes(usize),
}

impl Form {
    /// What a matrix wants.
    pub(super) fn of(isa: Isa, weight: &PackedMatrix) -> Form {
        match weight.format {
            Format::Dense => Form::Floats,
            Format::DenseBlocks | Format::W8A16 | Format::Fp8 if isa.multiplies_bf16() => {
                Form::Bf16
            }
            Format::DenseBlocks | Format::W8A16 | Format::Fp8 => Form::Floats,
            Format::Fp8Rows => panic!("FP8 lies row-major on GPUs only"),
            Format::Int8 => Form::Codes(usize::MAX),
            Format::Q8 | Format::Int4 | Format::Mxfp4 => {
                let quantized = weight.quantized.as_ref();
                Form::Codes(quantized.expect("a quantized matrix has scales").grid.cols)
            }
        }
    }
}

/// Room for prepared activations.
#[derive(Default)]
pub struct Prepared {
    /// Of the operation at hand.
    pub(super) x: InputBuffers,
    /// Of the middle of a gated MLP.
    pub(super) middle: LineBuffers,
}

/// Room for activations in all forms of one operation; matrices of an operation rarely want
/// more than one.
#[derive(Default)]
pub(super) struct InputBuffers {
    lines: Vec<LineBuffers>,
}

impl Prepared {
    /// Makes room without touching it.
    pub fn reserve(&mut self, max_rows: usize, max_width: usize) {
        self.x.lines.resize_with(1, LineBuffers::default);
        self.x.lines[0].reserve(max_rows, max_width);
        self.middle.reserve(max_rows, max_width);
    }
}

/// Bytes that the backend takes for operations on up to `max_rows` rows of `max_width`: prepared
/// activations, and for each thread some blocks of weights or the tile of an attention.
pub fn scratch_bytes(max_rows: usize, max_width: usize, threads: usize) -> usize {
    const BYTES_PER_THREAD: usize = 2 << 20;
    let [lines, cells] = LineBuffers::words(max_rows, max_width);
    4 * 2 * (lines + 2 * cells) + threads * BYTES_PER_THREAD
}

/// Activations in one form.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    Floats,
    Bf16(Lines<'a>),
    Codes(CodedLines<'a>),
}

/// Activations of one operation.
pub(super) struct Inputs<'a> {
    /// As they are; empty when no matrix wants them so.
    pub(super) x: &'a [f32],
    pub(super) k: usize,
    pub(super) num_rows: usize,
    /// In every form that some matrix wants.
    pub(super) forms: Vec<(Form, Input<'a>)>,
}

impl<'a> Inputs<'a> {
    pub(super) fn in_form(&self, form: Form) -> Input<'a> {
        let found = self.forms.iter().find(|(ready, _)| *ready == form);
        found.expect("activations were prepared for every matrix").1
    }
}

/// Rows and the norm that they get on their way into lines.
struct Norming<'a> {
    /// `[num_rows, width]`.
    x: &'a [f32],
    /// `[num_rows, width]`, updated.
    residual: Option<Parts<'a, f32>>,
    /// `[width]`.
    weight: View<'a>,
    eps: f32,
}

impl<'a> Norming<'a> {
    /// Panics on a layer norm, which runs by itself.
    fn of(rows: NormedRows<'a>) -> Norming<'a> {
        match rows {
            NormedRows::Norm(NormArgs { x, weight, eps, .. }) => {
                Norming { x: x.as_slice(), residual: None, weight, eps }
            }
            NormedRows::AddNorm(AddNormArgs { x, residual, weight, eps, .. }) => {
                let residual = Some(Parts::new(residual.into_mut_slice()));
                Norming { x: x.as_slice(), residual, weight, eps }
            }
            NormedRows::LayerNorm(_) => panic!("a layer norm runs by itself"),
        }
    }
}

impl CpuOps {
    /// Brings activations into the forms that the matrices want.
    pub(super) fn prepare<'a>(
        &self,
        buffers: &'a mut InputBuffers,
        x: Activations<'a>,
        weights: &[&PackedMatrix],
    ) -> Inputs<'a> {
        let (num_rows, k) = (x.num_rows(), x.width());
        let mut wanted: Vec<Form> = Vec::new();
        for weight in weights {
            let form = Form::of(self.isa, weight);
            if !wanted.contains(&form) {
                wanted.push(form);
            }
        }
        let lines = &mut buffers.lines;
        if lines.len() < wanted.len() {
            lines.resize_with(wanted.len(), LineBuffers::default);
        }
        let x = match (x, &wanted[..]) {
            (Activations::Normed(rows), &[form @ (Form::Bf16 | Form::Codes(_))])
                if !matches!(rows, NormedRows::LayerNorm(_)) =>
            {
                let norming = Norming::of(rows);
                let input = self.normed_input(form, &mut lines[0], (norming, num_rows, k));
                return Inputs { x: &[], k, num_rows, forms: vec![(form, input)] };
            }
            (x, _) => x.settled(self).as_slice::<f32>(),
        };
        let forms = wanted.into_iter().zip(lines);
        let forms = forms.map(|(form, buffers)| (form, self.input(form, buffers, (x, k))));
        Inputs { x, k, num_rows, forms: forms.collect() }
    }

    fn input<'a>(
        &self,
        form: Form,
        buffers: &'a mut LineBuffers,
        (x, k): (&[f32], usize),
    ) -> Input<'a> {
        let num_rows = x.len() / k;
        match form {
            Form::Floats => Input::Floats,
            Form::Bf16 => {
                let mut filling = buffers.for_bf16(num_rows, k);
                let to = &filling.parts();
                self.fill(num_rows, |rows| FillLines { x, k, rows, to, form: AsBf16 });
                Input::Bf16(filling.lines())
            }
            Form::Codes(group) => {
                let mut filling = buffers.for_codes(num_rows, k, group);
                let to = &filling.parts();
                self.fill(num_rows, |rows| FillLines { x, k, rows, to, form: AsCodes });
                Input::Codes(filling.codes())
            }
        }
    }

    fn fill<K: Kernel<Output = ()>>(
        &self,
        num_rows: usize,
        kernel: impl Fn(Range<usize>) -> K + Sync,
    ) {
        self.pool.run(num_rows.div_ceil(FILL_ROWS), |_, task| {
            let first = task * FILL_ROWS;
            self.isa.run(kernel(first..num_rows.min(first + FILL_ROWS)));
        });
    }

    fn normed_input<'a>(
        &self,
        form: Form,
        buffers: &'a mut LineBuffers,
        (norming, num_rows, k): (Norming<'_>, usize, usize),
    ) -> Input<'a> {
        match form {
            Form::Floats => panic!("floats are no lines"),
            Form::Bf16 => {
                let mut filling = buffers.for_bf16(num_rows, k);
                self.norm_into(&norming, AsBf16, &filling.parts());
                Input::Bf16(filling.lines())
            }
            Form::Codes(group) => {
                let mut filling = buffers.for_codes(num_rows, k, group);
                self.norm_into(&norming, AsCodes, &filling.parts());
                Input::Codes(filling.codes())
            }
        }
    }

    fn norm_into(&self, norming: &Norming<'_>, form: impl LineForm, to: &FillRows<'_>) {
        let weight = norming.weight;
        with_float!(weight.dtype(), W =>
            self.norm_lines(norming, weight.as_slice::<W>(), form, to));
    }

    fn norm_lines<W: Float>(
        &self,
        norming: &Norming<'_>,
        weight: &[W],
        form: impl LineForm,
        to: &FillRows<'_>,
    ) {
        let &Norming { x, ref residual, eps, .. } = norming;
        let width = weight.len();
        let num_rows = x.len() / width;
        self.pool.run(num_rows.div_ceil(FILL_ROWS), |thread, task| {
            let first = task * FILL_ROWS;
            let rows = first..num_rows.min(first + FILL_ROWS);
            let part = rows.start * width..rows.end * width;
            let scratch = &mut self.scratch.lock(thread)[0];
            self.isa.run(NormLines {
                x: &x[part.clone()],
                // SAFETY: tasks have different rows.
                residual: residual.as_ref().map(|all| unsafe { all.part(part) }),
                weight,
                eps,
                normed: scratch.take(width),
                rows,
                to,
                form,
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_reserved_for_every_smaller_operation() {
        for (max_rows, max_width) in [(1, 1), (16, 64), (33, 896), (2048, 4865)] {
            let [lines, cells] = LineBuffers::words(max_rows, max_width);
            for rows in [1, max_rows.div_ceil(2), max_rows] {
                let needed = LineBuffers::words(rows, max_width);
                assert!(needed[0] <= lines && needed[1] <= cells, "{rows} × {max_width} lines");
            }
        }
    }
}
