//! Whether the engine thread still gets anywhere.
//!
//! A kernel that never ends keeps the thread waiting for it, which therefore cannot say so. Who
//! asks for the engine's status looks how long the current step has been running.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::error;

/// When the current step began, and how long one may take.
pub(super) struct StepWatch {
    limit: Duration,
    // Written twice per step, and read by probes.
    running: Mutex<Option<Running>>,
}

/// A step that has not ended.
struct Running {
    since: Instant,
    is_reported: bool,
}

impl StepWatch {
    /// For steps that may take this long.
    pub fn new(limit: Duration) -> StepWatch {
        StepWatch { limit, running: Mutex::new(None) }
    }

    /// A step begins.
    pub fn begin(&self) {
        *self.lock() = Some(Running { since: Instant::now(), is_reported: false });
    }

    /// The step has ended.
    pub fn end(&self) {
        *self.lock() = None;
    }

    /// What to tell those who ask while a step takes too long; logged once per step.
    pub fn overdue(&self) -> Option<Arc<str>> {
        let mut running = self.lock();
        let step = running.as_mut().filter(|step| step.since.elapsed() > self.limit)?;
        let reason = format!(
            "a step has been running for {} s, longer than --step-timeout {}: the device hangs, \
             or is far too slow",
            step.since.elapsed().as_secs(),
            self.limit.as_secs(),
        );
        if !std::mem::replace(&mut step.is_reported, true) {
            error!(%reason, "the engine does not get on");
        }
        Some(reason.into())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_overdue_while_it_runs_for_longer_than_it_may() {
        let watch = StepWatch::new(Duration::ZERO);
        assert_eq!(watch.overdue(), None, "no step runs");
        watch.begin();
        while watch.lock().as_ref().is_some_and(|step| step.since.elapsed().is_zero()) {}
        let reason = watch.overdue().expect("it has run for a while");
        assert!(reason.contains("longer than --step-timeout 0"), "{reason}");
        watch.end();
        assert_eq!(watch.overdue(), None);
        let patient = StepWatch::new(Duration::MAX);
        patient.begin();
        assert_eq!(patient.overdue(), None);
    }
}
