//! How many experts a model has and which layers: the part of config.json about them.

use super::error::ModelError;
use super::family::{ExpertLayers, ExpertsFamily, Family, RenormalizeRule, RoutingName};
use super::fields::Fields;
use crate::ops::args::Routing;

/// More experts than any layer has; above it the file is nonsense.
const MAX_EXPERTS: usize = 1 << 16;

/// The sizes of a model's mixtures of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertParams {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that compute a token; at least one, at most all.
    pub experts_per_token: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// How experts are chosen and weighted.
    pub routing: Routing,
    /// Whether each layer has experts.
    pub layers: Vec<bool>,
}

impl ExpertParams {
    /// Reads them, in a family that has experts.
    pub(super) fn read(
        config: Fields<'_>,
        family: &Family,
        num_layers: usize,
    ) -> Result<Option<ExpertParams>, ModelError> {
        let Some(family) = &family.experts else { return Ok(None) };
        let num_experts = read_num_experts(config, family)?;
        Ok(Some(ExpertParams {
            num_experts,
            experts_per_token: read_experts_per_token(config, family, num_experts)?,
            intermediate_size: read_width(config, family)?,
            routing: read_routing(config, family)?,
            layers: read_layers(config, family, num_layers)?,
        }))
    }
}

fn read_num_experts(config: Fields<'_>, family: &ExpertsFamily) -> Result<usize, ModelError> {
    for field in &family.num_experts_fields {
        match config.size(field)? {
            Some(num_experts) if num_experts > MAX_EXPERTS => {
                return Err(config.unsupported(field, "is a whole number from 1 to 65536"));
            }
            Some(num_experts) => return Ok(num_experts),
            None => {}
        }
    }
    Ok(family.defaults.num_experts)
}

fn read_experts_per_token(
    config: Fields<'_>,
    family: &ExpertsFamily,
    num_experts: usize,
) -> Result<usize, ModelError> {
    const FIELD: &str = "num_experts_per_tok";
    let per_token = config.size(FIELD)?.unwrap_or(family.defaults.num_experts_per_tok);
    if per_token > num_experts {
        let supported = format!("are numbers up to that of the experts, which is {num_experts}");
        return Err(config.unsupported(FIELD, &supported));
    }
    Ok(per_token)
}

fn read_width(config: Fields<'_>, family: &ExpertsFamily) -> Result<usize, ModelError> {
    let field = &family.intermediate_size_field;
    let width = config.size(field)?.or(family.defaults.intermediate_size);
    width.ok_or_else(|| config.missing(field))
}

fn read_routing(config: Fields<'_>, family: &ExpertsFamily) -> Result<Routing, ModelError> {
    let renormalize = match family.renormalize {
        RenormalizeRule::Always => true,
        RenormalizeRule::Config => config.flag("norm_topk_prob")?.unwrap_or(false),
    };
    match family.routing {
        RoutingName::Softmax => Ok(Routing::Softmax { renormalize }),
    }
}

fn read_layers(
    config: Fields<'_>,
    family: &ExpertsFamily,
    num_layers: usize,
) -> Result<Vec<bool>, ModelError> {
    match family.layers {
        ExpertLayers::All => Ok(vec![true; num_layers]),
        ExpertLayers::Stepped => {
            let step = config.size("decoder_sparse_step")?.unwrap_or(1);
            let dense = config.numbers("mlp_only_layers")?;
            let has_experts =
                |layer: usize| (layer + 1).is_multiple_of(step) && !dense.contains(&layer);
            Ok((0..num_layers).map(has_experts).collect())
        }
    }
}
