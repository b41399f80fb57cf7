//! How wide latent attention is: the part of config.json about it.

use super::error::ModelError;
use super::family::Family;
use super::fields::Fields;
use super::rope::yarn_attention_factor;

/// The sizes of a model's latent attention.
#[derive(Clone, Debug, PartialEq)]
pub struct LatentParams {
    /// Width of compressed queries; `None` where queries are projected at once.
    pub q_rank: Option<usize>,
    /// Elements of a latent.
    pub rank: usize,
    /// Elements of a head's query and key that do not rotate.
    pub nope_dim: usize,
    /// Elements that rotate; even.
    pub rope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Multiplies q·k.
    pub scale: f32,
}

impl LatentParams {
    /// Reads them, in a family whose attention is latent.
    pub(super) fn read(
        config: Fields<'_>,
        family: &Family,
    ) -> Result<Option<LatentParams>, ModelError> {
        if family.latent.is_none() {
            return Ok(None);
        }
        let (nope_dim, rope_dim) =
            (config.required_size("qk_nope_head_dim")?, config.required_size("qk_rope_head_dim")?);
        if rope_dim % 2 != 0 {
            return Err(config.unsupported("qk_rope_head_dim", "are even numbers"));
        }
        let heat = heat(config)?;
        Ok(Some(LatentParams {
            q_rank: config.size("q_lora_rank")?,
            rank: config.required_size("kv_lora_rank")?,
            nope_dim,
            rope_dim,
            value_dim: config.required_size("v_head_dim")?,
            scale: (heat * heat / ((nope_dim + rope_dim) as f64).sqrt()) as f32,
        }))
    }
}

/// What YaRN multiplies queries and keys by as a whole, and not by way of cosines and sines:
/// `mscale_all_dim` is the weight of its logarithm.
fn heat(config: Fields<'_>) -> Result<f64, ModelError> {
    let old = config.object("rope_scaling", "rope_scaling.")?;
    let rope = match old {
        Some(rope) => Some(rope),
        None => config.object("rope_parameters", "rope_parameters.")?,
    };
    let Some(rope) = rope else { return Ok(1.0) };
    let field = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    let is_default = matches!(rope.text(field)?, None | Some("default"));
    // 0 is written too, and means as much as nothing.
    let weight = match rope.get("mscale_all_dim").and_then(serde_json::Value::as_f64) {
        Some(0.0) => None,
        _ => rope.positive("mscale_all_dim")?,
    };
    match weight {
        Some(weight) if !is_default => {
            Ok(yarn_attention_factor(rope.required_positive("factor")?, weight))
        }
        _ => Ok(1.0),
    }
}
