//! The scheduler, and what is built on it, under workloads that nobody would write by hand.

mod oracle;
mod scheduler;
mod simulation;
mod workload;
