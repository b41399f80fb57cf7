//! Reading a model from wherever it is: files, the hub, config.json.

#![allow(
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    reason = "a test fails by panicking, with the place"
)]

mod config;
mod experts;
mod files;
mod hub;
mod hub_server;
mod latent;
mod layer_norm;
mod mxfp4;
mod published;
#[cfg(target_os = "linux")]
mod resident;
mod safetensors;
