//! Requests in, text deltas out; one thread steps the scheduler and the runner.
