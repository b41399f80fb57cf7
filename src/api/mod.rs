//! Wire types and their validation; no axum. Every 400 is born here.
//!
//! A body becomes [`fields::Fields`], those become a request *as sent*
//! ([`chat::ChatCompletionRequest`], [`completions::CompletionRequest`]), and `validate` turns
//! that into a [`crate::request::GenerateRequest`] whose numbers need no re-checking, plus
//! [`options::ReplyOptions`] that say how to answer. The way back is `*_response`: plain
//! structures that serialise to exactly what OpenAI's client libraries read.
//!
//! The types are our own and not those of the `openai-protocol` crate: that crate drops unknown
//! fields silently where we report them, knows another engine's extensions instead of vLLM's,
//! and describes a hundred endpoints that this server does not have. What a client sends is
//! read field by field, so that the shared options of both endpoints are declared once and an
//! error can name the exact place of a wrong value.

pub mod chat;
pub mod chat_response;
pub mod completion_response;
pub mod completions;
pub mod error;
pub mod fields;
pub mod logprobs;
mod messages;
pub mod models;
pub mod options;
pub mod tokenize;
mod tools;
mod unsupported;
pub mod usage;
mod validate;

pub use error::{ApiError, ErrorKind};
pub use validate::ApiLimits;

/// Version string in every response, so that a changed build can be told from a changed model.
pub const SYSTEM_FINGERPRINT: &str = concat!("tokenmill-", env!("CARGO_PKG_VERSION"));

#[cfg(test)]
mod fuzz;
