//! How experts run, in ascending order of their ids.
//!
//! An expert of few tokens is as fast as its weights stream, and often over in microseconds. Such
//! experts run together, so that threads are forked and joined for a group instead of for each.
//! An expert of many tokens is a gated MLP by itself. Its rows have the same bits either way.
//!
//! Weighted results are added to the output in the order of the experts, so that a token's sum is
//! the same in every batch.

use std::ops::Range;
use std::sync::PoisonError;

use super::CpuOps;
use super::experts::ExpertTokens;
use super::isa::Isa;
use super::launch::TASK_ELEMENTS;
use super::launch_inputs::{Activations, Form, Input, Inputs};
use super::launch_matmul::{Planned, Product, Weighted, fuses};
use super::lines::{AsBf16, AsCodes, FillLines, FillRows, Filling, LineBuffers};
use super::share::Parts;
use super::simd::{Kernel, Simd, load, store};
use super::weight_blocks::{Place, Rows};
use crate::ops::StepLimits;
use crate::ops::args::{
    Activation, Expert, ExpertMlpArgs, ExpertScratch, GatedMatmulArgs, GatedMlpArgs, Projection,
};
use crate::tensor::{View, ViewMut};

/// Up to this many rows, kernels stream weights instead of keeping them in a cache.
const FEW_ROWS: usize = 32;
/// Most experts that run together: a sixteenth of a fork is little beside any expert.
const MOST_TOGETHER: usize = 16;
/// Columns below which adding rows up is not cut: whole vectors, and whole cache lines of a row.
const ADDED_COLS: usize = 64;

/// What is kept for the next operation.
#[derive(Default)]
pub struct ExpertState {
    tokens: ExpertTokens,
    /// Prepared activations, of each expert that runs with others.
    lines: Vec<LineBuffers>,
}

impl ExpertState {
    /// Makes room for steps of up to this size, without touching it.
    pub fn reserve(&mut self, limits: &StepLimits) {
        let num_choices = limits.max_num_tokens * limits.experts_per_token;
        self.tokens.reserve(num_choices, limits.num_experts);
        self.lines.resize_with(most_together(limits), LineBuffers::default);
        let rows = FEW_ROWS.min(limits.max_num_tokens);
        self.lines.iter_mut().for_each(|lines| lines.reserve(rows, limits.max_width));
    }

    /// Bytes of that room.
    pub fn size_bytes(limits: &StepLimits) -> usize {
        let num_choices = limits.max_num_tokens * limits.experts_per_token;
        let rows = FEW_ROWS.min(limits.max_num_tokens);
        let [lines, cells] = LineBuffers::words(rows, limits.max_width);
        ExpertTokens::size_bytes(num_choices, limits.num_experts)
            + most_together(limits) * 4 * (lines + 2 * cells)
    }
}

/// Most experts that run together in steps of this size.
fn most_together(limits: &StepLimits) -> usize {
    limits.num_experts.min(limits.max_num_tokens * limits.experts_per_token).min(MOST_TOGETHER)
}

/// A product of one of the experts that run together.
struct Part<'a> {
    product: Product<'a>,
    /// `[num_rows, k]`.
    x: &'a [f32],
    /// `[num_rows, width]`.
    out: &'a mut [f32],
}

/// Activations of one part, and the form that its matrix wants.
#[derive(Clone, Copy)]
struct Fill<'a> {
    x: &'a [f32],
    k: usize,
    num_rows: usize,
    form: Form,
}

impl CpuOps {
    pub(super) fn multiply_experts(&self, args: ExpertMlpArgs<'_>) {
        let ExpertMlpArgs { mut out, x, experts, activation, expert_ids, weights, mut scratch } =
            args;
        let mut state = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        let ExpertState { tokens, lines } = &mut *state;
        tokens.sort(expert_ids.as_slice(), weights.as_slice(), expert_ids.size(1), experts.len());
        out.reborrow().into_mut_slice::<f32>().fill(0.0);
        let room = scratch.gathered.size(0);
        let mut done = 0;
        while let Some(group) = self.next_experts(experts, tokens, done, room) {
            done = group.end;
            let (of_group, weights) = tokens.of(group.clone());
            if self.streams(experts, tokens, group.start) {
                let to = scratch.gathered.reborrow().into_rows(0..of_group.len());
                self.copy_rows(to.into_mut_slice(), x.as_slice::<f32>(), of_group, x.size(1));
                let chosen = group.filter(|&expert| tokens.count(expert) > 0);
                let chosen = chosen.map(|expert| (&experts[expert], tokens.count(expert)));
                self.run_together(&chosen.collect::<Vec<_>>(), activation, &mut scratch, lines);
            } else {
                self.run_alone(&experts[group.start], activation, x, of_group, &mut scratch);
            }
            let yielded = scratch.yielded.as_view().rows(0..of_group.len());
            self.add_weighted(out.reborrow(), yielded, of_group, weights);
        }
    }

    /// The next experts that some token chose, from `done` on: as many as run together within
    /// this many rows, or one that runs alone.
    fn next_experts(
        &self,
        experts: &[Expert],
        tokens: &ExpertTokens,
        done: usize,
        room: usize,
    ) -> Option<Range<usize>> {
        let mut chosen = (done..experts.len()).filter(|&expert| tokens.count(expert) > 0);
        let first = chosen.next()?;
        let mut rows = tokens.count(first);
        let fits = |expert: &usize| {
            rows += tokens.count(*expert);
            rows <= room && self.streams(experts, tokens, *expert)
        };
        let last = if self.streams(experts, tokens, first) {
            chosen.take(MOST_TOGETHER - 1).take_while(fits).last()
        } else {
            None
        };
        Some(first..last.unwrap_or(first) + 1)
    }

    /// Whether an expert has few tokens, and matrices whose kernels gain from others beside them.
    fn streams(&self, experts: &[Expert], tokens: &ExpertTokens, expert: usize) -> bool {
        let Expert { gate, up, down } = &experts[expert];
        let in_blocks = gate.format.is_in_blocks() && down.format.is_in_blocks();
        tokens.count(expert) <= FEW_ROWS && in_blocks && fuses(gate, up)
    }

    /// An expert as a gated MLP of its tokens, into the first rows of `scratch.yielded`.
    fn run_alone(
        &self,
        expert: &Expert,
        activation: Activation,
        x: View<'_>,
        tokens: &[u32],
        scratch: &mut ExpertScratch<'_>,
    ) {
        let rows = 0..tokens.len();
        let ExpertScratch { gathered, middle, yielded } = scratch;
        let [middle, gate_out, up_out] =
            middle.each_mut().map(|room| room.reborrow().into_rows(rows.clone()));
        // A token has an expert once, so as many tokens as there are, are all of them.
        let x = if tokens.len() == x.size(0) {
            x
        } else {
            let to = gathered.reborrow().into_rows(rows.clone()).into_mut_slice();
            self.copy_rows(to, x.as_slice::<f32>(), tokens, x.size(1));
            gathered.as_view().rows(rows.clone())
        };
        let Expert { gate, up, down } = expert;
        self.multiply_mlp(GatedMlpArgs {
            gated: GatedMatmulArgs {
                out: middle,
                x: Activations::Rows(x),
                gate: (gate, None),
                up: (up, None),
                activation,
                scratch: [gate_out, up_out],
            },
            down: Projection { out: yielded.reborrow().into_rows(rows), weight: down, bias: None },
        });
    }

    /// Experts, each with its number of tokens, whose gathered rows follow each other.
    fn run_together(
        &self,
        experts: &[(&Expert, usize)],
        activation: Activation,
        scratch: &mut ExpertScratch<'_>,
        lines: &mut Vec<LineBuffers>,
    ) {
        let ExpertScratch { gathered, middle: [middle, ..], yielded } = scratch;
        lines.resize_with(lines.len().max(experts.len()), LineBuffers::default);
        let (x, to) = (gathered.as_view(), middle.reborrow());
        let gated = |expert| gated_product(expert, activation);
        self.run_parts(parts(experts, x.as_slice(), to.into_mut_slice(), gated), lines);
        let (x, to) = (middle.as_view(), yielded.reborrow());
        self.run_parts(parts(experts, x.as_slice(), to.into_mut_slice(), down_product), lines);
    }

    fn run_parts(&self, parts: Vec<Part<'_>>, lines: &mut [LineBuffers]) {
        let all_cols = parts.iter().map(|part| part.product.width()).sum();
        let inputs = self.prepare_parts(&parts, lines);
        let planned = parts.into_iter().zip(&inputs).map(|(part, inputs)| {
            let Part { product, out, .. } = part;
            self.plan(inputs, product, Place::Rows(Rows::cached(out)), all_cols)
        });
        self.run_planned(&planned.collect::<Vec<Planned<'_>>>());
    }

    /// Brings the rows of all parts into the forms that their matrices want, in one operation.
    fn prepare_parts<'a>(
        &self,
        parts: &[Part<'a>],
        lines: &'a mut [LineBuffers],
    ) -> Vec<Inputs<'a>> {
        let fills: Vec<Fill<'a>> = parts.iter().map(|part| Fill::of(self.isa, part)).collect();
        let fillings = fills.iter().zip(lines).map(|(fill, lines)| fill.begin(lines));
        let mut fillings: Vec<Option<Filling<'a>>> = fillings.collect();
        let rooms = fillings.iter_mut().map(|filling| filling.as_mut().map(Filling::parts));
        let rooms: Vec<Option<FillRows<'_>>> = rooms.collect();
        let num_elements: usize = fills.iter().map(|fill| fill.x.len()).sum();
        self.for_rows(fills.len(), num_elements.div_ceil(fills.len()), |some| {
            for (fill, to) in fills[some.clone()].iter().zip(&rooms[some]) {
                fill.run(self.isa, to.as_ref());
            }
        });
        drop(rooms);
        fills.iter().zip(fillings).map(|(fill, filling)| fill.inputs(filling)).collect()
    }

    /// `out[tokens[i]] += weights[i] · rows[i]`, one `i` after the other.
    fn add_weighted(&self, out: ViewMut<'_>, rows: View<'_>, tokens: &[u32], weights: &[f32]) {
        let (width, rows) = (out.size(1), rows.as_slice::<f32>());
        let out = Parts::new(out.into_mut_slice::<f32>());
        // Tasks take columns, because experts that run together have tokens in common.
        let num_tasks = (rows.len() / TASK_ELEMENTS).clamp(1, self.threads());
        let cols_per_task = width.div_ceil(num_tasks).next_multiple_of(ADDED_COLS);
        self.pool.run(width.div_ceil(cols_per_task), |_, task| {
            let cols = task * cols_per_task..width.min((task + 1) * cols_per_task);
            for (i, (&token, &weight)) in tokens.iter().zip(weights).enumerate() {
                let at = |row: usize| row * width + cols.start..row * width + cols.end;
                // SAFETY: tasks have different columns.
                let out = unsafe { out.part(at(token as usize)) };
                self.isa.run(AddWeighted { out, from: &rows[at(i)], weight });
            }
        });
    }
}

fn gated_product(expert: &Expert, activation: Activation) -> Product<'_> {
    let up = Weighted { weight: &expert.up, bias: None };
    Product { main: Weighted { weight: &expert.gate, bias: None }, up: Some((up, activation)) }
}

fn down_product(expert: &Expert) -> Product<'_> {
    Product { main: Weighted { weight: &expert.down, bias: None }, up: None }
}

/// The products of experts whose rows follow each other in `x` and in `out`.
fn parts<'a>(
    experts: &[(&'a Expert, usize)],
    mut x: &'a [f32],
    mut out: &'a mut [f32],
    product: impl Fn(&'a Expert) -> Product<'a>,
) -> Vec<Part<'a>> {
    let part = |&(expert, num_rows): &(&'a Expert, usize)| {
        let product = product(expert);
        let x_len = num_rows * product.main.weight.num_cols;
        let (of_expert, rest) = x.split_at(x_len);
        x = rest;
        let (to, rest) = std::mem::take(&mut out).split_at_mut(num_rows * product.width());
        out = rest;
        Part { product, x: of_expert, out: to }
    };
    experts.iter().map(part).collect()
}

impl<'a> Fill<'a> {
    fn of(isa: Isa, part: &Part<'a>) -> Fill<'a> {
        let weight = part.product.main.weight;
        let (x, k) = (part.x, weight.num_cols);
        Fill { x, k, num_rows: x.len() / k, form: Form::of(isa, weight) }
    }

    /// Room for them; none where they stay as they are.
    fn begin<'l>(&self, lines: &'l mut LineBuffers) -> Option<Filling<'l>> {
        match self.form {
            Form::Bf16 => Some(lines.for_bf16(self.num_rows, self.k)),
            Form::Codes(group) => Some(lines.for_codes(self.num_rows, self.k, group)),
            _ => None,
        }
    }

    fn run(&self, isa: Isa, to: Option<&FillRows<'_>>) {
        let &Fill { x, k, num_rows, form } = self;
        let rows = 0..num_rows;
        match (form, to) {
            (Form::Bf16, Some(to)) => isa.run(FillLines { x, k, rows, to, form: AsBf16 }),
            (Form::Codes(_), Some(to)) => isa.run(FillLines { x, k, rows, to, form: AsCodes }),
            _ => {}
        }
    }

    fn inputs(&self, filling: Option<Filling<'a>>) -> Inputs<'a> {
        let &Fill { x, k, num_rows, form } = self;
        let input = match (form, filling) {
            (Form::Bf16, Some(filling)) => Input::Bf16(filling.lines()),
            (Form::Codes(_), Some(filling)) => Input::Codes(filling.codes()),
            _ => Input::Floats,
        };
        Inputs { x, k, num_rows, forms: vec![(form, input)] }
    }
}

/// `out += weight · from`, rounded after the product and after the sum on every instruction set.
struct AddWeighted<'a> {
    out: &'a mut [f32],
    from: &'a [f32],
    weight: f32,
}

impl Kernel for AddWeighted<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let weight = simd.splat(self.weight);
        for at in (0..self.out.len()).step_by(S::LANES) {
            let product = simd.mul(weight, load(simd, self.from, at));
            store(simd, self.out, at, simd.add(load(simd, self.out, at), product));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_announced_as_it_is_reserved() {
        let limits = StepLimits {
            max_num_tokens: 64,
            max_num_seqs: 8,
            max_context_len: 100,
            max_width: 320,
            num_heads: 8,
            head_dim: 64,
            max_logit_rows: 8,
            vocab_size: 100,
            hidden_size: 320,
            num_experts: 12,
            experts_per_token: 2,
            expert_width: 320,
        };
        let mut state = ExpertState::default();
        state.reserve(&limits);
        assert_eq!(state.lines.len(), 12);
        let [lines, cells] = LineBuffers::words(FEW_ROWS, 320);
        let tokens = ExpertTokens::size_bytes(128, 12);
        assert_eq!(ExpertState::size_bytes(&limits), tokens + 12 * 4 * (lines + 2 * cells));
        let none = StepLimits { num_experts: 0, experts_per_token: 0, ..limits };
        assert!(ExpertState::size_bytes(&none) < 16);
    }
}
