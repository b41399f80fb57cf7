//! The scheduler, and what is built on it, under workloads that nobody would write by hand.

#[path = "../support/mod.rs"]
mod support;

mod decoded;
mod experts;
mod formats;
mod oracle;
mod replayed;
mod scheduler;
mod served;
#[path = "../support/shim/mod.rs"]
mod shim;
mod simulation;
mod workload;
