//! Block bookkeeping of the paged KV cache: integers only, no memory, no device.

/// Names one block of the KV cache.
pub type BlockId = u32;
