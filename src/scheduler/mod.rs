//! Continuous batching at token granularity: pure, synchronous, no clock, no device.

pub mod batch;
