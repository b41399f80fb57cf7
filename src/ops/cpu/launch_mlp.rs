//! How gated products and gated MLPs run. In an MLP of many rows, what the gated product yields
//! goes straight into the form that the next product reads (bf16), or into one that is fast to
//! write and to quantize (`middle`).

use std::sync::PoisonError;

use super::CpuOps;
use super::launch_inputs::{Activations, Form, Input, InputBuffers, Inputs, Prepared};
use super::launch_matmul::{Product, Weighted, fuses};
use super::middle::{CodeMiddle, Middle};
use super::weight_blocks::{Place, Rows};
use crate::formats::ROW_ALIGN;
use crate::ops::args::{Activation, GatedMatmulArgs, GatedMlpArgs, MatmulArgs, WeightAndBias};
use crate::ops::gated_in_steps;
use crate::tensor::{ALIGNMENT, ViewMut};

/// Up to this many rows, activations fit the caches in any order.
const FEW_ROWS: usize = 32;

/// Whether a tensor begins with a cache line, as the engine's own do.
fn is_aligned(tensor: &ViewMut<'_>) -> bool {
    tensor.as_view().as_slice::<f32>().as_ptr().align_offset(ALIGNMENT) == 0
}

/// The matrices of a gated product.
#[derive(Clone, Copy)]
pub(super) struct Gated<'a> {
    pub(super) gate: WeightAndBias<'a>,
    pub(super) up: WeightAndBias<'a>,
    pub(super) activation: Activation,
}

impl CpuOps {
    pub(super) fn multiply_mlp<'a>(&self, args: GatedMlpArgs<'a, Activations<'a>>) {
        if !self.passes_on(&args) {
            return self.multiply_mlp_in_steps(args);
        }
        let GatedMatmulArgs { out, x, gate, up, activation, .. } = args.gated;
        let (num_rows, k) = (out.size(0), out.size(1));
        let gated = Gated { gate, up, activation };
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let Prepared { x: buffers, middle: lines } = &mut *prepared;
        let form = Form::of(self.isa, args.down.weight);
        let input = match form {
            Form::Codes(group) => {
                let mut filling = lines.for_codes(num_rows, k, group);
                let (to, is_cached) = (&filling.parts(), self.keeps(num_rows * k));
                let middle = &Middle::new(out.into_mut_slice::<f32>(), num_rows, is_cached);
                self.run_gated(buffers, x, gated, Place::Middle(middle));
                self.pool.run(middle.num_tiles(), |_, tile| {
                    self.isa.run(CodeMiddle { middle, tile, to });
                });
                Input::Codes(filling.codes())
            }
            _ => {
                let mut filling = lines.for_bf16(num_rows, k);
                self.run_gated(buffers, x, gated, Place::Lines(&filling.parts()));
                Input::Bf16(filling.lines())
            }
        };
        let inputs = Inputs { x: &[], k, num_rows, forms: vec![(form, input)] };
        self.project(&inputs, vec![args.down]);
    }

    fn multiply_mlp_in_steps<'a>(&self, args: GatedMlpArgs<'a, Activations<'a>>) {
        let GatedMatmulArgs { out: mut middle, x, gate, up, activation, scratch } = args.gated;
        let out = middle.reborrow();
        self.multiply_gated(GatedMatmulArgs { out, x, gate, up, activation, scratch });
        let x = Activations::Rows(middle.as_view());
        self.multiply(MatmulArgs { x, projections: vec![args.down] });
    }

    /// A gated product in one pass where a kernel takes both halves, else in steps.
    pub(super) fn multiply_gated<'a>(&self, args: GatedMatmulArgs<'a, Activations<'a>>) {
        if !fuses(args.gate.0, args.up.0) {
            return gated_in_steps(self, args.map_x(|x| x.settled(self)));
        }
        let GatedMatmulArgs { out, x, gate, up, activation, .. } = args;
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        let (num_cols, is_cached) = (out.size(1), self.keeps(out.shape().len()));
        let place = Place::Rows(Rows::of_operation(out.into_mut_slice(), num_cols, is_cached));
        self.run_gated(&mut prepared.x, x, Gated { gate, up, activation }, place);
    }

    /// A gated product in one pass.
    pub(super) fn run_gated(
        &self,
        buffers: &mut InputBuffers,
        x: Activations<'_>,
        gated: Gated<'_>,
        place: Place<'_>,
    ) {
        let Gated { gate, up, activation } = gated;
        assert!(x.width() > 0, "matmul: nothing to sum over");
        let inputs = self.prepare(buffers, x, &[gate.0]);
        let biases = [gate.1, up.1].map(|bias| bias.map(|bias| self.widened(bias)));
        let main = Weighted { weight: gate.0, bias: biases[0].as_deref() };
        let up = Weighted { weight: up.0, bias: biases[1].as_deref() };
        let product = Product { main, up: Some((up, activation)) };
        self.run_planned(&[self.plan(&inputs, product, place, product.width())]);
    }

    /// Whether the gated product can go straight to the next one.
    fn passes_on(&self, args: &GatedMlpArgs<'_, Activations<'_>>) -> bool {
        let GatedMatmulArgs { out, gate, up, .. } = &args.gated;
        let in_lines = |weight| matches!(Form::of(self.isa, weight), Form::Bf16 | Form::Codes(_));
        out.size(0) > FEW_ROWS
            && out.size(1).is_multiple_of(ROW_ALIGN)
            && is_aligned(out)
            && fuses(gate.0, up.0)
            && in_lines(gate.0)
            && in_lines(args.down.weight)
    }
}
