//! Requests in, text deltas out.
//!
//! [`Engine`] is the handle that servers and terminals hold. Behind it one thread owns the
//! scheduler and the runner by value and steps them (`step`); tokio ends here. Each request
//! is an `intake` on the way in; on the way out, what a step yielded is brought by the courier of
//! `delivery` to each request's `stream`. Knows nothing of HTTP.

mod delivery;
mod handle;
mod intake;
mod step;
mod stream;
mod watch;

pub use handle::{Engine, EngineOptions, EngineStatus, ModelInfo};
pub use stream::Generation;

use std::sync::Arc;

use crate::text::TextError;

/// Why a request was not accepted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum EngineError {
    /// As many requests wait as may wait.
    #[error("{limit} requests are already waiting; try again shortly")]
    QueueFull {
        /// `--max-num-queued-requests`.
        limit: usize,
    },
    /// No room for a single new token after the prompt.
    #[error(
        "the prompt has {prompt_tokens} tokens, but this model's context holds {max_model_len} \
         tokens of prompt and output together; shorten the prompt"
    )]
    PromptTooLong {
        /// Length of the prompt.
        prompt_tokens: usize,
        /// `--max-model-len`.
        max_model_len: usize,
    },
    /// Prompt and requested output do not fit together.
    #[error(
        "the prompt has {prompt_tokens} tokens and max_tokens is {max_tokens}, but this model's \
         context holds {max_model_len} tokens; lower max_tokens to at most {}",
        max_model_len - prompt_tokens
    )]
    OutputTooLong {
        /// Length of the prompt.
        prompt_tokens: usize,
        /// What was asked for.
        max_tokens: u32,
        /// `--max-model-len`.
        max_model_len: usize,
    },
    /// Nothing to continue.
    #[error("the prompt is empty; send at least one token")]
    EmptyPrompt,
    /// A token id that the model does not have.
    #[error("prompt token id {token_id} is out of range; the vocabulary has {vocab_size} tokens")]
    TokenOutOfRange {
        /// The id.
        token_id: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// The text could not be turned into tokens.
    #[error(transparent)]
    Text(#[from] Arc<TextError>),
    /// The server is shutting down.
    #[error("the server is shutting down and takes no new requests")]
    Draining,
    /// The engine failed earlier and cannot go on.
    #[error("the engine has stopped: {0}")]
    Dead(Arc<str>),
}
