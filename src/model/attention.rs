//! The attention block: project, rotate, remember, attend, project back.
//!
//! Grouped-query attention over the paged cache, with or without biases, per-head query and
//! key norms and a sliding window.

use super::batch::ForwardBatch;
use super::error::ModelError;
use super::kv_cache::KvLayer;
use super::norm::BlockNorm;
use super::rope::RopeTable;
use super::spec::{AttentionSpec, HeadInputs, LinearSpec};
use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{AttentionArgs, NormArgs, RopeArgs, RopeKvArgs, RopeStyle};
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

/// What a layer's attention reads of a step beside the workspace.
#[derive(Clone, Copy)]
pub struct AttentionStep<'a> {
    /// The norm before the block.
    pub norm: BlockNorm<'a>,
    /// Angles of all positions.
    pub rope: &'a RopeTable,
    /// The tokens.
    pub batch: &'a ForwardBatch,
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

    /// Replaces `workspace.hidden`, the output of the block before, by this block's.
    pub fn forward(
        &self,
        rank: &RankContext,
        step: AttentionStep<'_>,
        cache: &mut KvLayer,
        workspace: &mut Workspace,
    ) {
        let AttentionStep { norm, rope, batch } = step;
        let num_tokens = batch.num_tokens();
        let v_cache = cache.v.as_mut().expect("a cache of heads has values");
        self.project(rank, norm, num_tokens, workspace);
        let heads = [num_tokens, self.spec.num_heads, self.spec.head_dim];
        let kv_heads = [num_tokens, self.spec.num_kv_heads, self.spec.head_dim];
        rank.ops.rope_and_write_kv(RopeKvArgs {
            rope: RopeArgs {
                q: workspace.q.rows_mut(num_tokens).reshape(heads),
                k: workspace.k.rows_mut(num_tokens).reshape(kv_heads),
                positions: batch.positions(),
                cos: rope.cos.view(),
                sin: rope.sin.view(),
                style: self.rope_style,
            },
            v: workspace.v.rows(num_tokens).reshape(kv_heads),
            k_cache: cache.k.view_mut(),
            v_cache: v_cache.view_mut(),
            slot_mapping: batch.slot_mapping(),
        });
        rank.ops.attention(AttentionArgs {
            out: workspace.attended.front_mut(heads),
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
        let attended = workspace.attended.front_mut([num_tokens, heads[1] * heads[2]]).into_view();
        self.o.forward(&*rank.ops, &*rank.comm, attended, workspace.hidden.rows_mut(num_tokens));
    }

    /// Queries, keys and values of the new tokens, with their norms.
    fn project(
        &self,
        rank: &RankContext,
        norm: BlockNorm<'_>,
        num_tokens: usize,
        workspace: &mut Workspace,
    ) {
        let Workspace { residual, hidden, normed, q, k, v, attended, raw_k, .. } = workspace;
        let raw_q_shape = [num_tokens, self.q.weight.num_rows];
        // With norms, projections pause in tensors that are free at this moment.
        let (q_out, k_out) = match self.qk_norm {
            None => (q.rows_mut(num_tokens), k.rows_mut(num_tokens)),
            Some(_) => (attended.front_mut(raw_q_shape), raw_k.rows_mut(num_tokens)),
        };
        let layers = [(&self.q, q_out), (&self.k, k_out), (&self.v, v.rows_mut(num_tokens))];
        let (out, residual) = (normed.rows_mut(num_tokens), residual.rows_mut(num_tokens));
        let x = norm.of(out, residual, hidden.rows(num_tokens));
        Linear::forward_normed(&*rank.ops, &*rank.comm, x, layers);
        let Some((q_weight, k_weight)) = &self.qk_norm else { return };
        let raw_q = attended.front_mut(raw_q_shape).into_view();
        self.head_norm(rank, raw_q, q_weight, q.rows_mut(num_tokens));
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
