//! `quantization_config` in config.json: what is understood, and what is refused before a byte of
//! the weights is read.
//!
//! Which layers are quantized is not read here (`targets`, `ignore`, `modules_to_not_convert`): the
//! names of a checkpoint's tensors say so. Neither is how activations would be quantized: that is
//! the compute format's affair, see ARCHITECTURE.md.

use serde_json::Value;

use super::error::ModelError;
use super::fields::Fields;
use crate::formats::mxfp4::GROUP;
use crate::weights::mxfp4::Layout;

/// The field.
const CONFIG: &str = "quantization_config";
/// The one format of compressed-tensors that is read.
const PACKED: &str = "mxfp4-pack-quantized";

/// How the checkpoint says that its matrices are stored; `None` for floats.
pub(super) fn read(config: Fields<'_>) -> Result<Option<Layout>, ModelError> {
    let prefix = format!("{CONFIG}.");
    let Some(fields) = config.object(CONFIG, &prefix)? else { return Ok(None) };
    match fields.text("quant_method")? {
        Some("compressed-tensors") => read_compressed(fields).map(|()| Some(Layout::Packed)),
        Some("mxfp4") => {
            fields.texts("modules_to_not_convert")?;
            Ok(Some(Layout::Blocks))
        }
        _ => Err(fields.unsupported(
            "quant_method",
            "are mxfp4, compressed-tensors in the format mxfp4-pack-quantized, and checkpoints \
             without quantization_config (bf16, f16 or f32 weights)",
        )),
    }
}

/// What the compressed-tensors library writes.
fn read_compressed(fields: Fields<'_>) -> Result<(), ModelError> {
    only(fields, "format", &[PACKED.into(), Value::Null])?;
    only(fields, "quantization_status", &["compressed".into(), Value::Null])?;
    only(fields, "kv_cache_scheme", &[Value::Null])?;
    // Rotations of activations that weights expect.
    only(fields, "transform_config", &[serde_json::json!({}), Value::Null])?;
    let groups = format!("{CONFIG}.config_groups");
    let prefix = format!("{groups}.");
    let config_groups =
        fields.object("config_groups", &prefix)?.ok_or_else(|| fields.missing("config_groups"))?;
    if config_groups.names().next().is_none() {
        return Err(fields.unsupported("config_groups", "is an object with a group"));
    }
    for name in config_groups.names() {
        let prefix = format!("{groups}.{name}.");
        let group = config_groups
            .object(name, &prefix)?
            .ok_or_else(|| config_groups.unsupported(name, "is an object"))?;
        // One of the two places must say it.
        let formats = [PACKED.into(), Value::Null];
        let is_said = fields.get("format").is_some();
        only(group, "format", if is_said { &formats } else { &formats[..1] })?;
        only(group, "output_activations", &[Value::Null])?;
        read_weights(group, &format!("{prefix}weights."))?;
        let prefix = format!("{prefix}input_activations.");
        if let Some(activations) = group.object("input_activations", &prefix)? {
            only(activations, "dynamic", &[true.into()])?;
        }
    }
    Ok(())
}

/// What one of its groups says of weights.
fn read_weights(group: Fields<'_>, prefix: &str) -> Result<(), ModelError> {
    let weights = group.object("weights", prefix)?.ok_or_else(|| group.missing("weights"))?;
    only(weights, "num_bits", &[4.into()])?;
    only(weights, "type", &["float".into()])?;
    only(weights, "group_size", &[GROUP.into()])?;
    only(weights, "symmetric", &[true.into(), Value::Null])?;
    only(weights, "strategy", &["group".into(), Value::Null])?;
    only(weights, "dynamic", &[false.into(), Value::Null])?;
    only(weights, "actorder", &[Value::Null])?;
    let bytes = ["torch.uint8", "torch.float8_e8m0fnu"].map(Value::from);
    only(weights, "scale_dtype", &[&bytes[..], &[Value::Null]].concat())
}

/// Passes when the field has one of these values; `null` stands for a field that is left out too.
fn only(fields: Fields<'_>, name: &str, values: &[Value]) -> Result<(), ModelError> {
    let value = fields.get(name).unwrap_or(&Value::Null);
    if values.contains(value) {
        return Ok(());
    }
    let texts: Vec<String> = values.iter().map(Value::to_string).collect();
    let verb = if texts.len() == 1 { "is" } else { "are" };
    Err(fields.unsupported(name, &format!("{verb} {}", texts.join(" and "))))
}
