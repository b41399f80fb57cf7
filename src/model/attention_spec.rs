//! What a model's description says of attention: projections to heads, or to latents.

use super::family::{Family, LatentTensorNames, QkNorm};
use super::hparams::HyperParams;
use super::latent_params::LatentParams;
use super::spec::{LinearSpec, linear, norm};
use crate::checkpoint::{ExpectedTensor, TensorRole};
use crate::ops::LatentShape;
use crate::weights::heads::HeadShape;

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub num_heads: usize,
    /// Cached heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a cached head.
    pub head_dim: usize,
    /// Multiplies q·k.
    pub scale: f32,
    /// A query sees this many tokens, itself included; `None` sees all.
    pub sliding_window: Option<usize>,
    /// What makes queries, keys and values.
    pub inputs: AttentionInputs,
    /// Output projection, `[hidden_size, num_heads * width of a value]`.
    pub o: LinearSpec,
}

/// Where queries, keys and values come from.
#[derive(Clone, Debug, PartialEq)]
pub enum AttentionInputs {
    /// A projection each; keys and values are cached.
    Heads(HeadInputs),
    /// One cached vector is key and value of all heads.
    Latent(LatentInputs),
}

/// Projections to heads.
#[derive(Clone, Debug, PartialEq)]
pub struct HeadInputs {
    /// Query projection, `[num_heads * head_dim, hidden_size]`.
    pub q: LinearSpec,
    /// Key projection, `[num_kv_heads * head_dim, hidden_size]`.
    pub k: LinearSpec,
    /// Value projection, as `k`.
    pub v: LinearSpec,
    /// Normalisation of query and key heads before they rotate, if the family has it.
    pub qk_norm: Option<QkNormSpec>,
}

/// Projections of latent attention (`ops::args::LatentAttentionArgs`). A cached vector is a latent
/// and a key that rotates.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentInputs {
    /// Sizes of a head.
    pub shape: HeadShape,
    /// Elements that rotate.
    pub rope_dim: usize,
    /// Compression of queries, if they are compressed.
    pub q_down: Option<CompressionSpec>,
    /// Query projection, `[num_heads * (nope_dim + rope_dim), hidden_size]`, or of compressed ones.
    pub q: LinearSpec,
    /// Projection to a latent and a key that rotates.
    pub kv_down: CompressionSpec,
    /// Name of the layer of keys and values of a latent, `[num_heads * (nope_dim + value_dim), rank]`.
    pub kv_up: LinearSpec,
}

impl LatentInputs {
    /// What kernels depend on.
    pub fn kernel_shape(&self) -> LatentShape {
        let HeadShape { rank, nope_dim, value_dim, .. } = self.shape;
        LatentShape { rank, rope_dim: self.rope_dim, nope_dim, value_dim }
    }
}

/// A projection to a narrow vector that is normalised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompressionSpec {
    /// `[width, hidden_size]`.
    pub projection: LinearSpec,
    /// Name of the norm's weight.
    pub norm: String,
    /// Elements that are normalised, the first ones.
    pub norm_width: usize,
}

/// Normalisation of query and key heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QkNormSpec {
    /// Name of the weight for query heads, `[head_dim]`.
    pub q_norm: String,
    /// Name of the weight for key heads, `[head_dim]`.
    pub k_norm: String,
}

impl AttentionSpec {
    /// Projections to heads, unless it is latent.
    pub fn heads(&self) -> Option<&HeadInputs> {
        match &self.inputs {
            AttentionInputs::Heads(heads) => Some(heads),
            AttentionInputs::Latent(_) => None,
        }
    }

    /// Latent attention's sizes, if it is latent.
    pub fn latent(&self) -> Option<&LatentInputs> {
        match &self.inputs {
            AttentionInputs::Heads(_) => None,
            AttentionInputs::Latent(latent) => Some(latent),
        }
    }

    /// Elements of a cached vector that are the value.
    pub fn value_dim(&self) -> usize {
        self.latent().map_or(self.head_dim, |latent| latent.shape.rank)
    }

    /// Vectors that a token has in the cache.
    pub fn cached_vectors(&self) -> usize {
        if self.latent().is_some() { 1 } else { 2 * self.num_kv_heads }
    }

    /// Every matrix that a token is multiplied by.
    pub fn linears(&self) -> Vec<&LinearSpec> {
        let mut linears = match &self.inputs {
            AttentionInputs::Heads(HeadInputs { q, k, v, .. }) => vec![q, k, v],
            AttentionInputs::Latent(LatentInputs { q_down, q, kv_down, kv_up, .. }) => {
                let q_down = q_down.iter().map(|down| &down.projection);
                q_down.chain([q, &kv_down.projection, kv_up]).collect()
            }
        };
        linears.push(&self.o);
        linears
    }

    pub(super) fn extend_expected(&self, tensors: &mut Vec<ExpectedTensor>) {
        match &self.inputs {
            AttentionInputs::Heads(inputs) => {
                for projection in [&inputs.q, &inputs.k, &inputs.v] {
                    projection.extend_expected(tensors);
                }
                if let Some(names) = &inputs.qk_norm {
                    tensors.push(norm(&names.q_norm, self.head_dim));
                    tensors.push(norm(&names.k_norm, self.head_dim));
                }
            }
            AttentionInputs::Latent(LatentInputs { q_down, q, kv_down, kv_up, .. }) => {
                for down in q_down.iter().chain([kv_down]) {
                    down.projection.extend_expected(tensors);
                    tensors.push(norm(&down.norm, down.norm_width));
                }
                q.extend_expected(tensors);
                tensors.push(ExpectedTensor { role: TensorRole::Heads, ..kv_up.expected() });
            }
        }
        self.o.extend_expected(tensors);
    }
}

/// Attention of layer `index`.
pub(super) fn attention(family: &Family, hparams: &HyperParams, index: usize) -> AttentionSpec {
    if let (Some(names), Some(params)) = (&family.latent, &hparams.latent) {
        return latent_attention(family, hparams, (names, params), index);
    }
    let names = &family.tensors;
    let name = |template: &str| template.replace("{layer}", &index.to_string());
    let HyperParams { hidden_size, num_heads, num_kv_heads, head_dim, .. } = *hparams;
    let (q_width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
    let qkv_bias = family.qkv_bias.holds(hparams.attention_bias);
    let o_bias = family.o_bias.holds(hparams.attention_bias);
    AttentionSpec {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: (1.0 / (head_dim as f64).sqrt()) as f32,
        sliding_window: hparams.windows[index],
        inputs: AttentionInputs::Heads(HeadInputs {
            q: linear(&name(&names.q), (q_width, hidden_size), qkv_bias),
            k: linear(&name(&names.k), (kv_width, hidden_size), qkv_bias),
            v: linear(&name(&names.v), (kv_width, hidden_size), qkv_bias),
            qk_norm: match family.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => {
                    Some(QkNormSpec { q_norm: name(&names.q_norm), k_norm: name(&names.k_norm) })
                }
            },
        }),
        o: linear(&name(&names.o), (hidden_size, q_width), o_bias),
    }
}

fn latent_attention(
    family: &Family,
    hparams: &HyperParams,
    (names, params): (&LatentTensorNames, &LatentParams),
    index: usize,
) -> AttentionSpec {
    let name = |template: &str| template.replace("{layer}", &index.to_string());
    let HyperParams { hidden_size, num_heads, .. } = *hparams;
    let LatentParams { q_rank, rank, nope_dim, rope_dim, value_dim, scale } = *params;
    let shape = HeadShape { num_heads, nope_dim, value_dim, rank };
    // Projections of compressed vectors have no biases in any model.
    let bias = family.qkv_bias.holds(hparams.attention_bias);
    let o_bias = family.o_bias.holds(hparams.attention_bias);
    let q_width = num_heads * (nope_dim + rope_dim);
    let compression = |projection: &str, width: usize, norm: &str, norm_width: usize| {
        let projection = linear(&name(projection), (width, hidden_size), bias);
        CompressionSpec { projection, norm: name(norm), norm_width }
    };
    let [rows, cols] = shape.stored();
    AttentionSpec {
        num_heads,
        num_kv_heads: 1,
        head_dim: rank + rope_dim,
        scale,
        sliding_window: None,
        inputs: AttentionInputs::Latent(LatentInputs {
            shape,
            rope_dim,
            q_down: q_rank.map(|q_rank| compression(&names.q_down, q_rank, &names.q_norm, q_rank)),
            q: match q_rank {
                None => linear(&name(&names.q), (q_width, hidden_size), false),
                Some(q_rank) => linear(&name(&names.q_up), (q_width, q_rank), false),
            },
            kv_down: compression(&names.kv_down, rank + rope_dim, &names.kv_norm, rank),
            kv_up: linear(&name(&names.kv_up), (rows, cols), false),
        }),
        o: linear(&name(&family.tensors.o), (hidden_size, num_heads * value_dim), o_bias),
    }
}
