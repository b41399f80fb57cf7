//! The gated feed-forward block: `down(activation(gate(x)) * up(x))`.

use super::attention::load_linear;
use super::error::ModelError;
use super::norm::BlockNorm;
use super::spec::MlpSpec;
use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{Activation, GatedMatmulArgs, GatedMlpArgs};
use crate::tensor::{Tensor, ViewMut};
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

    /// Replaces `workspace.hidden`, the output of the block before, by this block's.
    pub fn forward(
        &self,
        rank: &RankContext,
        norm: BlockNorm<'_>,
        num_tokens: usize,
        workspace: &mut Workspace,
    ) {
        let Workspace { residual, hidden, normed, gate, up, activated, attended, .. } = workspace;
        // What attention yielded is read, so its tensor has room for normalised rows.
        let out = attended.front_mut([num_tokens, normed.shape().sizes()[1]]);
        let x = norm.of(out, residual.rows_mut(num_tokens), hidden.rows(num_tokens));
        let out = normed.rows_mut(num_tokens);
        rank.ops.norm_mlp(self.args(rank, x, out, [activated, gate, up]));
        self.down.reduce(&*rank.comm, normed.rows_mut(num_tokens));
        std::mem::swap(hidden, normed);
    }

    /// Leaves the block's output for `workspace.hidden`, normalised rows, in `workspace.normed`.
    pub fn compute(&self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        let Workspace { hidden, normed, gate, up, activated, .. } = workspace;
        let (x, out) = (hidden.rows(num_tokens), normed.rows_mut(num_tokens));
        rank.ops.gated_mlp(self.args(rank, x, out, [activated, gate, up]));
        self.down.reduce(&*rank.comm, normed.rows_mut(num_tokens));
    }

    fn args<'a, X>(
        &'a self,
        rank: &RankContext,
        x: X,
        out: ViewMut<'a>,
        middle: [&'a mut Tensor; 3],
    ) -> GatedMlpArgs<'a, X> {
        // Layers with experts may be wider.
        let shape = [out.size(0), self.intermediate_size];
        let [activated, gate, up] = middle.map(|tensor| tensor.front_mut(shape));
        GatedMlpArgs {
            gated: GatedMatmulArgs {
                out: activated,
                x,
                gate: self.gate.weight_and_bias(),
                up: self.up.weight_and_bias(),
                activation: self.activation,
                scratch: [gate, up],
            },
            down: self.down.projection(&*rank.comm, out),
        }
    }
}
