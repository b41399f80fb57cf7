//! The gated feed-forward block: `down(activation(gate(x)) * up(x))`.

use super::attention::load_linear;
use super::error::ModelError;
use super::spec::MlpSpec;
use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{Activation, GatedMatmulArgs, GatedMlpArgs};
use crate::weights::Loader;
use crate::weights::linear::{Linear, Partition};

/// One layer's feed-forward weights.
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
    activation: Activation,
    intermediate_size: usize,
}

impl Mlp {
    /// Loads the weights that `spec` names.
    pub fn load(spec: &MlpSpec, loader: &Loader<'_>) -> Result<Mlp, ModelError> {
        Ok(Mlp {
            gate: load_linear(&spec.gate, Partition::Column, loader)?,
            up: load_linear(&spec.up, Partition::Column, loader)?,
            down: load_linear(&spec.down, Partition::Row, loader)?,
            activation: spec.activation,
            intermediate_size: spec.intermediate_size,
        })
    }

    /// Replaces `workspace.hidden` (normalised input) by the block's output.
    pub fn forward(&self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        self.compute(rank, num_tokens, workspace);
        let Workspace { hidden, normed, .. } = workspace;
        std::mem::swap(hidden, normed);
    }

    /// Leaves the block's output for `workspace.hidden` in `workspace.normed`.
    pub fn compute(&self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        let Workspace { hidden, normed, gate, up, activated, .. } = workspace;
        // Layers with experts may be wider.
        let middle = [num_tokens, self.intermediate_size];
        rank.ops.gated_mlp(GatedMlpArgs {
            gated: GatedMatmulArgs {
                out: activated.front_mut(middle),
                x: hidden.rows(num_tokens),
                gate: self.gate.weight_and_bias(),
                up: self.up.weight_and_bias(),
                activation: self.activation,
                scratch: [gate.front_mut(middle), up.front_mut(middle)],
            },
            down: self.down.projection(&*rank.comm, normed.rows_mut(num_tokens)),
        });
        self.down.reduce(&*rank.comm, normed.rows_mut(num_tokens));
    }
}
