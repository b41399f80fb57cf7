//! What generation yields: token events from the scheduler, text deltas to the client.
//!
//! Plain data at the seam between `scheduler`, `engine` and `server`.

use std::sync::Arc;

use crate::request::RequestId;

/// The log-probability of one token and the most likely tokens at its place.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct TokenLogprobs {
    /// Natural logarithm, from the raw logits, before penalties and temperature.
    pub logprob: f32,
    /// 1 for the most likely token.
    pub rank: u32,
    /// The most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// One token chosen by the sampler.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    /// The chosen token.
    pub token_id: u32,
    /// Present when the request asked for log-probabilities.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model's own end token.
    EndOfText,
    /// A token of `stop_token_ids`.
    StopToken(u32),
    /// A text of `stop`.
    StopString(String),
    /// `max_tokens` or the context length was reached.
    Length,
    /// The client went away or the server is shutting down.
    Abort,
    /// The engine failed; the text says how.
    Error(Arc<str>),
}

impl FinishReason {
    /// The word used on the wire.
    pub fn as_str(&self) -> &'static str {
        match self {
            FinishReason::EndOfText | FinishReason::StopToken(_) | FinishReason::StopString(_) => {
                "stop"
            }
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
            FinishReason::Error(_) => "error",
        }
    }
}

/// What one step did for one sequence. Sent from the engine thread to the request's stream.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// The request.
    pub request_id: RequestId,
    /// Which of its `n` continuations.
    pub index: u32,
    /// Tokens chosen in this step, in order.
    pub tokens: Vec<SampledToken>,
    /// Set in the event that ends the sequence.
    pub finish: Option<FinishReason>,
    /// Set once, in the first event of continuation 0.
    pub prompt: Option<PromptReport>,
}

/// What was learned about the prompt while computing it.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct PromptReport {
    /// Prompt tokens found in the prefix cache.
    pub num_cached_tokens: u32,
    /// One entry per prompt token when asked for; the first is always `None`.
    pub logprobs: Vec<Option<TokenLogprobs>>,
}

/// One token with its text, for log-probability reports.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenText {
    /// The token.
    pub token_id: u32,
    /// Its text alone; bytes that are not UTF-8 become U+FFFD.
    pub text: String,
    /// Its exact bytes.
    pub bytes: Vec<u8>,
}

/// A token with its log-probability and its alternatives, as text.
#[derive(Clone, Debug, PartialEq)]
pub struct LogprobEntry {
    /// The token.
    pub token: TokenText,
    /// Natural logarithm; `None` for the first prompt token.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first.
    pub top: Vec<(TokenText, f32)>,
}

/// A piece of output for one continuation of a request.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct TextDelta {
    /// Which of the `n` continuations.
    pub index: u32,
    /// New text; never splits a character, may be empty.
    pub text: String,
    /// The tokens behind it.
    pub token_ids: Vec<u32>,
    /// One entry per token when asked for.
    pub logprobs: Vec<LogprobEntry>,
    /// Set in the last delta of a continuation.
    pub finish: Option<FinishReason>,
    /// Set in the first delta of continuation 0.
    pub prompt: Option<PromptText>,
}

/// What is known about the prompt once it was computed.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct PromptText {
    /// Prompt tokens found in the prefix cache.
    pub num_cached_tokens: u32,
    /// One entry per prompt token when asked for.
    pub logprobs: Vec<LogprobEntry>,
}
