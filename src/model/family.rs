//! What kind of model: the schema of `models/families/*.toml`.
//!
//! A family says how blocks are wired and how tensors are named; `hparams` says how big
//! they are. The enums are closed: a description that asks for an unknown block does not
//! parse. A new family of known blocks is one TOML file and one line in [`SOURCES`] (the
//! compiler embeds only files it is told of; a test compares the list with the folder).

use std::sync::LazyLock;

use serde::Deserialize;

use crate::ops::args::RopeStyle;

/// The descriptions: name of the family, text of its file.
const SOURCES: [(&str, &str); 9] = [
    ("deepseek_v2", include_str!("../../models/families/deepseek_v2.toml")),
    ("deepseek_v3", include_str!("../../models/families/deepseek_v3.toml")),
    ("llama", include_str!("../../models/families/llama.toml")),
    ("mistral", include_str!("../../models/families/mistral.toml")),
    ("mixtral", include_str!("../../models/families/mixtral.toml")),
    ("qwen2", include_str!("../../models/families/qwen2.toml")),
    ("qwen3", include_str!("../../models/families/qwen3.toml")),
    ("qwen3_moe", include_str!("../../models/families/qwen3_moe.toml")),
    ("stablelm", include_str!("../../models/families/stablelm.toml")),
];

static FAMILIES: LazyLock<Vec<Family>> = LazyLock::new(|| {
    let parse = |(name, text): &(&str, &str)| {
        let family = toml::from_str(text);
        Family {
            name: (*name).to_owned(),
            ..family.expect("a test parses every embedded family description")
        }
    };
    SOURCES.iter().map(parse).collect()
});

/// One family of models.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    /// Name of the file, without its ending.
    #[serde(skip)]
    pub name: String,
    /// Values of `architectures` in config.json that mean this family.
    pub architectures: Vec<String>,
    /// How the residual stream is normalised.
    #[serde(default)]
    pub norm: NormName,
    /// Which elements of a head rotate together.
    pub rope_style: RopeStyleName,
    /// Bias of the query, key and value projections.
    pub qkv_bias: BiasRule,
    /// The field of config.json that decides where biases of attention are [`BiasRule::Config`].
    #[serde(default = "attention_bias")]
    pub attention_bias_field: String,
    /// Bias of the output projection.
    pub o_bias: BiasRule,
    /// Bias of the three MLP projections.
    pub mlp_bias: BiasRule,
    /// Normalisation of queries and keys before they rotate.
    pub qk_norm: QkNorm,
    /// Which layers have a sliding window.
    pub sliding_window: WindowRule,
    /// Fields of config.json that ask for blocks which there are not, where they are true.
    #[serde(default)]
    pub unsupported_flags: Vec<String>,
    /// Fields that config.json may leave out.
    pub defaults: Defaults,
    /// Names in the checkpoint.
    pub tensors: TensorNames,
    /// Mixtures of experts, in a family that has them.
    pub experts: Option<ExpertsFamily>,
    /// Names of latent attention's tensors, in a family that has it.
    pub latent: Option<LatentTensorNames>,
}

fn attention_bias() -> String {
    "attention_bias".to_owned()
}

/// How a residual stream is normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormName {
    /// RMS norms, with `rms_norm_eps`.
    #[default]
    Rms,
    /// Layer norms with biases, with `layer_norm_eps`. The bias of `x.weight` is `x.bias`.
    Layer,
}

/// Spelling of [`RopeStyle`] in a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeStyleName {
    /// [`RopeStyle::Halves`].
    Halves,
    /// [`RopeStyle::Interleaved`].
    Interleaved,
}

impl From<RopeStyleName> for RopeStyle {
    fn from(name: RopeStyleName) -> RopeStyle {
        match name {
            RopeStyleName::Halves => RopeStyle::Halves,
            RopeStyleName::Interleaved => RopeStyle::Interleaved,
        }
    }
}

/// Whether a linear layer has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasRule {
    /// Every model of the family has it.
    Always,
    /// No model of the family has it.
    Never,
    /// [`Family::attention_bias_field`] or `mlp_bias` in config.json decides; absent means no.
    Config,
}

impl BiasRule {
    /// The answer, given the field of config.json.
    pub fn holds(self, configured: bool) -> bool {
        match self {
            BiasRule::Always => true,
            BiasRule::Never => false,
            BiasRule::Config => configured,
        }
    }
}

/// Normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// None.
    None,
    /// RMS norm over each head, one weight of `head_dim` for all heads.
    PerHead,
}

/// Which layers have a sliding window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowRule {
    /// None; `sliding_window` in config.json is ignored.
    Never,
    /// All of them, unless `sliding_window` is null.
    AllLayers,
    /// All of them, but only with `use_sliding_window`.
    AllLayersIfUsed,
    /// Only with `use_sliding_window`: those that `layer_types` names, or else the layers
    /// from `max_window_layers` on.
    UpperLayers,
}

/// What a family means by fields that config.json leaves out.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Defaults {
    /// Non-linearity of the MLP.
    pub hidden_act: String,
    /// Added to the mean square, or to the variance, before the root.
    #[serde(alias = "rms_norm_eps", alias = "layer_norm_eps")]
    pub norm_eps: f64,
    /// Base wavelength of the rotary embedding.
    pub rope_theta: f64,
    /// Part of a head that rotates; without it all of it does, whatever config.json says.
    pub partial_rotary_factor: Option<f64>,
    /// Whether the output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// Key and value heads; without it as many as query heads.
    pub num_key_value_heads: Option<usize>,
    /// Width of a head; without it `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Window in tokens.
    pub sliding_window: Option<usize>,
    /// First layer with a window.
    pub max_window_layers: Option<usize>,
}

/// Names of tensors; `{layer}` stands for a layer's number.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorNames {
    /// Embedding table.
    pub embedding: String,
    /// Norm after the last layer.
    pub final_norm: String,
    /// Output projection, as a linear layer.
    pub lm_head: String,
    /// Norm before attention.
    pub input_norm: String,
    /// Norm before the MLP.
    pub post_attention_norm: String,
    /// Query projection; empty where attention is latent.
    #[serde(default)]
    pub q: String,
    /// Key projection, likewise.
    #[serde(default)]
    pub k: String,
    /// Value projection, likewise.
    #[serde(default)]
    pub v: String,
    /// Output projection of attention.
    pub o: String,
    /// Gate projection of an MLP; empty where all layers have experts instead.
    #[serde(default)]
    pub gate: String,
    /// Up projection, likewise.
    #[serde(default)]
    pub up: String,
    /// Down projection, likewise.
    #[serde(default)]
    pub down: String,
    /// Norm of query heads; needed with [`QkNorm::PerHead`].
    #[serde(default)]
    pub q_norm: String,
    /// Norm of key heads; needed with [`QkNorm::PerHead`].
    #[serde(default)]
    pub k_norm: String,
}

/// Names of tensors of latent attention; `{layer}` stands for a layer's number.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LatentTensorNames {
    /// Query projection of models that do not compress queries.
    pub q: String,
    /// Compression of queries.
    pub q_down: String,
    /// Norm of compressed queries.
    pub q_norm: String,
    /// Query projection of compressed queries.
    pub q_up: String,
    /// Projection to a latent and a key that rotates.
    pub kv_down: String,
    /// Norm of latents.
    pub kv_norm: String,
    /// Keys and values of a latent.
    pub kv_up: String,
}

/// How a family mixes experts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertsFamily {
    /// How router logits become weights.
    pub routing: RoutingName,
    /// Whether the weights of a token are divided by their sum.
    pub renormalize: RenormalizeRule,
    /// Which layers have experts; the others have an MLP.
    pub layers: ExpertLayers,
    /// The fields of config.json that may say how many experts a layer has.
    pub num_experts_fields: Vec<String>,
    /// The field of config.json that says how wide an expert is.
    pub intermediate_size_field: String,
    /// Fields that config.json may leave out.
    pub defaults: ExpertDefaults,
    /// Names in the checkpoint.
    pub tensors: ExpertTensorNames,
}

/// Spelling of [`crate::ops::args::Routing`] in a description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoutingName {
    /// A softmax over all experts, of which the most probable are chosen.
    Softmax,
    /// Within groups or not, as `topk_method` in config.json says.
    GroupedSoftmax,
    /// Sigmoids with a bias, within groups.
    GroupedSigmoid,
}

/// Whether weights of chosen experts are divided by their sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RenormalizeRule {
    /// In every model of the family.
    Always,
    /// `norm_topk_prob` in config.json decides; absent means no.
    Config,
    /// In no model of the family: `norm_topk_prob` is refused.
    Never,
}

/// Which layers have experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertLayers {
    /// All of them.
    All,
    /// Every `decoder_sparse_step`-th, except those in `mlp_only_layers`.
    Stepped,
    /// Every `moe_layer_freq`-th from `first_k_dense_replace` on.
    Upper,
}

/// What a family means by fields about experts that config.json leaves out.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertDefaults {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that compute a token.
    pub num_experts_per_tok: usize,
    /// Width of an expert; without it config.json must say so.
    pub intermediate_size: Option<usize>,
    /// Experts that every token has beside.
    #[serde(default)]
    pub num_shared_experts: usize,
}

/// Names of tensors; `{layer}` and `{expert}` stand for numbers.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertTensorNames {
    /// The matrix that chooses, as a linear layer.
    pub router: String,
    /// Gate projection of an expert.
    pub gate: String,
    /// Up projection of an expert.
    pub up: String,
    /// Down projection of an expert.
    pub down: String,
    /// What is added to scores when experts are chosen; needed with
    /// [`RoutingName::GroupedSigmoid`].
    #[serde(default)]
    pub bias: String,
    /// Gate projection of the experts that every token has, which are one MLP; empty in a family
    /// without.
    #[serde(default)]
    pub shared_gate: String,
    /// Up projection, likewise.
    #[serde(default)]
    pub shared_up: String,
    /// Down projection, likewise.
    #[serde(default)]
    pub shared_down: String,
}

impl Family {
    /// All families, in the order of their names.
    pub fn all() -> &'static [Family] {
        &FAMILIES
    }

    /// The family that one of these architectures belongs to.
    pub fn of_architectures(architectures: &[String]) -> Option<&'static Family> {
        Family::all().iter().find(|f| f.architectures.iter().any(|a| architectures.contains(a)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_description_parses_and_is_complete() {
        assert_eq!(Family::all().len(), SOURCES.len());
        for family in Family::all() {
            assert!(!family.architectures.is_empty(), "{}", family.name);
            let per_head = family.qk_norm == QkNorm::PerHead;
            assert_eq!(per_head, !family.tensors.q_norm.is_empty(), "{}: q_norm", family.name);
            assert_eq!(per_head, !family.tensors.k_norm.is_empty(), "{}: k_norm", family.name);
            let windowed = family.sliding_window != WindowRule::Never;
            assert!(windowed || family.defaults.sliding_window.is_none(), "{}", family.name);
            let TensorNames { q, k, v, .. } = &family.tensors;
            for name in [q, k, v] {
                assert_eq!(family.latent.is_none(), !name.is_empty(), "{}: q, k, v", family.name);
            }
            if let Some(experts) = &family.experts {
                let ExpertTensorNames { bias, shared_gate, shared_up, shared_down, .. } =
                    &experts.tensors;
                let has_bias = experts.routing == RoutingName::GroupedSigmoid;
                assert_eq!(has_bias, !bias.is_empty(), "{}: bias", family.name);
                let has_shared = experts.defaults.num_shared_experts > 0;
                for name in [shared_gate, shared_up, shared_down] {
                    assert_eq!(has_shared, !name.is_empty(), "{}: shared experts", family.name);
                }
            }
            let layers = family.experts.as_ref().map(|experts| experts.layers);
            let has_mlp = layers != Some(ExpertLayers::All);
            let TensorNames { gate, up, down, .. } = &family.tensors;
            for name in [gate, up, down] {
                assert_eq!(has_mlp, !name.is_empty(), "{}: gate, up, down", family.name);
            }
        }
    }

    #[test]
    fn every_file_of_the_folder_is_embedded() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/families");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        let embedded: Vec<String> =
            SOURCES.iter().map(|(name, _)| format!("{name}.toml")).collect();
        assert_eq!(files, embedded);
    }

    #[test]
    fn an_architecture_belongs_to_one_family() {
        let mut all: Vec<&String> = Family::all().iter().flat_map(|f| &f.architectures).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
        let qwen = ["Qwen2ForCausalLM".to_owned()];
        assert_eq!(Family::of_architectures(&qwen).unwrap().name, "qwen2");
        assert!(Family::of_architectures(&["GPT2LMHeadModel".to_owned()]).is_none());
    }

    #[test]
    fn an_unknown_block_or_field_does_not_parse() {
        let text = include_str!("../../models/families/llama.toml");
        assert!(toml::from_str::<Family>(text).is_ok());
        let unknown_value = text.replace("qk_norm = \"none\"", "qk_norm = \"layer\"");
        assert!(toml::from_str::<Family>(&unknown_value).is_err());
        let unknown_field = format!("colour = \"blue\"\n{text}");
        assert!(toml::from_str::<Family>(&unknown_field).is_err());
    }
}
