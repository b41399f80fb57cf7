//! Norms of the residual stream: RMS or layer norm, as the model's description says.

use super::error::ModelError;
use super::spec::NormSpec;
use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{AddNormArgs, LayerNormArgs, NormArgs, NormedRows};
use crate::tensor::{Tensor, View, ViewMut};
use crate::weights::Loader;

/// A loaded norm.
pub struct Norm {
    kind: Kind,
    /// Added before the root.
    eps: f32,
}

/// What it computes; weights and biases are `[hidden_size]`.
enum Kind {
    Rms { weight: Tensor },
    Layer { weight: Tensor, bias: Tensor },
}

impl Norm {
    /// Loads the tensors that `spec` names.
    pub fn load(spec: &NormSpec, eps: f32, loader: &Loader<'_>) -> Result<Norm, ModelError> {
        let kind = match spec {
            NormSpec::Rms { weight } => Kind::Rms { weight: loader.tensor(weight)? },
            NormSpec::Layer { weight, bias } => {
                Kind::Layer { weight: loader.tensor(weight)?, bias: loader.tensor(bias)? }
            }
        };
        Ok(Norm { kind, eps })
    }

    /// The norm before a block. `follows_block` says whether a block before has left an output that
    /// is not in the residual stream yet.
    pub fn before_block(&self, follows_block: bool) -> BlockNorm<'_> {
        BlockNorm { norm: self, follows_block }
    }
}

/// The norm before a block.
///
/// A block leaves its output in `workspace.hidden`; it is added to the residual stream by whoever reads
/// that next, which is the norm before the next block. The norm is part of the operation that
/// reads what it yields, so that a backend may do both at once.
#[derive(Clone, Copy)]
pub struct BlockNorm<'a> {
    norm: &'a Norm,
    follows_block: bool,
}

impl<'a> BlockNorm<'a> {
    /// What the block reads, with `out` for backends that run the norm by itself.
    pub fn of(self, out: ViewMut<'a>, residual: ViewMut<'a>, hidden: View<'a>) -> NormedRows<'a> {
        let eps = self.norm.eps;
        let (x, residual) = match self.follows_block {
            true => (hidden, Some(residual)),
            false => (residual.into_view(), None),
        };
        match (&self.norm.kind, residual) {
            (Kind::Rms { weight }, Some(residual)) => {
                let weight = weight.view();
                NormedRows::AddNorm(AddNormArgs { out, residual, x, weight, eps })
            }
            (Kind::Rms { weight }, None) => {
                NormedRows::Norm(NormArgs { out, x, weight: weight.view(), eps })
            }
            (Kind::Layer { weight, bias }, residual) => {
                let (weight, bias) = (weight.view(), Some(bias.view()));
                let norm = LayerNormArgs { out, residual, x, weight, bias, eps };
                NormedRows::LayerNorm(Box::new(norm))
            }
        }
    }

    /// Runs the norm by itself: leaves normalised rows in `workspace.hidden`.
    pub fn run(self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        let Workspace { residual, hidden, normed, .. } = workspace;
        let (out, residual) = (normed.rows_mut(num_tokens), residual.rows_mut(num_tokens));
        self.of(out, residual, hidden.rows(num_tokens)).run(&*rank.ops);
        std::mem::swap(hidden, normed);
    }
}
