//! One decoder, many descriptions.
//!
//! A family (`models/families/*.toml`) says what kind of model a checkpoint holds, its
//! `config.json` how big it is; together they make a [`spec::ModelSpec`] with nothing
//! optional left, and [`decoder::Decoder`] computes any of them. Knows nothing of requests,
//! scheduling or sampling.

pub mod attention;
pub mod attention_spec;
pub mod batch;
pub mod check;
pub mod decoder;
pub mod embedding;
pub mod error;
pub mod expert_params;
pub mod family;
mod fields;
pub mod hparams;
pub mod kv_cache;
pub mod latent_attention;
pub mod latent_params;
pub mod mlp;
pub mod moe;
pub mod norm;
mod quantization;
pub mod rope;
pub mod spec;
pub mod workspace;
