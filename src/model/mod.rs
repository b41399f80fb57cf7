//! One decoder, many descriptions.

pub mod check;
pub mod error;
pub mod family;
mod fields;
pub mod hparams;
pub mod rope;
pub mod spec;
