//! Executes planned steps: the seam between bookkeeping and compute.
//!
//! [`StepRunner`] is the whole contract. [`ModelRunner`] computes; [`ScriptedRunner`] keeps it with no model at all, so
//! that engine and server tests need none. Knows nothing of requests, text or HTTP.

pub mod memory_plan;
pub mod model_runner;
pub mod recorded;
pub mod scripted;

use crate::scheduler::batch::{ScheduledBatch, StepTokens};

pub use memory_plan::{MemoryDemand, MemoryPlan, MemoryPlanError};
pub use model_runner::ModelRunner;
pub use scripted::ScriptedRunner;

/// A step could not be computed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RunnerError {
    /// The device or a kernel failed; the engine cannot go on.
    #[error("step {step} failed: {reason}")]
    StepFailed {
        /// Which step.
        step: u64,
        /// The device's own words.
        reason: String,
    },
}

/// Computes one step at a time.
pub trait StepRunner: Send {
    /// Computes the batch and returns one entry per scheduled sequence, in order.
    fn execute(&mut self, batch: &ScheduledBatch) -> Result<Vec<StepTokens>, RunnerError>;

    /// Whether a device computes while the host goes on.
    fn has_device(&self) -> bool {
        false
    }

    /// As [`StepRunner::execute`]. A runner with a device calls `meanwhile` once, while that
    /// computes; others never do.
    fn execute_beside(
        &mut self,
        batch: &ScheduledBatch,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<StepTokens>, RunnerError> {
        let _ = meanwhile;
        self.execute(batch)
    }
}
