//! HTTP only: routes, limits, handlers, events.
//!
//! A handler reads a body ([`limits`]), lets `api` parse and validate it, submits the result
//! to the engine and turns the deltas that come back into one answer (`*_collect`) or a stream
//! of events (`*_stream`, [`sse`]). Knows nothing of tokens, schedulers or devices. Dropping a
//! connection drops the handler, which drops the engine's `Generation`, which ends the request.

mod auth;
mod chat;
mod chat_collect;
mod chat_stream;
mod completion_collect;
mod completion_stream;
mod completions;
mod error;
mod limits;
mod models;
mod observe;
mod outputs;
mod router;
mod shutdown;
mod sse;
mod state;
mod status;
mod tokenize;
mod tool_calls;

pub use router::router;
pub use shutdown::{serve, termination_signal};
