//! A model with nothing left to guess: kind and size, layer by layer.
//!
//! The only description the decoder, the loader and the tests read. It names every tensor
//! and its shape, so that a checkpoint can be checked before any of it is used.

use super::error::ModelError;
use super::expert_params::ExpertParams;
use super::family::{ExpertsFamily, Family, QkNorm};
use super::hparams::{HyperParams, read_config};
use super::rope::RopeSpec;
use crate::checkpoint::{ExpectedTensor, TensorRole};
use crate::ops::args::{Activation, Routing};
use crate::tensor::DType;
use crate::weights::mxfp4::Layout;

/// One model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Name of the family.
    pub family: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Longest context the model supports, in tokens.
    pub max_position: usize,
    /// Epsilon of every norm.
    pub norm_eps: f32,
    /// Name of the embedding table, `[vocab_size, hidden_size]`.
    pub embedding: String,
    /// Name of the last norm's weight, `[hidden_size]`.
    pub final_norm: String,
    /// The output projection; unused when `tied`.
    pub lm_head: LinearSpec,
    /// The embedding table is also the output projection.
    pub tied: bool,
    /// Rotary embedding of all layers.
    pub rope: RopeSpec,
    /// The layers, first to last.
    pub layers: Vec<LayerSpec>,
    /// Tokens that end a text, as config.json lists them; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a text, if config.json names one.
    pub bos_token_id: Option<u32>,
    /// Element type in which the weights were published.
    pub dtype: DType,
    /// How matrices are stored that are quantized.
    pub stored: Option<Layout>,
}

/// One layer: norm, attention, norm, feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// Name of the weight of the norm before attention, `[hidden_size]`.
    pub input_norm: String,
    /// Attention.
    pub attention: AttentionSpec,
    /// Name of the weight of the norm before the feed-forward block, `[hidden_size]`.
    pub post_attention_norm: String,
    /// What computes after attention.
    pub feed_forward: FeedForwardSpec,
}

/// The feed-forward block of one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardSpec {
    /// The same MLP for every token.
    Mlp(MlpSpec),
    /// Some of many MLPs for each token.
    Moe(MoeSpec),
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies q·k.
    pub scale: f32,
    /// A query sees this many tokens, itself included; `None` sees all.
    pub sliding_window: Option<usize>,
    /// Query projection, `[num_heads * head_dim, hidden_size]`.
    pub q: LinearSpec,
    /// Key projection, `[num_kv_heads * head_dim, hidden_size]`.
    pub k: LinearSpec,
    /// Value projection, as `k`.
    pub v: LinearSpec,
    /// Output projection, `[hidden_size, num_heads * head_dim]`.
    pub o: LinearSpec,
    /// Normalisation of query and key heads before they rotate, if the family has it.
    pub qk_norm: Option<QkNormSpec>,
}

/// Normalisation of query and key heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QkNormSpec {
    /// Name of the weight for query heads, `[head_dim]`.
    pub q_norm: String,
    /// Name of the weight for key heads, `[head_dim]`.
    pub k_norm: String,
}

/// Gated MLP of one layer: `down(activation(gate(x)) * up(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct MlpSpec {
    /// Width between the projections.
    pub intermediate_size: usize,
    /// Applied to the gate.
    pub activation: Activation,
    /// Gate projection, `[intermediate_size, hidden_size]`.
    pub gate: LinearSpec,
    /// Up projection, as `gate`.
    pub up: LinearSpec,
    /// Down projection, `[hidden_size, intermediate_size]`.
    pub down: LinearSpec,
}

/// Mixture of experts of one layer: the weighted sum of what the chosen experts yield.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    /// Its products choose the experts of a token, `[num_experts, hidden_size]`.
    pub router: LinearSpec,
    /// How experts are chosen and weighted.
    pub routing: Routing,
    /// Experts that compute a token.
    pub experts_per_token: usize,
    /// The experts, all of the same sizes and without biases.
    pub experts: Vec<MlpSpec>,
}

/// A linear layer; its tensors are `name.weight` and, with a bias, `name.bias`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Name without `.weight`.
    pub name: String,
    /// Width of the output.
    pub out_features: usize,
    /// Width of the input.
    pub in_features: usize,
    /// It adds a bias of `[out_features]`.
    pub bias: bool,
}

impl ModelSpec {
    /// The model that the text of config.json describes.
    pub fn from_config(config_json: &str) -> Result<ModelSpec, ModelError> {
        let (family, hparams) = read_config(config_json)?;
        Ok(ModelSpec::new(family, &hparams))
    }

    /// The model of a family and its sizes.
    pub fn new(family: &Family, hparams: &HyperParams) -> ModelSpec {
        let names = &family.tensors;
        let lm_head = linear(&names.lm_head, (hparams.vocab_size, hparams.hidden_size), false);
        ModelSpec {
            family: family.name.clone(),
            vocab_size: hparams.vocab_size,
            hidden_size: hparams.hidden_size,
            max_position: hparams.max_position,
            norm_eps: hparams.norm_eps,
            embedding: names.embedding.clone(),
            final_norm: names.final_norm.clone(),
            lm_head,
            tied: hparams.tied,
            rope: hparams.rope.clone(),
            layers: (0..hparams.windows.len()).map(|i| layer(family, hparams, i)).collect(),
            eos_token_ids: hparams.eos_token_ids.clone(),
            bos_token_id: hparams.bos_token_id,
            dtype: hparams.dtype,
            stored: hparams.stored,
        }
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Experts of the layer that has most; 0 in a model without.
    pub fn num_experts(&self) -> usize {
        self.moes().map(|moe| moe.experts.len()).max().unwrap_or(0)
    }

    /// Most experts that compute a token; 0 in a model without.
    pub fn experts_per_token(&self) -> usize {
        self.moes().map(|moe| moe.experts_per_token).max().unwrap_or(0)
    }

    /// Width of the widest expert; 0 in a model without.
    pub fn expert_width(&self) -> usize {
        self.moes().map(|moe| moe.experts[0].intermediate_size).max().unwrap_or(0)
    }

    fn moes(&self) -> impl Iterator<Item = &MoeSpec> {
        self.layers.iter().filter_map(|layer| layer.feed_forward.moe())
    }

    /// The widest input of any projection.
    pub fn widest_input(&self) -> usize {
        let of_layer = |layer: &LayerSpec| {
            let attended = layer.attention.num_heads * layer.attention.head_dim;
            attended.max(layer.feed_forward.intermediate_size())
        };
        self.layers.iter().map(of_layer).max().unwrap_or(0).max(self.hidden_size)
    }

    /// Every tensor that the model needs, in the order of computation.
    pub fn expected_tensors(&self) -> Vec<ExpectedTensor> {
        let mut tensors = vec![ExpectedTensor {
            name: self.embedding.clone(),
            shape: vec![self.vocab_size, self.hidden_size],
            role: TensorRole::Matrix,
        }];
        for layer in &self.layers {
            tensors.push(norm(&layer.input_norm, self.hidden_size));
            layer.attention.extend_expected(&mut tensors);
            tensors.push(norm(&layer.post_attention_norm, self.hidden_size));
            layer.feed_forward.extend_expected(&mut tensors);
        }
        tensors.push(norm(&self.final_norm, self.hidden_size));
        if !self.tied {
            self.lm_head.extend_expected(&mut tensors);
        }
        tensors
    }
}

impl AttentionSpec {
    fn extend_expected(&self, tensors: &mut Vec<ExpectedTensor>) {
        for projection in [&self.q, &self.k, &self.v] {
            projection.extend_expected(tensors);
        }
        if let Some(names) = &self.qk_norm {
            tensors.push(norm(&names.q_norm, self.head_dim));
            tensors.push(norm(&names.k_norm, self.head_dim));
        }
        self.o.extend_expected(tensors);
    }
}

impl FeedForwardSpec {
    /// Width between the projections, of an MLP or of each expert.
    pub fn intermediate_size(&self) -> usize {
        match self {
            FeedForwardSpec::Mlp(mlp) => mlp.intermediate_size,
            FeedForwardSpec::Moe(moe) => moe.experts[0].intermediate_size,
        }
    }

    /// The mixture of experts, if it is one.
    pub fn moe(&self) -> Option<&MoeSpec> {
        match self {
            FeedForwardSpec::Mlp(_) => None,
            FeedForwardSpec::Moe(moe) => Some(moe),
        }
    }

    fn extend_expected(&self, tensors: &mut Vec<ExpectedTensor>) {
        match self {
            FeedForwardSpec::Mlp(mlp) => mlp.extend_expected(tensors),
            FeedForwardSpec::Moe(moe) => {
                tensors.push(ExpectedTensor {
                    name: moe.router.weight_name(),
                    shape: vec![moe.router.out_features, moe.router.in_features],
                    role: TensorRole::Router,
                });
                moe.experts.iter().for_each(|expert| expert.extend_expected(tensors));
            }
        }
    }
}

impl MlpSpec {
    /// Elements of its matrices.
    pub fn num_weights(&self) -> usize {
        [&self.gate, &self.up, &self.down].map(LinearSpec::num_weights).iter().sum()
    }

    fn extend_expected(&self, tensors: &mut Vec<ExpectedTensor>) {
        for projection in [&self.gate, &self.up, &self.down] {
            projection.extend_expected(tensors);
        }
    }
}

impl LinearSpec {
    /// Name of the weight tensor.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// Elements of the matrix.
    pub fn num_weights(&self) -> usize {
        self.out_features * self.in_features
    }

    /// Name of the bias tensor.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.name)
    }

    fn extend_expected(&self, tensors: &mut Vec<ExpectedTensor>) {
        tensors.push(ExpectedTensor {
            name: self.weight_name(),
            shape: vec![self.out_features, self.in_features],
            role: TensorRole::Matrix,
        });
        if self.bias {
            tensors.push(ExpectedTensor {
                name: self.bias_name(),
                shape: vec![self.out_features],
                role: TensorRole::Bias,
            });
        }
    }
}

fn norm(name: &str, width: usize) -> ExpectedTensor {
    ExpectedTensor { name: name.to_owned(), shape: vec![width], role: TensorRole::Norm }
}

/// A linear layer of `[out_features, in_features]`.
fn linear(name: &str, shape: (usize, usize), bias: bool) -> LinearSpec {
    LinearSpec { name: name.to_owned(), out_features: shape.0, in_features: shape.1, bias }
}

fn layer(family: &Family, hparams: &HyperParams, index: usize) -> LayerSpec {
    let name = |template: &str| template.replace("{layer}", &index.to_string());
    LayerSpec {
        input_norm: name(&family.tensors.input_norm),
        attention: attention(family, hparams, index),
        post_attention_norm: name(&family.tensors.post_attention_norm),
        feed_forward: feed_forward(family, hparams, index),
    }
}

fn attention(family: &Family, hparams: &HyperParams, index: usize) -> AttentionSpec {
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
        q: linear(&name(&names.q), (q_width, hidden_size), qkv_bias),
        k: linear(&name(&names.k), (kv_width, hidden_size), qkv_bias),
        v: linear(&name(&names.v), (kv_width, hidden_size), qkv_bias),
        o: linear(&name(&names.o), (hidden_size, q_width), o_bias),
        qk_norm: match family.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => {
                Some(QkNormSpec { q_norm: name(&names.q_norm), k_norm: name(&names.k_norm) })
            }
        },
    }
}

fn feed_forward(family: &Family, hparams: &HyperParams, index: usize) -> FeedForwardSpec {
    match (&family.experts, &hparams.experts) {
        (Some(names), Some(params)) if params.layers[index] => {
            FeedForwardSpec::Moe(moe(names, params, hparams, index))
        }
        _ => FeedForwardSpec::Mlp(mlp(family, hparams, index)),
    }
}

fn moe(
    family: &ExpertsFamily,
    params: &ExpertParams,
    hparams: &HyperParams,
    index: usize,
) -> MoeSpec {
    let names = &family.tensors;
    let name = |template: &str| template.replace("{layer}", &index.to_string());
    let (hidden, width) = (hparams.hidden_size, params.intermediate_size);
    let expert = |expert: usize| {
        let name = |template: &str| name(template).replace("{expert}", &expert.to_string());
        MlpSpec {
            intermediate_size: width,
            activation: hparams.activation,
            gate: linear(&name(&names.gate), (width, hidden), false),
            up: linear(&name(&names.up), (width, hidden), false),
            down: linear(&name(&names.down), (hidden, width), false),
        }
    };
    MoeSpec {
        router: linear(&name(&names.router), (params.num_experts, hidden), false),
        routing: params.routing,
        experts_per_token: params.experts_per_token,
        experts: (0..params.num_experts).map(expert).collect(),
    }
}

fn mlp(family: &Family, hparams: &HyperParams, index: usize) -> MlpSpec {
    let names = &family.tensors;
    let name = |template: &str| template.replace("{layer}", &index.to_string());
    let HyperParams { hidden_size, intermediate_size, .. } = *hparams;
    let bias = family.mlp_bias.holds(hparams.mlp_bias);
    MlpSpec {
        intermediate_size,
        activation: hparams.activation,
        gate: linear(&name(&names.gate), (intermediate_size, hidden_size), bias),
        up: linear(&name(&names.up), (intermediate_size, hidden_size), bias),
        down: linear(&name(&names.down), (hidden_size, intermediate_size), bias),
    }
}
