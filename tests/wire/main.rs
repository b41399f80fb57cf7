//! The HTTP interface, byte for byte: transcripts over real sockets with a scripted model.

mod chat;
mod completions;
mod errors;
mod lifecycle;
mod status;
mod support;
