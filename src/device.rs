//! Composition root: what one rank of a replica computes with.
//!
//! Everything that differs between devices or between ranks is chosen here once and handed
//! down; nothing below asks which device it runs on.

use std::sync::Arc;

use crate::config::CacheConfig;
use crate::ops::Ops;
use crate::ops::cpu::{CpuError, CpuOps};
use crate::parallel::{Communicator, Solo};

/// One rank's operations and its line to the other ranks.
#[derive(Clone)]
pub struct RankContext {
    /// The device's operations.
    pub ops: Arc<dyn Ops>,
    /// The other ranks.
    pub comm: Arc<dyn Communicator>,
}

impl RankContext {
    /// The only rank of a replica on this machine's CPU.
    pub fn cpu(config: &CacheConfig) -> Result<RankContext, CpuError> {
        let ops = CpuOps::new(config.threads, config.cpu_isa)?;
        Ok(RankContext { ops: Arc::new(ops), comm: Arc::new(Solo) })
    }

    /// A rank with the given operations and no others beside it.
    pub fn solo(ops: Arc<dyn Ops>) -> RankContext {
        RankContext { ops, comm: Arc::new(Solo) }
    }
}
