//! The norm before a block.
//!
//! A block leaves its output in `workspace.hidden`; it is added to the residual stream by whoever reads
//! that next, which is the norm before the next block. The norm is part of the operation that
//! reads what it yields, so that a backend may do both at once.

use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{AddNormArgs, NormArgs, NormedRows};
use crate::tensor::{Tensor, View, ViewMut};

/// The norm before a block.
#[derive(Clone, Copy)]
pub struct BlockNorm<'a> {
    /// `[hidden_size]`.
    pub weight: &'a Tensor,
    /// Added to the mean square before the root.
    pub eps: f32,
    /// Whether a block before has left an output that is not in the residual stream yet.
    pub follows_block: bool,
}

impl<'a> BlockNorm<'a> {
    /// What the block reads, with `out` for backends that run the norm by itself.
    pub fn of(self, out: ViewMut<'a>, residual: ViewMut<'a>, hidden: View<'a>) -> NormedRows<'a> {
        let (weight, eps) = (self.weight.view(), self.eps);
        if self.follows_block {
            return NormedRows::AddNorm(AddNormArgs { out, residual, x: hidden, weight, eps });
        }
        NormedRows::Norm(NormArgs { out, x: residual.into_view(), weight, eps })
    }

    /// Runs the norm by itself: leaves normalised rows in `workspace.hidden`.
    pub fn run(self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        let Workspace { residual, hidden, normed, .. } = workspace;
        let (out, residual) = (normed.rows_mut(num_tokens), residual.rows_mut(num_tokens));
        self.of(out, residual, hidden.rows(num_tokens)).run(&*rank.ops);
        std::mem::swap(hidden, normed);
    }
}
