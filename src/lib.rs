//! tokenmill serves large language models over the OpenAI API.
//!
//! The folders are the stages of a request. From the outside in:
//!
//! | stage | module | what it turns into what |
//! |---|---|---|
//! | HTTP | [`server`], [`api`] | JSON → [`request::GenerateRequest`], [`output::TextDelta`] → SSE |
//! | text | [`text`] | messages → prompt → token ids → text again |
//! | engine | [`engine`] | requests → steps → token events, on one thread |
//! | bookkeeping | [`scheduler`], [`kv`] | sequences → [`scheduler::batch::ScheduledBatch`] |
//! | compute | [`runner`], [`model`], [`ops`] | batch → logits → tokens |
//! | weights | [`checkpoint`], [`weights`], [`formats`] | files → packed matrices |
//!
//! Who may import whom is listed in ARCHITECTURE.md and checked by `tests/architecture.rs`.

pub mod api;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod device;
pub mod engine;
pub mod formats;
pub mod kv;
pub mod model;
pub mod ops;
pub mod output;
pub mod parallel;
pub mod request;
pub mod runner;
pub mod scheduler;
pub mod server;
pub mod telemetry;
pub mod tensor;
pub mod text;
pub mod weights;
