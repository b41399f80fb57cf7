//! The model against other implementations, on small random models of every family.
//!
//! `recorded/` holds what Hugging Face transformers computed (see `record_logits.py`);
//! candle-transformers computes the cases it supports anew. The two referees are compared
//! with each other first, so that a difference points at this program.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]

mod bundled;
mod candle_referee;
mod decoding;
mod loading;
mod on_device;
mod recorded;
#[path = "../support/shim/mod.rs"]
mod shim;
