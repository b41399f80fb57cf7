//! How big a model is: config.json read once, every default filled in.
//!
//! Both spellings that are in use are understood: the older `rope_theta`, `rope_scaling`
//! and `torch_dtype`, and the newer `rope_parameters` and `dtype`. What cannot be served is
//! refused here with one sentence, before a byte of the weights is read.

use serde_json::Value;

use super::error::ModelError;
use super::expert_params::ExpertParams;
use super::family::{Family, NormName, WindowRule};
use super::fields::Fields;
use super::latent_params::LatentParams;
use super::quantization;
use super::rope::{RopeScaling, RopeSpec, yarn_attention_factor};
use crate::ops::args::{Activation, RopeStyle};
use crate::tensor::DType;
use crate::weights::mxfp4::Layout;

/// More layers than any model has; above it the file is nonsense.
const MAX_LAYERS: usize = 4096;

/// Positions above this do not fit the u32 in which they are computed.
const MAX_POSITION: f64 = (1u32 << 31) as f64;

/// The sizes and numbers of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct HyperParams {
    /// Tokens in the vocabulary, padding included.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Mixtures of experts, in a family that has them.
    pub experts: Option<ExpertParams>,
    /// Latent attention, in a family that has it.
    pub latent: Option<LatentParams>,
    /// Layers after the last one, which predict further tokens and are not used.
    pub num_prediction_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head, where attention is not latent; even.
    pub head_dim: usize,
    /// Longest context the model supports, in tokens.
    pub max_position: usize,
    /// Added to the mean square, or to the variance, before the root.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeSpec,
    /// Sliding window of each layer, in tokens.
    pub windows: Vec<Option<usize>>,
    /// Value of [`Family::attention_bias_field`].
    pub attention_bias: bool,
    /// Value of `mlp_bias`.
    pub mlp_bias: bool,
    /// Non-linearity of the MLP.
    pub activation: Activation,
    /// The output projection is the embedding table.
    pub tied: bool,
    /// Logits become `cap · tanh(logit / cap)`.
    pub logit_softcap: Option<f32>,
    /// Tokens that end a text, if config.json names any.
    pub eos_token_ids: Vec<u32>,
    /// Token that begins a text, if config.json names one.
    pub bos_token_id: Option<u32>,
    /// Element type in which the weights were published, or would be without quantization.
    pub dtype: DType,
    /// How matrices are stored that are quantized.
    pub stored: Option<Layout>,
}

/// Reads config.json: the family it belongs to and its sizes.
pub fn read_config(config_json: &str) -> Result<(&'static Family, HyperParams), ModelError> {
    let malformed = |reason: String| ModelError::MalformedConfig { reason };
    let value: Value =
        serde_json::from_str(config_json).map_err(|error| malformed(error.to_string()))?;
    let map = value.as_object().ok_or_else(|| malformed("it is not a JSON object".to_owned()))?;
    let config = Fields::new(map, "");
    let family = family_of(config)?;
    Ok((family, HyperParams::read(config, family)?))
}

fn family_of(config: Fields<'_>) -> Result<&'static Family, ModelError> {
    let architectures =
        config.texts("architectures")?.ok_or_else(|| config.missing("architectures"))?;
    Family::of_architectures(&architectures).ok_or_else(|| {
        let known = Family::all().iter().flat_map(|family| &family.architectures);
        let known: Vec<&str> = known.map(String::as_str).collect();
        config.unsupported("architectures", &format!("are {}", known.join(", ")))
    })
}

impl HyperParams {
    fn read(config: Fields<'_>, family: &Family) -> Result<HyperParams, ModelError> {
        refuse_unsupported(config, family)?;
        let defaults = &family.defaults;
        let latent = LatentParams::read(config, family)?;
        let (num_heads, num_kv_heads, head_dim) = match &latent {
            None => read_heads(config, family)?,
            Some(latent) => (config.required_size("num_attention_heads")?, 1, latent.rope_dim),
        };
        let max_position =
            config.size("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let rope = read_rope(config, family, head_dim, max_position)?;
        let windows = read_windows(config, family)?;
        Ok(HyperParams {
            vocab_size: config.required_size("vocab_size")?,
            hidden_size: config.required_size("hidden_size")?,
            intermediate_size: config.required_size("intermediate_size")?,
            experts: ExpertParams::read(config, family, windows.len())?,
            latent,
            num_prediction_layers: config.count("num_nextn_predict_layers")?.unwrap_or(0),
            num_heads,
            num_kv_heads,
            head_dim,
            max_position: reach(&rope.scaling, max_position),
            norm_eps: config.positive(eps_field(family))?.unwrap_or(defaults.norm_eps) as f32,
            rope,
            windows,
            attention_bias: config.flag(&family.attention_bias_field)?.unwrap_or(false),
            mlp_bias: config.flag("mlp_bias")?.unwrap_or(false),
            activation: read_activation(config, family)?,
            tied: config.flag("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
            logit_softcap: config.positive("final_logit_softcapping")?.map(|cap| cap as f32),
            eos_token_ids: config.token_ids("eos_token_id")?,
            bos_token_id: config.token_ids("bos_token_id")?.first().copied(),
            dtype: read_dtype(config)?,
            stored: quantization::read(config)?,
        })
    }
}

/// Fields that ask for what the family has no description of.
fn refuse_unsupported(config: Fields<'_>, family: &Family) -> Result<(), ModelError> {
    for flag in &family.unsupported_flags {
        if config.flag(flag)? == Some(true) {
            return Err(config.unsupported(flag, "is false"));
        }
    }
    Ok(())
}

/// The field that says what the family's norms add before the root.
fn eps_field(family: &Family) -> &'static str {
    match family.norm {
        NormName::Rms => "rms_norm_eps",
        NormName::Layer => "layer_norm_eps",
    }
}

/// Query heads, key and value heads, width of a head.
fn read_heads(config: Fields<'_>, family: &Family) -> Result<(usize, usize, usize), ModelError> {
    let hidden_size = config.required_size("hidden_size")?;
    let num_heads = config.required_size("num_attention_heads")?;
    let num_kv_heads = config
        .size("num_key_value_heads")?
        .or(family
            .defaults
            .num_key_value_heads
            .filter(|_| !config.is_written("num_key_value_heads")))
        .unwrap_or(num_heads);
    if num_heads % num_kv_heads != 0 {
        let supported = format!("are divisors of num_attention_heads, which is {num_heads}");
        return Err(config.unsupported("num_key_value_heads", &supported));
    }
    let head_dim = match config.size("head_dim")?.or(family.defaults.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            let supported = format!("are multiples of num_attention_heads, which is {num_heads}");
            return Err(config.unsupported("hidden_size", &supported));
        }
    };
    if head_dim % 2 != 0 {
        return Err(config.unsupported("head_dim", "are even widths of a head"));
    }
    Ok((num_heads, num_kv_heads, head_dim))
}

fn read_activation(config: Fields<'_>, family: &Family) -> Result<Activation, ModelError> {
    match config.text("hidden_act")?.unwrap_or(&family.defaults.hidden_act) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        "gelu" => Ok(Activation::Gelu),
        _ => Err(config.unsupported("hidden_act", "are silu, gelu and gelu_pytorch_tanh")),
    }
}

fn read_dtype(config: Fields<'_>) -> Result<DType, ModelError> {
    let field = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    match config.text(field)? {
        None | Some("bfloat16" | "auto") => Ok(DType::BF16),
        Some("float16" | "half") => Ok(DType::F16),
        Some("float32" | "float") => Ok(DType::F32),
        Some(_) => Err(config.unsupported(field, "are bfloat16, float16 and float32")),
    }
}

/// The window of each layer.
fn read_windows(config: Fields<'_>, family: &Family) -> Result<Vec<Option<usize>>, ModelError> {
    let num_layers = config.required_size("num_hidden_layers")?;
    if num_layers > MAX_LAYERS {
        return Err(config.unsupported("num_hidden_layers", "is a whole number from 1 to 4096"));
    }
    let defaults = &family.defaults;
    let default = defaults.sliding_window.filter(|_| !config.is_written("sliding_window"));
    let window = config.size("sliding_window")?.or(default);
    let used = config.flag("use_sliding_window")?.unwrap_or(false);
    match family.sliding_window {
        WindowRule::Never => Ok(vec![None; num_layers]),
        WindowRule::AllLayers => Ok(vec![window; num_layers]),
        WindowRule::AllLayersIfUsed => Ok(vec![window.filter(|_| used); num_layers]),
        WindowRule::UpperLayers => {
            let window = window.filter(|_| used);
            let windowed = windowed_layers(config, family, num_layers)?;
            Ok(windowed.into_iter().map(|has_window| window.filter(|_| has_window)).collect())
        }
    }
}

/// Which layers slide: as `layer_types` says, else those from `max_window_layers` on.
fn windowed_layers(
    config: Fields<'_>,
    family: &Family,
    num_layers: usize,
) -> Result<Vec<bool>, ModelError> {
    let Some(types) = config.texts("layer_types")? else {
        // Zero is a valid first layer, so this is no `size`.
        let written = config.get("max_window_layers").map(|value| {
            let first = value.as_u64().and_then(|n| usize::try_from(n).ok());
            first.ok_or_else(|| config.unsupported("max_window_layers", "is a number of layers"))
        });
        let first =
            written.transpose()?.or(family.defaults.max_window_layers).unwrap_or(num_layers);
        return Ok((0..num_layers).map(|layer| layer >= first).collect());
    };
    let known = |name: &String| name == "full_attention" || name == "sliding_attention";
    if types.len() != num_layers || !types.iter().all(known) {
        let supported =
            format!("are {num_layers} times full_attention or sliding_attention, one per layer");
        return Err(config.unsupported("layer_types", &supported));
    }
    Ok(types.iter().map(|name| name == "sliding_attention").collect())
}

fn read_rope(
    config: Fields<'_>,
    family: &Family,
    head_dim: usize,
    max_position: usize,
) -> Result<RopeSpec, ModelError> {
    let old = config.object("rope_scaling", "rope_scaling.")?;
    let rope = match old {
        Some(rope) => Some(rope),
        None => config.object("rope_parameters", "rope_parameters.")?,
    };
    let own_theta = rope.map(|rope| rope.positive("rope_theta")).transpose()?.flatten();
    let theta = match own_theta {
        Some(theta) => theta,
        None => config.positive("rope_theta")?.unwrap_or(family.defaults.rope_theta),
    };
    let rotary_dim = read_rotary_dim((config, rope), family, head_dim)?;
    let scaling = match rope {
        None => RopeScaling::Default,
        Some(rope) => read_scaling(config, rope, max_position)?,
    };
    let style = match config.flag("rope_interleave")? {
        None => family.rope_style.into(),
        Some(true) => RopeStyle::Interleaved,
        Some(false) => RopeStyle::Halves,
    };
    Ok(RopeSpec { theta, rotary_dim, style, scaling })
}

/// Elements of a head that rotate. The object of rotary parameters has the last word.
fn read_rotary_dim(
    (config, rope): (Fields<'_>, Option<Fields<'_>>),
    family: &Family,
    head_dim: usize,
) -> Result<usize, ModelError> {
    const FIELD: &str = "partial_rotary_factor";
    let mut said = (config, family.defaults.partial_rotary_factor);
    for fields in std::iter::once(config).chain(rope) {
        let Some(written) = fields.positive(FIELD)? else { continue };
        if written != 1.0 && family.defaults.partial_rotary_factor.is_none() {
            return Err(fields.unsupported(FIELD, "is 1"));
        }
        said = (fields, Some(written));
    }
    let (fields, factor) = (said.0, said.1.unwrap_or(1.0));
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if factor > 1.0 || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        let supported = format!("are parts up to 1 that are an even number of {head_dim} elements");
        return Err(fields.unsupported(FIELD, &supported));
    }
    Ok(rotary_dim)
}

fn read_scaling(
    config: Fields<'_>,
    rope: Fields<'_>,
    max_position: usize,
) -> Result<RopeScaling, ModelError> {
    if let Some(name) = rope.first_nested() {
        return Err(rope.unsupported(name, "is one set of rotary parameters for all layers"));
    }
    let field = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    let trained = || -> Result<f64, ModelError> {
        let outer = config.positive("original_max_position_embeddings")?;
        let own = rope.positive("original_max_position_embeddings")?;
        Ok(outer.or(own).unwrap_or(max_position as f64))
    };
    match rope.text(field)? {
        None | Some("default") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: rope.required_positive("factor")? }),
        Some("llama3") => read_llama3(rope, trained()?),
        Some("yarn") => read_yarn(rope, trained()?, max_position),
        Some(_) => Err(rope.unsupported(field, "are default, linear, llama3, yarn")),
    }
}

fn read_llama3(rope: Fields<'_>, original_max_position: f64) -> Result<RopeScaling, ModelError> {
    let low_freq_factor = rope.required_positive("low_freq_factor")?;
    let high_freq_factor = rope.required_positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let supported = format!("are values above low_freq_factor, which is {low_freq_factor}");
        return Err(rope.unsupported("high_freq_factor", &supported));
    }
    Ok(RopeScaling::Llama3 {
        factor: rope.required_positive("factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position,
    })
}

fn read_yarn(
    rope: Fields<'_>,
    original_max_position: f64,
    max_position: usize,
) -> Result<RopeScaling, ModelError> {
    let factor = rope.positive("factor")?.unwrap_or(max_position as f64 / original_max_position);
    let inferred = match (rope.positive("mscale")?, rope.positive("mscale_all_dim")?) {
        (Some(own), Some(all)) => {
            yarn_attention_factor(factor, own) / yarn_attention_factor(factor, all)
        }
        _ => yarn_attention_factor(factor, 1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor: rope.positive("attention_factor")?.unwrap_or(inferred),
        beta_fast: rope.positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: rope.positive("beta_slow")?.unwrap_or(1.0),
        original_max_position,
        truncate: rope.flag("truncate")?.unwrap_or(true),
    })
}

/// The longest context, as vLLM derives it: Llama 3 checkpoints already state the stretched
/// length, linear ones the trained length, and YaRN ones sometimes either.
fn reach(scaling: &RopeScaling, max_position: usize) -> usize {
    let stretched = match *scaling {
        RopeScaling::Default | RopeScaling::Llama3 { .. } => max_position as f64,
        RopeScaling::Linear { factor } => max_position as f64 * factor,
        RopeScaling::Yarn { factor, original_max_position, .. } => {
            (original_max_position * factor).max(max_position as f64)
        }
    };
    stretched.clamp(1.0, MAX_POSITION) as usize
}
