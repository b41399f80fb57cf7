//! How many experts a model has and which layers: the part of config.json about them.

use super::error::ModelError;
use super::family::{ExpertLayers, ExpertsFamily, Family, RenormalizeRule, RoutingName};
use super::fields::Fields;
use crate::ops::args::{GroupedRouting, MAX_GROUPS, Routing, Scoring};

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
    /// Width of the MLP that every token has beside, if there is one.
    pub shared_width: Option<usize>,
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
        let experts_per_token = read_experts_per_token(config, family, num_experts)?;
        let intermediate_size = read_width(config, family)?;
        Ok(Some(ExpertParams {
            num_experts,
            experts_per_token,
            intermediate_size,
            routing: read_routing(config, family, num_experts, experts_per_token)?,
            layers: read_layers(config, family, num_layers)?,
            shared_width: read_num_shared(config, family)?.map(|num| num * intermediate_size),
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

/// Experts that every token has; null is none.
fn read_num_shared(
    config: Fields<'_>,
    family: &ExpertsFamily,
) -> Result<Option<usize>, ModelError> {
    const FIELD: &str = "n_shared_experts";
    let default = family.defaults.num_shared_experts;
    if default == 0 {
        return Ok(None);
    }
    let absent = if config.is_written(FIELD) { 0 } else { default };
    let num_shared = config.count(FIELD)?.unwrap_or(absent);
    if num_shared > MAX_EXPERTS {
        return Err(config.unsupported(FIELD, "is a whole number up to 65536"));
    }
    Ok(Some(num_shared).filter(|&num| num > 0))
}

fn read_routing(
    config: Fields<'_>,
    family: &ExpertsFamily,
    num_experts: usize,
    per_token: usize,
) -> Result<Routing, ModelError> {
    const RENORMALIZE: &str = "norm_topk_prob";
    let written = config.flag(RENORMALIZE)?.unwrap_or(false);
    let renormalize = match family.renormalize {
        RenormalizeRule::Always => true,
        RenormalizeRule::Config => written,
        RenormalizeRule::Never if written => {
            return Err(config.unsupported(RENORMALIZE, "is false"));
        }
        RenormalizeRule::Never => false,
    };
    let scoring = match family.routing {
        RoutingName::Softmax => return Ok(Routing::Softmax { renormalize }),
        RoutingName::GroupedSoftmax => Scoring::Softmax,
        RoutingName::GroupedSigmoid => Scoring::Sigmoid,
    };
    let (num_groups, num_chosen_groups) = read_groups(config, scoring, num_experts, per_token)?;
    let scale = config.positive("routed_scaling_factor")?.unwrap_or(1.0) as f32;
    Ok(Routing::Grouped(GroupedRouting {
        scoring,
        num_groups,
        num_chosen_groups,
        renormalize,
        scale,
    }))
}

/// Groups of experts, and those of them that a token can have experts of.
fn read_groups(
    config: Fields<'_>,
    scoring: Scoring,
    num_experts: usize,
    per_token: usize,
) -> Result<(usize, usize), ModelError> {
    let (function, method) = (config.text("scoring_func")?, config.text("topk_method")?);
    let has_groups = match (scoring, function, method) {
        (Scoring::Softmax, None | Some("softmax"), None | Some("greedy")) => false,
        (Scoring::Softmax, None | Some("softmax"), Some("group_limited_greedy")) => true,
        (Scoring::Sigmoid, None | Some("sigmoid"), None | Some("noaux_tc")) => true,
        (Scoring::Softmax, None | Some("softmax"), _) => {
            return Err(config.unsupported("topk_method", "are greedy and group_limited_greedy"));
        }
        (Scoring::Sigmoid, None | Some("sigmoid"), _) => {
            return Err(config.unsupported("topk_method", "is noaux_tc"));
        }
        (Scoring::Softmax, ..) => return Err(config.unsupported("scoring_func", "is softmax")),
        (Scoring::Sigmoid, ..) => return Err(config.unsupported("scoring_func", "is sigmoid")),
    };
    if !has_groups {
        return Ok((1, 1));
    }
    let num_groups = config.size("n_group")?.unwrap_or(1);
    if num_groups > MAX_GROUPS || !num_experts.is_multiple_of(num_groups) {
        let supported =
            format!("are divisors of n_routed_experts, which is {num_experts}, up to {MAX_GROUPS}");
        return Err(config.unsupported("n_group", &supported));
    }
    let chosen = config.size("topk_group")?.unwrap_or(1);
    if chosen > num_groups || chosen * (num_experts / num_groups) < per_token {
        let supported =
            format!("are numbers up to {num_groups} of groups that have {per_token} experts");
        return Err(config.unsupported("topk_group", &supported));
    }
    Ok((num_groups, chosen))
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
        ExpertLayers::Upper => {
            let first = config.count("first_k_dense_replace")?.unwrap_or(0);
            let step = config.size("moe_layer_freq")?.unwrap_or(1);
            let has_experts = |layer: usize| layer >= first && layer.is_multiple_of(step);
            Ok((0..num_layers).map(has_experts).collect())
        }
    }
}
