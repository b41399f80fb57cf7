//! How a gated MLP of many rows runs: what the gated product yields goes straight into the form that
//! the next product reads (bf16), or into one that is fast to write and to quantize (`middle`).

use std::sync::PoisonError;

use super::CpuOps;
use super::launch_matmul::{Form, Gated, Input, Inputs, Prepared};
use super::middle::{CodeMiddle, Middle};
use super::weight_blocks::Place;
use crate::formats::ROW_ALIGN;
use crate::ops::args::{GatedMatmulArgs, GatedMlpArgs};
use crate::ops::mlp_in_steps;
use crate::tensor::{ALIGNMENT, ViewMut};

/// Up to this many rows, activations fit the caches in any order.
const FEW_ROWS: usize = 32;

/// Whether a tensor begins with a cache line, as the engine's own do.
fn is_aligned(tensor: &ViewMut<'_>) -> bool {
    tensor.as_view().as_slice::<f32>().as_ptr().align_offset(ALIGNMENT) == 0
}

impl CpuOps {
    pub(super) fn multiply_mlp(&self, args: GatedMlpArgs<'_>) {
        if !self.passes_on(&args) {
            return mlp_in_steps(self, args);
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
                let (to, middle) =
                    (&filling.parts(), &Middle::new(out.into_mut_slice::<f32>(), num_rows));
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

    /// Whether the gated product can go straight to the next one.
    fn passes_on(&self, args: &GatedMlpArgs<'_>) -> bool {
        let GatedMatmulArgs { x, out, gate, up, .. } = &args.gated;
        let in_lines = |weight| matches!(Form::of(self.isa, weight), Form::Bf16 | Form::Codes(_));
        x.size(0) > FEW_ROWS
            && out.size(1).is_multiple_of(ROW_ALIGN)
            && is_aligned(out)
            && self.fuses(gate.0, up.0)
            && in_lines(gate.0)
            && in_lines(args.down.weight)
    }
}
