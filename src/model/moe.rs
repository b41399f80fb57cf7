//! The mixture-of-experts block: a router chooses some of many MLPs for each token, whose results
//! are weighted and added up.

use super::attention::load_linear;
use super::error::ModelError;
use super::mlp::Mlp;
use super::norm::BlockNorm;
use super::spec::{MlpSpec, MoeSpec};
use super::workspace::{ExpertRows, Workspace};
use crate::device::RankContext;
use crate::ops::args::{
    Activation, AddArgs, Expert, ExpertMlpArgs, ExpertScratch, Experts, RouteExpertsArgs, Routing,
};
use crate::tensor::Tensor;
use crate::weights::Loader;
use crate::weights::linear::{Linear, Partition};

/// One layer's router and experts.
pub struct Moe {
    router: Linear,
    /// Added to scores when experts are chosen.
    bias: Option<Tensor>,
    /// What every token has beside.
    shared: Option<Mlp>,
    experts: Experts,
    routing: Routing,
    experts_per_token: usize,
    activation: Activation,
    intermediate_size: usize,
}

impl Moe {
    /// Loads the weights that `spec` names.
    pub fn load(spec: &MoeSpec, loader: &Loader<'_>) -> Result<Moe, ModelError> {
        let router = &spec.router;
        let MlpSpec { activation, intermediate_size, .. } = spec.experts[0];
        let shape = [router.out_features, router.in_features];
        Ok(Moe {
            router: Linear::router(loader, &router.name, shape)?,
            bias: match &spec.bias {
                None => None,
                Some(name) => Some(loader.wide_floats(name, &[router.out_features])?),
            },
            shared: match &spec.shared {
                None => None,
                Some(shared) => Some(Mlp::load(shared, loader)?),
            },
            experts: load_experts(&spec.experts, loader)?,
            routing: spec.routing,
            experts_per_token: spec.experts_per_token,
            activation,
            intermediate_size,
        })
    }

    /// Replaces `workspace.hidden`, the output of the block before, by that of chosen experts, and
    /// adds that of what every token has to the residual stream. The norm runs by itself, because
    /// the router and experts read rows of what it yields.
    pub fn forward(
        &self,
        rank: &RankContext,
        norm: BlockNorm<'_>,
        num_tokens: usize,
        workspace: &mut Workspace,
    ) {
        norm.run(rank, num_tokens, workspace);
        if let Some(shared) = &self.shared {
            shared.compute(rank, num_tokens, workspace);
            rank.ops.add(AddArgs {
                out: workspace.residual.rows_mut(num_tokens),
                x: workspace.normed.rows(num_tokens),
            });
        }
        let Workspace { hidden, normed, gate, up, activated, expert_rows, .. } = workspace;
        let rows = expert_rows.as_mut().expect("a workspace of a model with experts has rows");
        let ExpertRows { router_logits, expert_ids, weights, gathered, yielded } = rows;
        let x = hidden.rows(num_tokens);
        let mut logits = router_logits.front_mut([num_tokens, self.experts.len()]);
        self.router.forward(&*rank.ops, &*rank.comm, x, logits.reborrow());
        let choices = [num_tokens, self.experts_per_token];
        let mut expert_ids = expert_ids.front_mut(choices);
        let mut weights = weights.front_mut(choices);
        rank.ops.route_experts(RouteExpertsArgs {
            expert_ids: expert_ids.reborrow(),
            weights: weights.reborrow(),
            logits: logits.as_view(),
            bias: self.bias.as_ref().map(Tensor::view),
            routing: self.routing,
        });
        let room = [gathered.shape().sizes()[0], self.intermediate_size];
        rank.ops.expert_mlp(ExpertMlpArgs {
            out: normed.rows_mut(num_tokens),
            x,
            experts: &self.experts,
            activation: self.activation,
            expert_ids: expert_ids.as_view(),
            weights: weights.as_view(),
            scratch: ExpertScratch {
                gathered: gathered.view_mut(),
                middle: [activated, gate, up].map(|middle| middle.front_mut(room)),
                yielded: yielded.view_mut(),
            },
        });
        // Ranks share experts like any MLP: each sums over a part of every expert's width.
        rank.comm.all_reduce(normed.rows_mut(num_tokens));
        std::mem::swap(hidden, normed);
    }
}

fn load_experts(specs: &[MlpSpec], loader: &Loader<'_>) -> Result<Experts, ModelError> {
    let experts = specs.iter().map(|spec| load_expert(spec, loader));
    Ok(loader.experts(experts.collect::<Result<_, _>>()?)?)
}

fn load_expert(spec: &MlpSpec, loader: &Loader<'_>) -> Result<Expert, ModelError> {
    Ok(Expert {
        gate: load_linear(&spec.gate, Partition::Column, loader)?.weight,
        up: load_linear(&spec.up, Partition::Column, loader)?.weight,
        down: load_linear(&spec.down, Partition::Row, loader)?.weight,
    })
}
