//! Arguments of the operations of a mixture of experts.

use super::Activation;
use crate::formats::PackedMatrix;
use crate::tensor::{DType, View, ViewMut};

/// How a router's logits become the weights of the experts that it chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Routing {
    /// A softmax over all experts, of which the most probable are chosen.
    Softmax {
        /// Their probabilities are divided by their sum.
        renormalize: bool,
    },
}

/// See [`crate::ops::Ops::route_experts`].
pub struct RouteExpertsArgs<'a> {
    /// `[num_tokens, experts_per_token]`, u32: the experts with the largest logits, of equal ones
    /// those with the lower ids; in ascending order of their ids.
    pub expert_ids: ViewMut<'a>,
    /// `[num_tokens, experts_per_token]`, f32: what these experts' results are multiplied by.
    pub weights: ViewMut<'a>,
    /// `[num_tokens, num_experts]`, f32.
    pub logits: View<'a>,
    /// How weights are computed.
    pub routing: Routing,
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

/// See [`crate::ops::Ops::expert_mlp`].
pub struct ExpertMlpArgs<'a> {
    /// `[num_tokens, out_features]`.
    pub out: ViewMut<'a>,
    /// `[num_tokens, in_features]`.
    pub x: View<'a>,
    /// All experts of the layer, of equal shapes.
    pub experts: &'a [Expert],
    /// Applied to the gates' products.
    pub activation: Activation,
    /// `[num_tokens, experts_per_token]`, u32; those of a token ascend.
    pub expert_ids: View<'a>,
    /// `[num_tokens, experts_per_token]`, f32.
    pub weights: View<'a>,
    /// Room for at least the tokens of one expert.
    pub scratch: ExpertScratch<'a>,
}

/// Room for rows of experts: for one row of every token at least, since all tokens may have the
/// same expert; more lets experts of few tokens run together. Any content.
pub struct ExpertScratch<'a> {
    /// `[num_rows, in_features]`: activations of the experts' tokens.
    pub gathered: ViewMut<'a>,
    /// Three times `[num_rows, intermediate_size]`: the gated product, and its two factors.
    pub middle: [ViewMut<'a>; 3],
    /// `[num_rows, out_features]`: what the experts yield.
    pub yielded: ViewMut<'a>,
}

impl ExpertMlpArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        let num_tokens = self.x.size(0);
        assert_eq!(self.out.size(0), num_tokens, "expert_mlp: tokens of out");
        assert_eq!(self.expert_ids.size(0), num_tokens, "expert_mlp: tokens of expert_ids");
        assert_eq!(self.expert_ids.shape(), self.weights.shape(), "expert_mlp: ids and weights");
        assert_eq!(self.expert_ids.dtype(), DType::U32, "expert_mlp: expert_ids");
        assert_eq!(self.weights.dtype(), DType::F32, "expert_mlp: weights");
        let ExpertScratch { gathered, middle, yielded } = &self.scratch;
        let (k, out) = (self.x.size(1), self.out.size(1));
        let (num_rows, width) = (gathered.size(0), middle[0].size(1));
        assert!(num_rows >= num_tokens, "expert_mlp: {num_rows} rows for {num_tokens} tokens");
        assert_eq!(gathered.shape().sizes(), &[num_rows, k], "expert_mlp: gathered");
        assert_eq!(yielded.shape().sizes(), &[num_rows, out], "expert_mlp: yielded");
        for middle in middle {
            assert_eq!(middle.shape().sizes(), &[num_rows, width], "expert_mlp: middle");
        }
        for Expert { gate, up, down } in self.experts {
            for (matrix, shape) in [(gate, [width, k]), (up, [width, k]), (down, [out, width])] {
                assert_eq!([matrix.num_rows, matrix.num_cols], shape, "expert_mlp: matrices");
            }
        }
    }
}
