//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), absorbed.
//!
//! A token is projected to a latent and a key that rotates, and these alone are cached, once for all
//! heads. Queries are brought into the latent's space before they attend, and means of latents become
//! values afterwards, for prompts as for decoding: nothing is ever made of cached latents but scores
//! and means. What that costs is in ARCHITECTURE.md.

use super::attention::{AttentionStep, load_linear};
use super::error::ModelError;
use super::kv_cache::KvLayer;
use super::norm::BlockNorm;
use super::spec::{AttentionSpec, CompressionSpec, LatentInputs};
use super::workspace::{LatentRows, Workspace};
use crate::device::RankContext;
use crate::ops::args::{
    HeadMatmulArgs, LatentAttentionArgs, NormArgs, NormedRows, RopeStyle, WriteLatentArgs,
};
use crate::tensor::Tensor;
use crate::weights::Loader;
use crate::weights::heads::{HeadMatrices, HeadShape};
use crate::weights::linear::{Linear, Partition};

/// Added to mean squares of compressed vectors: the published implementation's, whatever
/// `rms_norm_eps` says.
const COMPRESSED_EPS: f32 = 1e-6;

/// A projection to a narrow vector, and its norm.
struct Compression {
    projection: Linear,
    norm: Tensor,
}

impl Compression {
    fn load(spec: &CompressionSpec, loader: &Loader<'_>) -> Result<Compression, ModelError> {
        Ok(Compression {
            projection: load_linear(&spec.projection, Partition::Replicated, loader)?,
            norm: loader.tensor(&spec.norm)?,
        })
    }
}

/// One layer's attention weights.
pub struct LatentAttention {
    shape: HeadShape,
    rope_dim: usize,
    scale: f32,
    q_down: Option<Compression>,
    q: Linear,
    kv_down: Compression,
    matrices: HeadMatrices,
    o: Linear,
    rope_style: RopeStyle,
}

impl LatentAttention {
    /// Loads the weights that `spec` and its `inputs` name.
    pub fn load(
        spec: &AttentionSpec,
        inputs: &LatentInputs,
        rope_style: RopeStyle,
        loader: &Loader<'_>,
    ) -> Result<LatentAttention, ModelError> {
        let q_down = inputs.q_down.as_ref().map(|spec| Compression::load(spec, loader));
        Ok(LatentAttention {
            shape: inputs.shape,
            rope_dim: inputs.rope_dim,
            scale: spec.scale,
            q_down: q_down.transpose()?,
            q: load_linear(&inputs.q, Partition::Column, loader)?,
            kv_down: Compression::load(&inputs.kv_down, loader)?,
            matrices: HeadMatrices::load(loader, &inputs.kv_up.name, inputs.shape)?,
            o: load_linear(&spec.o, Partition::Row, loader)?,
            rope_style,
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
        self.project(rank, norm, num_tokens, workspace);
        let Workspace { hidden, q, k, attended, latent_rows, .. } = workspace;
        let LatentRows { raw_q, .. } = rows_of(latent_rows);
        let HeadShape { num_heads, nope_dim, value_dim, rank: latent_dim } = self.shape;
        let raw_heads = [num_tokens, num_heads, nope_dim + self.rope_dim];
        let heads = [num_tokens, num_heads, latent_dim + self.rope_dim];
        let means = [num_tokens, num_heads, latent_dim];
        let values = [num_tokens, num_heads, value_dim];
        rank.ops.head_matmul(HeadMatmulArgs {
            out: q.front_mut(heads),
            x: raw_q.front_mut(raw_heads).as_view(),
            weight: self.matrices.absorb.view(),
        });
        rank.ops.write_latent(WriteLatentArgs {
            cache: cache.k.view_mut(),
            absorbed: q.front_mut(heads),
            latent: k.front_mut([num_tokens, latent_dim + self.rope_dim]),
            q: raw_q.front_mut(raw_heads).as_view(),
            weight: self.kv_down.norm.view(),
            eps: COMPRESSED_EPS,
            positions: batch.positions(),
            cos: rope.cos.view(),
            sin: rope.sin.view(),
            style: self.rope_style,
            slot_mapping: batch.slot_mapping(),
        });
        rank.ops.latent_attention(LatentAttentionArgs {
            out: attended.front_mut(means),
            q: q.front_mut(heads).as_view(),
            cache: cache.k.view(),
            block_tables: batch.block_tables(),
            cu_seqlens_q: batch.cu_seqlens_q(),
            context_lens: batch.context_lens(),
            scale: self.scale,
        });
        rank.ops.head_matmul(HeadMatmulArgs {
            out: raw_q.front_mut(values),
            x: attended.front_mut(means).as_view(),
            weight: self.matrices.release.view(),
        });
        let values = raw_q.front_mut([num_tokens, num_heads * value_dim]);
        self.o.forward(&*rank.ops, &*rank.comm, values.as_view(), hidden.rows_mut(num_tokens));
    }

    /// Queries in `raw_q`, latents before their norm in `k`.
    fn project(
        &self,
        rank: &RankContext,
        norm: BlockNorm<'_>,
        num_tokens: usize,
        workspace: &mut Workspace,
    ) {
        let Workspace { residual, hidden, normed, k, latent_rows, .. } = workspace;
        let LatentRows { raw_q, compressed_q: [compressed, normed_q] } = rows_of(latent_rows);
        let (out, residual) = (normed.rows_mut(num_tokens), residual.rows_mut(num_tokens));
        let x = norm.of(out, residual, hidden.rows(num_tokens));
        let (ops, comm) = (&*rank.ops, &*rank.comm);
        let latent_width = self.kv_down.projection.weight.num_rows;
        let latents = (&self.kv_down.projection, k.front_mut([num_tokens, latent_width]));
        let queries = raw_q.front_mut([num_tokens, self.q.weight.num_rows]);
        let Some(q_down) = &self.q_down else {
            return Linear::forward_normed(ops, comm, x, [(&self.q, queries), latents]);
        };
        let width = [num_tokens, q_down.projection.weight.num_rows];
        let narrow = (&q_down.projection, compressed.front_mut(width));
        Linear::forward_normed(ops, comm, x, [narrow, latents]);
        let x = NormedRows::Norm(NormArgs {
            out: normed_q.front_mut(width),
            x: compressed.front_mut(width).into_view(),
            weight: q_down.norm.view(),
            eps: COMPRESSED_EPS,
        });
        Linear::forward_normed(ops, comm, x, [(&self.q, queries)]);
    }
}

fn rows_of(rows: &mut Option<LatentRows>) -> &mut LatentRows {
    rows.as_mut().expect("a workspace of a model with latent attention has rows for it")
}
