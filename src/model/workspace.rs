//! Scratch memory of the forward pass, allocated once for the largest step.

use super::spec::ModelSpec;
use crate::ops::{Ops, OpsError};
use crate::tensor::{DType, Tensor};

/// Activations of one step. Every tensor has room for the largest step; a step uses its first
/// rows.
pub struct Workspace {
    /// `[max_num_tokens, hidden_size]`: the residual stream.
    pub residual: Tensor,
    /// `[max_num_tokens, hidden_size]`: the output of a block.
    pub hidden: Tensor,
    /// As `hidden`: normalised rows, or the output of the next block.
    pub normed: Tensor,
    /// `[max_num_tokens, num_heads * head_dim]`.
    pub q: Tensor,
    /// `[max_num_tokens, num_kv_heads * head_dim]`.
    pub k: Tensor,
    /// As `k`.
    pub v: Tensor,
    /// As `q` or `hidden`, what is wider: queries before their norm, then attention's output, then the
    /// normalised input of an MLP.
    pub attended: Tensor,
    /// As `k`: keys before their norm.
    pub raw_k: Tensor,
    /// What latent attention needs beside, in a model that has it.
    pub latent_rows: Option<LatentRows>,
    /// `[max_num_tokens, intermediate_size]`.
    pub gate: Tensor,
    /// As `gate`.
    pub up: Tensor,
    /// As `gate`: the product of both.
    pub activated: Tensor,
    /// `[max_logit_rows, hidden_size]`: rows whose logits are wanted.
    pub selected: Tensor,
    /// `[max_logit_rows, vocab_size]`.
    pub logits: Tensor,
    /// What layers with experts need beside, in a model that has any.
    pub expert_rows: Option<ExpertRows>,
}

/// Rows of layers with latent attention, in which `q` holds absorbed queries, `k` latents, and
/// `attended` their means.
pub struct LatentRows {
    /// `[max_num_tokens, num_heads * (nope_dim + rope_dim)]` or wider: queries, then heads' outputs.
    pub raw_q: Tensor,
    /// `[max_num_tokens, width of compressed queries]`, twice: before and after their norm.
    pub compressed_q: [Tensor; 2],
}

/// Rows of layers with experts.
pub struct ExpertRows {
    /// `[max_num_tokens, num_experts]`, f32.
    pub router_logits: Tensor,
    /// `[max_num_tokens, experts_per_token]`, u32.
    pub expert_ids: Tensor,
    /// As `expert_ids`, f32.
    pub weights: Tensor,
    /// `[rows, hidden_size]`, as many rows as operations want: the tokens of experts that run
    /// together.
    pub gathered: Tensor,
    /// As `gathered`: what these experts yield.
    pub yielded: Tensor,
}

/// Shapes of the workspace tensors: `[rows, width]`.
struct Shapes {
    token_rows: usize,
    logit_rows: usize,
    hidden: usize,
    q: usize,
    kv: usize,
    /// Widths of [`LatentRows`]; 0 without latent attention.
    raw_q: usize,
    compressed_q: usize,
    intermediate: usize,
    vocab: usize,
    /// Experts, and those of a token, of the layer that has most; 0 without experts.
    experts: usize,
    experts_per_token: usize,
    /// Rows of experts that run together.
    expert_rows: usize,
}

impl Shapes {
    fn new(ops: &dyn Ops, spec: &ModelSpec, token_rows: usize, logit_rows: usize) -> Shapes {
        let widest = |width: fn(&super::spec::LayerSpec) -> usize| {
            spec.layers.iter().map(width).max().unwrap_or(0)
        };
        Shapes {
            token_rows,
            logit_rows,
            hidden: spec.hidden_size,
            q: widest(|l| l.attention.num_heads * l.attention.head_dim),
            kv: widest(|l| l.attention.num_kv_heads * l.attention.head_dim),
            raw_q: widest(|l| {
                let latent = l.attention.latent();
                latent.map_or(0, |latent| latent.q.out_features.max(l.attention.o.in_features))
            }),
            compressed_q: widest(|l| {
                let down = l.attention.latent().and_then(|latent| latent.q_down.as_ref());
                down.map_or(0, |down| down.norm_width)
            }),
            intermediate: widest(|l| l.feed_forward.intermediate_size()),
            vocab: spec.vocab_size,
            experts: spec.num_experts(),
            experts_per_token: spec.experts_per_token(),
            expert_rows: ops.expert_rows(token_rows),
        }
    }

    fn size_bytes(&self, dtype: DType) -> usize {
        let latent = self.raw_q + 2 * self.compressed_q;
        let attention = self.q + self.q.max(self.hidden) + 3 * self.kv + latent;
        let per_token = 3 * self.hidden + attention + 3 * self.intermediate;
        let activations = self.token_rows * per_token + self.logit_rows * self.hidden;
        let logits = self.logit_rows * self.vocab;
        activations * dtype.size_bytes()
            + logits * DType::F32.size_bytes()
            + self.expert_bytes(dtype)
    }

    /// Bytes of [`ExpertRows`].
    fn expert_bytes(&self, dtype: DType) -> usize {
        if self.experts == 0 {
            return 0;
        }
        let choice = DType::U32.size_bytes() + DType::F32.size_bytes();
        let per_token = self.experts * DType::F32.size_bytes() + self.experts_per_token * choice;
        self.token_rows * per_token + self.expert_rows * 2 * self.hidden * dtype.size_bytes()
    }
}

impl ExpertRows {
    fn new(ops: &dyn Ops, s: &Shapes) -> Result<ExpertRows, OpsError> {
        let zeros = |dtype: DType, width: usize| ops.zeros(dtype, [s.token_rows, width].into());
        let activations = ops.activation_dtype();
        Ok(ExpertRows {
            router_logits: zeros(DType::F32, s.experts)?,
            expert_ids: zeros(DType::U32, s.experts_per_token)?,
            weights: zeros(DType::F32, s.experts_per_token)?,
            gathered: ops.zeros(activations, [s.expert_rows, s.hidden].into())?,
            yielded: ops.zeros(activations, [s.expert_rows, s.hidden].into())?,
        })
    }
}

impl Workspace {
    /// Allocates for steps of `max_num_tokens` tokens and `max_logit_rows` rows of logits.
    pub fn new(
        ops: &dyn Ops,
        spec: &ModelSpec,
        max_num_tokens: usize,
        max_logit_rows: usize,
    ) -> Result<Workspace, OpsError> {
        let s = Shapes::new(ops, spec, max_num_tokens, max_logit_rows);
        let dtype = ops.activation_dtype();
        let tokens = |width: usize| ops.zeros(dtype, [s.token_rows, width].into());
        Ok(Workspace {
            residual: tokens(s.hidden)?,
            hidden: tokens(s.hidden)?,
            normed: tokens(s.hidden)?,
            q: tokens(s.q)?,
            k: tokens(s.kv)?,
            v: tokens(s.kv)?,
            attended: tokens(s.q.max(s.hidden))?,
            raw_k: tokens(s.kv)?,
            latent_rows: match s.raw_q {
                0 => None,
                _ => Some(LatentRows {
                    raw_q: tokens(s.raw_q)?,
                    compressed_q: [tokens(s.compressed_q)?, tokens(s.compressed_q)?],
                }),
            },
            gate: tokens(s.intermediate)?,
            up: tokens(s.intermediate)?,
            activated: tokens(s.intermediate)?,
            selected: ops.zeros(dtype, [s.logit_rows, s.hidden].into())?,
            logits: ops.zeros(DType::F32, [s.logit_rows, s.vocab].into())?,
            expert_rows: match s.experts {
                0 => None,
                _ => Some(ExpertRows::new(ops, &s)?),
            },
        })
    }

    /// Bytes that [`Workspace::new`] allocates.
    pub fn size_bytes(
        ops: &dyn Ops,
        spec: &ModelSpec,
        max_num_tokens: usize,
        max_logit_rows: usize,
    ) -> usize {
        let dtype = ops.activation_dtype();
        Shapes::new(ops, spec, max_num_tokens, max_logit_rows).size_bytes(dtype)
    }
}
