//! A model with nothing left to guess: kind and size, layer by layer.
//!
//! The only description the decoder, the loader and the tests read. It names every tensor
//! and its shape, so that a checkpoint can be checked before any of it is used.

pub use super::attention_spec::*;
use super::error::ModelError;
use super::expert_params::ExpertParams;
use super::family::{ExpertsFamily, Family, NormName};
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
    /// The norm after the last layer.
    pub final_norm: NormSpec,
    /// The output projection; unused when `tied`.
    pub lm_head: LinearSpec,
    /// The embedding table is also the output projection.
    pub tied: bool,
    /// Logits become `cap · tanh(logit / cap)`.
    pub logit_softcap: Option<f32>,
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
    /// How names of tensors begin that the model does without: those of layers after the last one,
    /// which predict further tokens.
    pub unused_prefixes: Vec<String>,
}

/// One layer: norm, attention, norm, feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// The norm before attention.
    pub input_norm: NormSpec,
    /// Attention.
    pub attention: AttentionSpec,
    /// The norm before the feed-forward block.
    pub post_attention_norm: NormSpec,
    /// What computes after attention.
    pub feed_forward: FeedForwardSpec,
}

/// A norm of the residual stream: names of its tensors, `[hidden_size]` each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NormSpec {
    /// An RMS norm.
    Rms {
        /// Its weight.
        weight: String,
    },
    /// A layer norm.
    Layer {
        /// Its weight.
        weight: String,
        /// Its bias.
        bias: String,
    },
}

/// The feed-forward block of one layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardSpec {
    /// The same MLP for every token.
    Mlp(MlpSpec),
    /// Some of many MLPs for each token.
    Moe(MoeSpec),
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
    /// Name of the tensor that is added to scores when experts are chosen, `[num_experts]`.
    pub bias: Option<String>,
    /// How experts are chosen and weighted.
    pub routing: Routing,
    /// What every token has beside.
    pub shared: Option<MlpSpec>,
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
            final_norm: NormSpec::new(family.norm, names.final_norm.clone()),
            lm_head,
            tied: hparams.tied,
            logit_softcap: hparams.logit_softcap,
            rope: hparams.rope.clone(),
            layers: (0..hparams.windows.len()).map(|i| layer(family, hparams, i)).collect(),
            eos_token_ids: hparams.eos_token_ids.clone(),
            bos_token_id: hparams.bos_token_id,
            dtype: hparams.dtype,
            stored: hparams.stored,
            unused_prefixes: unused_prefixes(family, hparams),
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
            let attention = &layer.attention;
            let attended = attention.linears().into_iter().map(|linear| linear.in_features).max();
            attended.unwrap_or(0).max(layer.feed_forward.intermediate_size())
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
            layer.input_norm.extend_expected(self.hidden_size, &mut tensors);
            layer.attention.extend_expected(&mut tensors);
            layer.post_attention_norm.extend_expected(self.hidden_size, &mut tensors);
            layer.feed_forward.extend_expected(&mut tensors);
        }
        self.final_norm.extend_expected(self.hidden_size, &mut tensors);
        if !self.tied {
            self.lm_head.extend_expected(&mut tensors);
        }
        tensors
    }
}

impl NormSpec {
    /// The norm whose weight has this name.
    fn new(kind: NormName, weight: String) -> NormSpec {
        match kind {
            NormName::Rms => NormSpec::Rms { weight },
            NormName::Layer => {
                let bias = format!("{}.bias", weight.strip_suffix(".weight").unwrap_or(&weight));
                NormSpec::Layer { weight, bias }
            }
        }
    }

    fn extend_expected(&self, width: usize, tensors: &mut Vec<ExpectedTensor>) {
        match self {
            NormSpec::Rms { weight } => tensors.push(norm(weight, width)),
            NormSpec::Layer { weight, bias } => {
                tensors.push(norm(weight, width));
                tensors.push(ExpectedTensor { role: TensorRole::Bias, ..norm(bias, width) });
            }
        }
    }
}

impl FeedForwardSpec {
    /// Width between the projections, of an MLP or of the widest expert.
    pub fn intermediate_size(&self) -> usize {
        match self {
            FeedForwardSpec::Mlp(mlp) => mlp.intermediate_size,
            FeedForwardSpec::Moe(moe) => {
                let shared = moe.shared.as_ref().map_or(0, |shared| shared.intermediate_size);
                moe.experts[0].intermediate_size.max(shared)
            }
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
                tensors.push(ExpectedTensor { role: TensorRole::Router, ..moe.router.expected() });
                tensors.extend(moe.bias.iter().map(|name| ExpectedTensor {
                    name: name.clone(),
                    shape: vec![moe.experts.len()],
                    role: TensorRole::Bias,
                }));
                if let Some(shared) = &moe.shared {
                    shared.extend_expected(tensors);
                }
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

    /// The tensor of its matrix.
    pub(super) fn expected(&self) -> ExpectedTensor {
        ExpectedTensor {
            name: self.weight_name(),
            shape: vec![self.out_features, self.in_features],
            role: TensorRole::Matrix,
        }
    }

    /// Adds its tensors.
    pub(super) fn extend_expected(&self, tensors: &mut Vec<ExpectedTensor>) {
        tensors.push(self.expected());
        if self.bias {
            tensors.push(ExpectedTensor {
                name: self.bias_name(),
                shape: vec![self.out_features],
                role: TensorRole::Bias,
            });
        }
    }
}

/// The weight of a norm.
pub(super) fn norm(name: &str, width: usize) -> ExpectedTensor {
    ExpectedTensor { name: name.to_owned(), shape: vec![width], role: TensorRole::Norm }
}

/// A linear layer of `[out_features, in_features]`.
pub(super) fn linear(name: &str, shape: (usize, usize), bias: bool) -> LinearSpec {
    LinearSpec { name: name.to_owned(), out_features: shape.0, in_features: shape.1, bias }
}

fn layer(family: &Family, hparams: &HyperParams, index: usize) -> LayerSpec {
    let name = |template: &str| template.replace("{layer}", &index.to_string());
    LayerSpec {
        input_norm: NormSpec::new(family.norm, name(&family.tensors.input_norm)),
        attention: attention(family, hparams, index),
        post_attention_norm: NormSpec::new(family.norm, name(&family.tensors.post_attention_norm)),
        feed_forward: feed_forward(family, hparams, index),
    }
}

fn unused_prefixes(family: &Family, hparams: &HyperParams) -> Vec<String> {
    let num_layers = hparams.windows.len();
    let Some((start, _)) = family.tensors.input_norm.split_once("{layer}") else {
        return Vec::new();
    };
    let layers = num_layers..num_layers + hparams.num_prediction_layers;
    layers.map(|layer| format!("{start}{layer}.")).collect()
}

fn feed_forward(family: &Family, hparams: &HyperParams, index: usize) -> FeedForwardSpec {
    match (&family.experts, &hparams.experts) {
        (Some(names), Some(params)) if params.layers[index] => {
            FeedForwardSpec::Moe(moe(family, (names, params), hparams, index))
        }
        _ => {
            let names = &family.tensors;
            let width = hparams.intermediate_size;
            let names = [&names.gate, &names.up, &names.down];
            FeedForwardSpec::Mlp(mlp(family, hparams, names, width, index))
        }
    }
}

fn moe(
    family: &Family,
    (experts, params): (&ExpertsFamily, &ExpertParams),
    hparams: &HyperParams,
    index: usize,
) -> MoeSpec {
    let names = &experts.tensors;
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
        bias: (!names.bias.is_empty()).then(|| name(&names.bias)),
        routing: params.routing,
        shared: params.shared_width.map(|width| {
            let names = [&names.shared_gate, &names.shared_up, &names.shared_down];
            mlp(family, hparams, names, width, index)
        }),
        experts_per_token: params.experts_per_token,
        experts: (0..params.num_experts).map(expert).collect(),
    }
}

/// Gate, up and down projection of these names.
fn mlp(
    family: &Family,
    hparams: &HyperParams,
    names: [&String; 3],
    intermediate_size: usize,
    index: usize,
) -> MlpSpec {
    let [gate, up, down] = names.map(|name| name.replace("{layer}", &index.to_string()));
    let hidden_size = hparams.hidden_size;
    let bias = family.mlp_bias.holds(hparams.mlp_bias);
    MlpSpec {
        intermediate_size,
        activation: hparams.activation,
        gate: linear(&gate, (intermediate_size, hidden_size), bias),
        up: linear(&up, (intermediate_size, hidden_size), bias),
        down: linear(&down, (hidden_size, intermediate_size), bias),
    }
}
