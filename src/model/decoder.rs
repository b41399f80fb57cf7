//! The decoder-only transformer: the one forward pass of this program.
//!
//! Serves every family, device and rank. Input is a flat [`ForwardBatch`]; sequences exist
//! here only as ranges of rows and block tables. Output is the residual stream, from which
//! [`Decoder::logits`] computes logits for the rows that are wanted.

use std::ops::Range;

use super::attention::{Attention, AttentionStep};
use super::batch::ForwardBatch;
use super::embedding::Embedding;
use super::error::ModelError;
use super::kv_cache::{KvCache, KvLayer};
use super::latent_attention::LatentAttention;
use super::mlp::Mlp;
use super::moe::Moe;
use super::norm::{BlockNorm, Norm};
use super::rope::RopeTable;
use super::spec::{AttentionInputs, AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec};
use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{GatherRowsArgs, RopeStyle, SoftCapArgs};
use crate::weights::Loader;

/// One layer.
struct Layer {
    input_norm: Norm,
    attention: AttentionBlock,
    post_attention_norm: Norm,
    feed_forward: FeedForward,
}

/// How a layer attends.
enum AttentionBlock {
    Heads(Box<Attention>),
    Latent(Box<LatentAttention>),
}

impl AttentionBlock {
    fn load(
        spec: &AttentionSpec,
        norm_eps: f32,
        rope_style: RopeStyle,
        loader: &Loader<'_>,
    ) -> Result<AttentionBlock, ModelError> {
        Ok(match &spec.inputs {
            AttentionInputs::Heads(inputs) => AttentionBlock::Heads(Box::new(Attention::load(
                spec, inputs, norm_eps, rope_style, loader,
            )?)),
            AttentionInputs::Latent(inputs) => AttentionBlock::Latent(Box::new(
                LatentAttention::load(spec, inputs, rope_style, loader)?,
            )),
        })
    }

    fn forward(
        &self,
        rank: &RankContext,
        step: AttentionStep<'_>,
        cache: &mut KvLayer,
        workspace: &mut Workspace,
    ) {
        match self {
            AttentionBlock::Heads(heads) => heads.forward(rank, step, cache, workspace),
            AttentionBlock::Latent(latent) => latent.forward(rank, step, cache, workspace),
        }
    }
}

/// What computes after attention.
enum FeedForward {
    Mlp(Box<Mlp>),
    Moe(Box<Moe>),
}

impl FeedForward {
    fn load(spec: &FeedForwardSpec, loader: &Loader<'_>) -> Result<FeedForward, ModelError> {
        Ok(match spec {
            FeedForwardSpec::Mlp(mlp) => FeedForward::Mlp(Box::new(Mlp::load(mlp, loader)?)),
            FeedForwardSpec::Moe(moe) => FeedForward::Moe(Box::new(Moe::load(moe, loader)?)),
        })
    }

    fn forward(
        &self,
        rank: &RankContext,
        norm: BlockNorm<'_>,
        num_tokens: usize,
        workspace: &mut Workspace,
    ) {
        match self {
            FeedForward::Mlp(mlp) => mlp.forward(rank, norm, num_tokens, workspace),
            FeedForward::Moe(moe) => moe.forward(rank, norm, num_tokens, workspace),
        }
    }
}

/// A loaded model.
pub struct Decoder {
    embedding: Embedding,
    layers: Vec<Layer>,
    final_norm: Norm,
    rope: RopeTable,
    logit_softcap: Option<f32>,
}

impl Decoder {
    /// Loads every tensor that `spec` names. `max_position` bounds the positions that will be
    /// computed.
    pub fn load(
        spec: &ModelSpec,
        loader: &Loader<'_>,
        max_position: usize,
    ) -> Result<Decoder, ModelError> {
        let layer = |layer: &LayerSpec| -> Result<Layer, ModelError> {
            Ok(Layer {
                input_norm: Norm::load(&layer.input_norm, spec.norm_eps, loader)?,
                attention: AttentionBlock::load(
                    &layer.attention,
                    spec.norm_eps,
                    spec.rope.style,
                    loader,
                )?,
                post_attention_norm: Norm::load(&layer.post_attention_norm, spec.norm_eps, loader)?,
                feed_forward: FeedForward::load(&layer.feed_forward, loader)?,
            })
        };
        Ok(Decoder {
            embedding: Embedding::load(spec, loader)?,
            layers: spec.layers.iter().map(layer).collect::<Result<_, _>>()?,
            final_norm: Norm::load(&spec.final_norm, spec.norm_eps, loader)?,
            rope: RopeTable::load(&spec.rope, max_position, loader)?,
            logit_softcap: spec.logit_softcap,
        })
    }

    /// Computes the step: fills the cache and leaves in `workspace.hidden` the final, normalised
    /// hidden state of every token.
    pub fn forward(
        &self,
        rank: &RankContext,
        batch: &ForwardBatch,
        cache: &mut KvCache,
        workspace: &mut Workspace,
    ) {
        let num_tokens = batch.num_tokens();
        self.embedding.embed(rank, batch.token_ids(), workspace.residual.rows_mut(num_tokens));
        for (i, layer) in self.layers.iter().enumerate() {
            let kv = &mut cache.layers[i];
            let norm = layer.input_norm.before_block(i > 0);
            let step = AttentionStep { norm, rope: &self.rope, batch };
            layer.attention.forward(rank, step, kv, workspace);
            let norm = layer.post_attention_norm.before_block(true);
            layer.feed_forward.forward(rank, norm, num_tokens, workspace);
        }
        self.final_norm.before_block(true).run(rank, num_tokens, workspace);
    }

    /// Logits of some of the rows that the batch selects, from the last [`Decoder::forward`], in
    /// `workspace.logits`. At most as many rows as the workspace was made for.
    pub fn logits(
        &self,
        rank: &RankContext,
        batch: &ForwardBatch,
        selected: Range<usize>,
        workspace: &mut Workspace,
    ) {
        let num_rows = selected.len();
        self.select(rank, batch, selected, workspace);
        let selected = workspace.selected.rows(num_rows);
        self.embedding.logits(rank, selected, workspace.logits.rows_mut(num_rows));
        if let Some(cap) = self.logit_softcap {
            rank.ops.soft_cap(SoftCapArgs { x: workspace.logits.rows_mut(num_rows), cap });
        }
    }

    /// The tokens with the largest logits of these rows. `None` where a device finds them in logits
    /// only, which then lie in the workspace as after [`Decoder::logits`].
    pub fn greedy(
        &self,
        rank: &RankContext,
        batch: &ForwardBatch,
        selected: Range<usize>,
        workspace: &mut Workspace,
    ) -> Option<Vec<u32>> {
        if self.logit_softcap.is_some() {
            // Large logits may be equal once they are capped.
            self.logits(rank, batch, selected, workspace);
            return None;
        }
        let num_rows = selected.len();
        self.select(rank, batch, selected, workspace);
        let selected = workspace.selected.rows(num_rows);
        let tokens = self.embedding.greedy(rank, selected);
        if tokens.is_none() {
            self.embedding.logits(rank, selected, workspace.logits.rows_mut(num_rows));
        }
        tokens
    }

    /// Gathers hidden states in `workspace.selected`.
    fn select(
        &self,
        rank: &RankContext,
        batch: &ForwardBatch,
        selected: Range<usize>,
        workspace: &mut Workspace,
    ) {
        rank.ops.gather_rows(GatherRowsArgs {
            out: workspace.selected.rows_mut(selected.len()),
            x: workspace.hidden.view(),
            rows: batch.logit_rows(selected),
        });
    }
}
