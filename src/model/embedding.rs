//! Token embedding and output head, which may be one matrix.

use super::attention::load_linear;
use super::error::ModelError;
use super::spec::ModelSpec;
use crate::device::RankContext;
use crate::ops::args::{EmbedArgs, GreedyArgs};
use crate::tensor::{View, ViewMut};
use crate::weights::Loader;
use crate::weights::linear::{Linear, Partition};

/// The first and the last matrix of a decoder.
pub struct Embedding {
    table: Linear,
    /// `None` when the head is the embedding table.
    head: Option<Linear>,
}

impl Embedding {
    /// Loads the table, and the head when it is not tied.
    pub fn load(spec: &ModelSpec, loader: &Loader<'_>) -> Result<Embedding, ModelError> {
        let shape = [spec.vocab_size, spec.hidden_size];
        let table = Linear::of_table(loader, &spec.embedding, shape)?;
        let head = match spec.tied {
            true => None,
            false => Some(load_linear(&spec.lm_head, Partition::Replicated, loader)?),
        };
        Ok(Embedding { table, head })
    }

    /// `out[t, :] = table[token_ids[t], :]`.
    pub fn embed(&self, rank: &RankContext, token_ids: View<'_>, out: ViewMut<'_>) {
        rank.ops.embed(EmbedArgs { out, table: &self.table.weight, token_ids });
    }

    /// The most likely token of every row, where the device finds it without logits.
    pub fn greedy(&self, rank: &RankContext, hidden: View<'_>) -> Option<Vec<u32>> {
        let (weight, bias) = self.head().weight_and_bias();
        rank.ops.greedy(GreedyArgs { x: hidden, weight, bias })
    }

    /// `logits = hidden · headᵀ`.
    pub fn logits(&self, rank: &RankContext, hidden: View<'_>, out: ViewMut<'_>) {
        self.head().forward(&*rank.ops, &*rank.comm, hidden, out);
    }

    fn head(&self) -> &Linear {
        self.head.as_ref().unwrap_or(&self.table)
    }
}
