//! Arguments of the operations of a mixture of experts.

use std::ops::Deref;

use super::Activation;
use crate::formats::PackedMatrix;
use crate::tensor::{DType, Tensor, View, ViewMut};

/// How a router's logits become the weights of the experts that it chooses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Routing {
    /// A softmax over all experts, of which the most probable are chosen.
    Softmax {
        /// Their probabilities are divided by their sum.
        renormalize: bool,
    },
    /// A score per expert, of which the largest are chosen, within the best groups.
    Grouped(GroupedRouting),
}

/// What an expert's score is, and a group's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Its probability; a group's is that of its best expert (DeepSeek-V2, arXiv 2405.04434, section
    /// 2.2.2).
    Softmax,
    /// The sigmoid of its logit; a group's is the sum of those of its two best experts
    /// (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). A bias may be added when experts and groups
    /// are chosen, and not when experts are weighted.
    Sigmoid,
}

/// How DeepSeek routes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupedRouting {
    /// What is compared.
    pub scoring: Scoring,
    /// Groups of as many neighbouring experts each; at most [`MAX_GROUPS`].
    pub num_groups: usize,
    /// Groups whose experts can be chosen: those of the largest scores, of equal ones the lower.
    pub num_chosen_groups: usize,
    /// Scores of chosen experts are divided by their sum.
    pub renormalize: bool,
    /// What weights are multiplied by at last.
    pub scale: f32,
}

/// Groups are the bits of a word.
pub const MAX_GROUPS: usize = 32;

/// Added to a sum of scores before something is divided by it.
pub const LEAST_SCORE_SUM: f32 = 1e-20;

/// See [`crate::ops::Ops::route_experts`].
pub struct RouteExpertsArgs<'a> {
    /// `[num_tokens, experts_per_token]`, u32: the experts with the largest logits or scores, of
    /// equal ones those with the lower ids; in ascending order of their ids.
    pub expert_ids: ViewMut<'a>,
    /// `[num_tokens, experts_per_token]`, f32: what these experts' results are multiplied by.
    pub weights: ViewMut<'a>,
    /// `[num_tokens, num_experts]`, f32.
    pub logits: View<'a>,
    /// `[num_experts]`, f32: what is added to scores when experts are chosen by them.
    pub bias: Option<View<'a>>,
    /// How weights are computed.
    pub routing: Routing,
}

impl GroupedRouting {
    fn check(&self, num_experts: usize, per_token: usize) {
        let GroupedRouting { num_groups, num_chosen_groups, .. } = *self;
        assert!((1..=MAX_GROUPS).contains(&num_groups), "route_experts: groups");
        assert_eq!(num_experts % num_groups, 0, "route_experts: experts of a group");
        assert!((1..=num_groups).contains(&num_chosen_groups), "route_experts: chosen groups");
        let can_be_chosen = num_chosen_groups * (num_experts / num_groups);
        assert!(per_token <= can_be_chosen, "route_experts: experts of chosen groups");
    }
}

impl RouteExpertsArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.expert_ids.shape(), self.weights.shape(), "route_experts: ids and weights");
        assert_eq!(self.expert_ids.dtype(), DType::U32, "route_experts: expert_ids");
        assert_eq!(self.weights.dtype(), DType::F32, "route_experts: weights");
        assert_eq!(self.logits.dtype(), DType::F32, "route_experts: logits");
        assert_eq!(self.expert_ids.size(0), self.logits.size(0), "route_experts: tokens");
        let chosen = 1..=self.logits.size(1);
        assert!(chosen.contains(&self.expert_ids.size(1)), "route_experts: experts per token");
        let num_experts = self.logits.size(1);
        match self.routing {
            Routing::Softmax { .. } => assert!(self.bias.is_none(), "route_experts: a bias"),
            Routing::Grouped(routing) => {
                routing.check(num_experts, self.expert_ids.size(1));
                let takes_bias = routing.scoring == Scoring::Sigmoid;
                assert!(takes_bias || self.bias.is_none(), "route_experts: a bias");
            }
        }
        if let Some(bias) = self.bias {
            assert_eq!(bias.shape().sizes(), &[num_experts], "route_experts: bias");
            assert_eq!(bias.dtype(), DType::F32, "route_experts: bias");
        }
    }
}

/// The matrices of one expert, which is a gated MLP without biases.
#[derive(Debug)]
pub struct Expert {
    /// `[intermediate_size, in_features]`; its product goes through the activation.
    pub gate: PackedMatrix,
    /// As `gate`; its product is multiplied by.
    pub up: PackedMatrix,
    /// `[out_features, intermediate_size]`.
    pub down: PackedMatrix,
}

/// All experts of a layer, of equal shapes; [`crate::ops::Ops::index_experts`] makes them.
#[derive(Debug)]
pub struct Experts {
    experts: Vec<Expert>,
    index: Option<Tensor>,
}

impl Experts {
    /// With what a device needs to find their matrices.
    pub fn with_index(experts: Vec<Expert>, index: Tensor) -> Experts {
        Experts { experts, index: Some(index) }
    }

    /// What the device needs, if it needs anything.
    pub fn index(&self) -> Option<View<'_>> {
        self.index.as_ref().map(Tensor::view)
    }

    /// The experts alone.
    pub fn into_vec(self) -> Vec<Expert> {
        self.experts
    }
}

impl From<Vec<Expert>> for Experts {
    fn from(experts: Vec<Expert>) -> Experts {
        Experts { experts, index: None }
    }
}

impl Deref for Experts {
    type Target = [Expert];

    fn deref(&self) -> &[Expert] {
        &self.experts
    }
}

/// See [`crate::ops::Ops::expert_mlp`].
pub struct ExpertMlpArgs<'a> {
    /// `[num_tokens, out_features]`.
    pub out: ViewMut<'a>,
    /// `[num_tokens, in_features]`.
    pub x: View<'a>,
    /// All experts of the layer.
    pub experts: &'a Experts,
    /// Applied to the gates' products.
    pub activation: Activation,
    /// `[num_tokens, experts_per_token]`, u32; those of a token ascend.
    pub expert_ids: View<'a>,
    /// `[num_tokens, experts_per_token]`, f32.
    pub weights: View<'a>,
    /// Room for at least the tokens of one expert, where [`crate::ops::Ops::expert_rows`] asks for it.
    pub scratch: ExpertScratch<'a>,
}

/// Room for rows of experts: one row of every token at least, since all tokens may have the same
/// expert; more lets experts of few tokens run together. Any content.
pub struct ExpertScratch<'a> {
    /// `[num_rows, in_features]`: activations of the experts' tokens.
    pub gathered: ViewMut<'a>,
    /// Three times `[num_rows, intermediate_size]`: the gated product, and its two factors.
    pub middle: [ViewMut<'a>; 3],
    /// `[num_rows, out_features]`: what the experts yield.
    pub yielded: ViewMut<'a>,
}

impl ExpertMlpArgs<'_> {
    /// Panics unless the shapes agree, and there is room for as many rows.
    pub fn check(&self, needed_rows: usize) {
        let num_tokens = self.x.size(0);
        assert_eq!(self.out.size(0), num_tokens, "expert_mlp: tokens of out");
        assert_eq!(self.expert_ids.size(0), num_tokens, "expert_mlp: tokens of expert_ids");
        assert_eq!(self.expert_ids.shape(), self.weights.shape(), "expert_mlp: ids and weights");
        assert_eq!(self.expert_ids.dtype(), DType::U32, "expert_mlp: expert_ids");
        assert_eq!(self.weights.dtype(), DType::F32, "expert_mlp: weights");
        let ExpertScratch { gathered, middle, yielded } = &self.scratch;
        let (k, out) = (self.x.size(1), self.out.size(1));
        let (num_rows, width) = (gathered.size(0), middle[0].size(1));
        assert!(num_rows >= needed_rows, "expert_mlp: {num_rows} rows for {needed_rows} tokens");
        assert_eq!(gathered.shape().sizes(), &[num_rows, k], "expert_mlp: gathered");
        assert_eq!(yielded.shape().sizes(), &[num_rows, out], "expert_mlp: yielded");
        for middle in middle {
            assert_eq!(middle.shape().sizes(), &[num_rows, width], "expert_mlp: middle");
        }
        for Expert { gate, up, down } in self.experts.iter() {
            for (matrix, shape) in [(gate, [width, k]), (up, [width, k]), (down, [out, width])] {
                assert_eq!([matrix.num_rows, matrix.num_cols], shape, "expert_mlp: matrices");
            }
        }
    }
}
