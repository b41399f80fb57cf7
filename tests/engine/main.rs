//! The scheduler, and what is built on it, under workloads that nobody would write by hand.

#[path = "../support/mod.rs"]
mod support;

mod decoded;
mod oracle;
mod scheduler;
mod served;
mod simulation;
mod workload;
