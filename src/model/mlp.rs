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
}

impl Mlp {
    /// Loads the weights that `spec` names.
    pub fn load(spec: &MlpSpec, loader: &Loader<'_>) -> Result<Mlp, ModelError> {
        Ok(Mlp {
            gate: load_linear(&spec.gate, Partition::Column, loader)?,
            up: load_linear(&spec.up, Partition::Column, loader)?,
            down: load_linear(&spec.down, Partition::Row, loader)?,
            activation: spec.activation,
        })
    }

    /// Replaces `workspace.hidden` (normalised input) by the block's output.
    pub fn forward(&self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        let Workspace { hidden, normed, gate, up, activated, .. } = workspace;
        rank.ops.gated_mlp(GatedMlpArgs {
            gated: GatedMatmulArgs {
                out: activated.rows_mut(num_tokens),
                x: hidden.rows(num_tokens),
                gate: self.gate.weight_and_bias(),
                up: self.up.weight_and_bias(),
                activation: self.activation,
                scratch: [gate.rows_mut(num_tokens), up.rows_mut(num_tokens)],
            },
            down: self.down.projection(&*rank.comm, normed.rows_mut(num_tokens)),
        });
        self.down.reduce(&*rank.comm, normed.rows_mut(num_tokens));
        std::mem::swap(hidden, normed);
    }
}
