//! Who goes first: one total order for waiting, running and preemption.
//!
//! Waiting sequences start in this order, running ones get blocks and budget in this order,
//! and the last running one is preempted first. A preempted sequence keeps its place in the
//! order, which puts it before everything that arrived later.

use crate::config::SchedulingPolicy;

/// A sequence's place in the order; the smallest goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Precedence {
    priority: i32,
    arrival: u64,
    index: u32,
}

impl Precedence {
    /// Of continuation `index` of the request that arrived as number `arrival`.
    pub(super) fn new(
        policy: SchedulingPolicy,
        priority: i32,
        arrival: u64,
        index: u32,
    ) -> Precedence {
        let priority = match policy {
            SchedulingPolicy::Fcfs => 0,
            SchedulingPolicy::Priority => priority,
        };
        Precedence { priority, arrival, index }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_priority_policy_looks_at_priorities() {
        let early = |policy| Precedence::new(policy, 5, 0, 0);
        let urgent = |policy| Precedence::new(policy, -1, 1, 0);
        assert!(early(SchedulingPolicy::Fcfs) < urgent(SchedulingPolicy::Fcfs));
        assert!(urgent(SchedulingPolicy::Priority) < early(SchedulingPolicy::Priority));
    }
}
