//! The decoder-only transformer: the one forward pass of this program.
//!
//! Serves every family, device and rank. Input is a flat [`ForwardBatch`]; sequences exist
//! here only as ranges of rows and block tables. Output is the residual stream, from which
//! [`Decoder::logits`] computes logits for the rows that are wanted.

use std::ops::Range;

use super::attention::{Attention, AttentionStep};
use super::batch::ForwardBatch;
use super::block_norm::BlockNorm;
use super::embedding::Embedding;
use super::error::ModelError;
use super::kv_cache::{KvCache, KvLayer};
use super::latent_attention::LatentAttention;
use super::mlp::Mlp;
use super::moe::Moe;
use super::rope::RopeTable;
use super::spec::{AttentionInputs, AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec};
use super::workspace::Workspace;
use crate::device::RankContext;
use crate::ops::args::{GatherRowsArgs, RopeStyle};
use crate::tensor::Tensor;
use crate::weights::Loader;

/// One layer.
struct Layer {
    input_norm: Tensor,
    attention: AttentionBlock,
    post_attention_norm: Tensor,
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
    final_norm: Tensor,
    rope: RopeTable,
    norm_eps: f32,
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
                input_norm: loader.tensor(&layer.input_norm)?,
                attention: AttentionBlock::load(
                    &layer.attention,
                    spec.norm_eps,
                    spec.rope.style,
                    loader,
                )?,
                post_attention_norm: loader.tensor(&layer.post_attention_norm)?,
                feed_forward: FeedForward::load(&layer.feed_forward, loader)?,
            })
        };
        Ok(Decoder {
            embedding: Embedding::load(spec, loader)?,
            layers: spec.layers.iter().map(layer).collect::<Result<_, _>>()?,
            final_norm: loader.tensor(&spec.final_norm)?,
            rope: RopeTable::load(&spec.rope, max_position, loader)?,
            norm_eps: spec.norm_eps,
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
            let norm = BlockNorm { follows_block: i > 0, ..self.norm(&layer.input_norm) };
            let step = AttentionStep { norm, rope: &self.rope, batch };
            layer.attention.forward(rank, step, kv, workspace);
            let norm = self.norm(&layer.post_attention_norm);
            layer.feed_forward.forward(rank, norm, num_tokens, workspace);
        }
        self.norm(&self.final_norm).run(rank, num_tokens, workspace);
    }

    /// A norm of this model, after a block.
    fn norm<'a>(&self, weight: &'a Tensor) -> BlockNorm<'a> {
        BlockNorm { weight, eps: self.norm_eps, follows_block: true }
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
