//! The attention block: project, rotate, remember, attend, project back.
//!
//! Grouped-query attention over the paged cache, with or without biases, per-head query and
//! key norms and a sliding window.

use super::batch::ForwardBatch;
use super::error::ModelError;
use super::kv_cache::KvLayer;
use super::rope::RopeTable;
use super::spec::{AttentionSpec, LinearSpec};
use super::workspace::Workspace;
use crate::checkpoint::TensorSource;
use crate::device::RankContext;
use crate::ops::args::{AttentionArgs, NormArgs, RopeArgs, RopeStyle, WriteKvArgs};
use crate::tensor::{Tensor, View, ViewMut};
use crate::weights::linear::{Linear, Partition};

/// Loads the linear layer that `spec` names.
pub(super) fn load_linear(
    spec: &LinearSpec,
    partition: Partition,
    source: &dyn TensorSource,
) -> Result<Linear, ModelError> {
    let shape = [spec.out_features, spec.in_features];
    Ok(Linear::load(source, &spec.name, shape, spec.bias, partition)?)
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
    /// Loads the weights that `spec` names.
    pub fn load(
        spec: &AttentionSpec,
        norm_eps: f32,
        rope_style: RopeStyle,
        source: &dyn TensorSource,
    ) -> Result<Attention, ModelError> {
        let qk_norm = match &spec.qk_norm {
            Some(names) => Some((source.tensor(&names.q_norm)?, source.tensor(&names.k_norm)?)),
            None => None,
        };
        Ok(Attention {
            q: load_linear(&spec.q, Partition::Column, source)?,
            k: load_linear(&spec.k, Partition::Column, source)?,
            v: load_linear(&spec.v, Partition::Column, source)?,
            o: load_linear(&spec.o, Partition::Row, source)?,
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
            v_cache: cache.v.view_mut(),
            k: workspace.k.rows(num_tokens).reshape(kv_heads),
            v: workspace.v.rows(num_tokens).reshape(kv_heads),
            slot_mapping: batch.slot_mapping(),
        });
        rank.ops.attention(AttentionArgs {
            out: workspace.attended.rows_mut(num_tokens).reshape(heads),
            q: workspace.q.rows(num_tokens).reshape(heads),
            k_cache: cache.k.view(),
            v_cache: cache.v.view(),
            block_tables: batch.block_tables(),
            cu_seqlens_q: batch.cu_seqlens_q(),
            context_lens: batch.context_lens(),
            scale: self.spec.scale,
            sliding_window: self.spec.sliding_window,
        });
        let attended = workspace.attended.rows(num_tokens);
        self.o.forward(&*rank.ops, &*rank.comm, attended, workspace.hidden.rows_mut(num_tokens));
    }

    /// Queries, keys and values of the new tokens, with their norms.
    fn project(&self, rank: &RankContext, num_tokens: usize, workspace: &mut Workspace) {
        let Workspace { hidden, q, k, v, attended, raw_k, .. } = workspace;
        let hidden = hidden.rows(num_tokens);
        self.v.forward(&*rank.ops, &*rank.comm, hidden, v.rows_mut(num_tokens));
        let Some((q_weight, k_weight)) = &self.qk_norm else {
            self.q.forward(&*rank.ops, &*rank.comm, hidden, q.rows_mut(num_tokens));
            self.k.forward(&*rank.ops, &*rank.comm, hidden, k.rows_mut(num_tokens));
            return;
        };
        self.q.forward(&*rank.ops, &*rank.comm, hidden, attended.rows_mut(num_tokens));
        self.k.forward(&*rank.ops, &*rank.comm, hidden, raw_k.rows_mut(num_tokens));
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
