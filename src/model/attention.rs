//! The attention block: project, rotate, remember, attend, project back.
//!
//! Grouped-query attention over the paged cache, with or without biases, per-head query and
//! key norms and a sliding window.

use super::batch::ForwardBatch;
use super::error::ModelError;
use super::kv_cache::KvLayer;
use super::rope::RopeTable;
use super::spec::{AttentionSpec, HeadInputs, LinearSpec};
use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{AttentionArgs, NormArgs, RopeArgs, RopeStyle, WriteKvArgs};
use crate::tensor::{Tensor, View, ViewMut};
use crate::weights::Loader;
use crate::weights::linear::{Linear, Partition};

/// Loads the linear layer that `spec` names.
pub(super) fn load_linear(
    spec: &LinearSpec,
    partition: Partition,
    loader: &Loader<'_>,
) -> Result<Linear, ModelError> {
    let shape = [spec.out_features, spec.in_features];
    Ok(Linear::load(loader, &spec.name, shape, spec.bias, partition)?)
}

/// One layer's attention weights.
pub struct Attention {
    spec: AttentionSpec,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// Per-head norms of queries and keys.
    qk_norm: Option<(Tensor, Tensor)>,
    norm_eps: f32,
    rope_style: RopeStyle,
}

impl Attention {
    /// Loads the weights that `spec` and its `inputs` name.
    pub fn load(
        spec: &AttentionSpec,
        inputs: &HeadInputs,
        norm_eps: f32,
        rope_style: RopeStyle,
        loader: &Loader<'_>,
    ) -> Result<Attention, ModelError> {
        let qk_norm = match &inputs.qk_norm {
            Some(names) => Some((loader.tensor(&names.q_norm)?, loader.tensor(&names.k_norm)?)),
            None => None,
        };
        Ok(Attention {
            q: load_linear(&inputs.q, Partition::Column, loader)?,
            k: load_linear(&inputs.k, Partition::Column, loader)?,
            v: load_linear(&inputs.v, Partition::Column, loader)?,
            o: load_linear(&spec.o, Partition::Row, loader)?,
            qk_norm,
            norm_eps,
            rope_style,
            spec: spec.clone(),
        })
    }

    /// Replaces `workspace.hidden` (normalised input) by the block's output.
    pub fn forward(
        &self,
        rank: &RankContext,
        rope: &RopeTable,
        batch: &ForwardBatch,
        cache: &mut KvLayer,
        workspace: &mut Workspace,
    ) {
        let num_tokens = batch.num_tokens();
        let v_cache = cache.v.as_mut().expect("a cache of heads has values");
        self.project(rank, num_tokens, workspace);
        let heads = [num_tokens, self.spec.num_heads, self.spec.head_dim];
        let kv_heads = [num_tokens, self.spec.num_kv_heads, self.spec.head_dim];
        rank.ops.rope(RopeArgs {
            q: workspace.q.rows_mut(num_tokens).reshape(heads),
            k: workspace.k.rows_mut(num_tokens).reshape(kv_heads),
            positions: batch.positions(),
            cos: rope.cos.view(),
            sin: rope.sin.view(),
            style: self.rope_style,
        });
        rank.ops.write_kv(WriteKvArgs {
            k_cache: cache.k.view_mut(),
            v_cache: v_cache.view_mut(),
            k: workspace.k.rows(num_tokens).reshape(kv_heads),
            v: workspace.v.rows(num_tokens).reshape(kv_heads),
            slot_mapping: batch.slot_mapping(),
        });
        rank.ops.attention(AttentionArgs {
            out: workspace.attended.rows_mut(num_tokens).reshape(heads),
            q: workspace.q.rows(num_tokens).reshape(heads),
            k_cache: cache.k.view(),
            v_cache: v_cache.view(),
            block_tables: batch.block_tables(),
            cu_seqlens_q: batch.cu_seqlens_q(),
            context_lens: batch.context_lens(),
            scale: self.spec.scale,
            sliding_window: self.spec.sliding_window,
            softcap: None,
            sinks: None,
        });
        let attended = workspace.attended.rows(num_tokens);
        self.o.forward(&*rank.ops, &*rank.comm, attended, workspace.hidden.rows_mut(num_tokens));
    }

    /// Queries, keys and values of the new tokens, with their norms.
    fn project(&self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        let Workspace { hidden, q, k, v, attended, raw_k, .. } = workspace;
        // With norms, projections pause in tensors that are free at this moment.
        let (q_out, k_out) = match self.qk_norm {
            None => (&mut *q, &mut *k),
            Some(_) => (&mut *attended, &mut *raw_k),
        };
        let layers = [
            (&self.q, q_out.rows_mut(num_tokens)),
            (&self.k, k_out.rows_mut(num_tokens)),
            (&self.v, v.rows_mut(num_tokens)),
        ];
        Linear::forward_all(&*rank.ops, &*rank.comm, hidden.rows(num_tokens), layers);
        let Some((q_weight, k_weight)) = &self.qk_norm else { return };
        self.head_norm(rank, attended.rows(num_tokens), q_weight, q.rows_mut(num_tokens));
        self.head_norm(rank, raw_k.rows(num_tokens), k_weight, k.rows_mut(num_tokens));
    }

    fn head_norm(&self, rank: &RankContext, x: View<'_>, weight: &Tensor, out: ViewMut<'_>) {
        let shape = [x.shape().len() / self.spec.head_dim, self.spec.head_dim];
        rank.ops.norm(NormArgs {
            out: out.reshape(shape),
            x: x.reshape(shape),
            weight: weight.view(),
            eps: self.norm_eps,
        });
    }
}
