//! Arguments of choosing and scoring tokens.

use crate::formats::PackedMatrix;
use crate::request::{SamplingParams, SeenToken};
use crate::tensor::{DType, View, ViewMut};

/// Which tokens a grammar allows, a bit each: token `t` is bit `t % 32` of word `t / 32`, set where
/// it is allowed, as llguidance and XGrammar write them.
///
/// Tokens beyond the last word are not allowed, and words beyond the vocabulary are unread: a
/// tokenizer may know fewer tokens than a model has logits for.
#[derive(Clone, Copy, Debug)]
pub struct TokenBitmask<'a>(&'a [u32]);

impl<'a> TokenBitmask<'a> {
    /// Tokens whose bits are set.
    pub fn new(words: &'a [u32]) -> TokenBitmask<'a> {
        TokenBitmask(words)
    }

    /// True where the token's bit is set.
    pub fn allows(self, token_id: u32) -> bool {
        self.0.get(token_id as usize / 32).is_some_and(|word| word >> (token_id % 32) & 1 == 1)
    }

    /// As many words as `vocab_size` tokens have bits for, without bits of tokens beyond it.
    pub fn words(self, vocab_size: usize) -> impl Iterator<Item = u32> {
        let within = move |i: usize| match vocab_size - 32 * i {
            0..32 => (1 << (vocab_size % 32)) - 1,
            _ => u32::MAX,
        };
        (0..vocab_size.div_ceil(32)).map(move |i| self.0.get(i).map_or(0, |word| word & within(i)))
    }
}

/// What to do with one row of logits.
pub enum RowTask {
    /// Choose a token.
    Sample,
    /// Report the log-probability of this token without choosing (prompt log-probabilities).
    Score {
        /// The token to report.
        token_id: u32,
    },
}

/// One row of a [`SampleArgs`].
///
/// **Choosing.** In this order: bitmask, allowed and banned tokens; bias; penalties; temperature;
/// min-p, top-k and top-p of what is left. A token that is not allowed has probability 0 before
/// any of these is computed.
///
/// **Where nothing may be chosen**, because all of it is banned or has a logit of -∞, the token
/// with the largest raw logit is chosen among those that the bitmask allows, of equal ones the
/// first: a grammar gives way last. A bitmask without a set bit gives way too, and whoever made
/// it is told of a token that it does not allow.
///
/// **Log-probabilities** are those of the raw logits, of allowed and other tokens alike, as
/// vLLM's are by default (`--logprobs-mode raw_logprobs`).
pub struct SampleRow<'a> {
    /// Choose or score.
    pub task: RowTask,
    /// How to choose. For `Score` rows `prompt_logprobs` says how many alternatives to report.
    pub params: &'a SamplingParams,
    /// Seed of this continuation.
    pub seed: u64,
    /// Position of the token to choose; with the seed it determines the random number.
    pub position: u32,
    /// Tokens of prompt and output, each once, when a penalty needs them; else empty.
    pub seen: &'a [SeenToken],
    /// Tokens that must not be chosen here (end tokens before `min_tokens`).
    pub banned_token_ids: &'a [u32],
    /// Tokens that may be chosen here, where a grammar decides.
    pub bitmask: Option<TokenBitmask<'a>>,
}

impl SampleRow<'_> {
    /// Whether something may change logits before a token is chosen: a mask, a bias or a penalty.
    pub fn edits_logits(&self) -> bool {
        let params = self.params;
        self.bitmask.is_some()
            || params.allowed_token_ids.is_some()
            || !params.logit_bias.is_empty()
            || !self.banned_token_ids.is_empty()
            || params.needs_history()
    }

    /// Whether the token is that with the largest raw logit, and nothing else is asked of logits.
    pub fn is_plain_greedy(&self) -> bool {
        let SampleRow { task, params, .. } = self;
        let is_greedy = params.temperature == 0.0 && params.logprobs.is_none();
        matches!(task, RowTask::Sample) && is_greedy && !self.edits_logits()
    }
}

/// See [`crate::ops::Ops::greedy`].
pub struct GreedyArgs<'a> {
    /// `[num_rows, in_features]`.
    pub x: View<'a>,
    /// `[vocab_size, in_features]` in any format.
    pub weight: &'a PackedMatrix,
    /// `[vocab_size]`, any float dtype.
    pub bias: Option<View<'a>>,
}

impl GreedyArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.x.size(1), self.weight.num_cols, "greedy: in features");
        if let Some(bias) = &self.bias {
            assert_eq!(bias.shape().sizes(), &[self.weight.num_rows], "greedy: bias");
        }
    }
}

/// See [`crate::ops::Ops::soft_cap`].
pub struct SoftCapArgs<'a> {
    /// Any shape, f32, updated in place.
    pub x: ViewMut<'a>,
    /// Above 0; no result is larger.
    pub cap: f32,
}

impl SoftCapArgs<'_> {
    /// Panics unless there is something to cap by.
    pub fn check(&self) {
        assert_eq!(self.x.dtype(), DType::F32, "soft_cap: x");
        assert!(self.cap > 0.0, "soft_cap: cap");
    }
}

/// See [`crate::ops::Ops::sample`]. Logits are scratch: a backend may overwrite them.
pub struct SampleArgs<'a> {
    /// `[num_rows, vocab_size]`, f32.
    pub logits: ViewMut<'a>,
    /// One per row of `logits`.
    pub rows: &'a [SampleRow<'a>],
}

impl SampleArgs<'_> {
    /// Panics unless the shapes agree.
    pub fn check(&self) {
        assert_eq!(self.logits.size(0), self.rows.len(), "sample: rows");
        assert_eq!(self.logits.dtype(), DType::F32, "sample: logits");
    }
}
