//! Composition root: what one rank of a replica computes with.
//!
//! Everything that differs between devices or between ranks is chosen here once and handed
//! down; nothing below asks which device it runs on.

use std::sync::Arc;

use crate::ops::Ops;
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
    /// A rank with the given operations and no others beside it.
    pub fn solo(ops: Arc<dyn Ops>) -> RankContext {
        RankContext { ops, comm: Arc::new(Solo) }
    }
}
