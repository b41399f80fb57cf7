//! Token embedding and output head, which may be one matrix.

use super::attention::load_linear;
use super::error::ModelError;
use super::spec::ModelSpec;
use crate::device::RankContext;
use crate::ops::args::EmbedArgs;
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

    /// `logits = hidden · headᵀ`.
    pub fn logits(&self, rank: &RankContext, hidden: View<'_>, out: ViewMut<'_>) {
        let head = self.head.as_ref().unwrap_or(&self.table);
        head.forward(&*rank.ops, &*rank.comm, hidden, out);
    }
}
