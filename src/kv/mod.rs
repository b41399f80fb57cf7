//! Block bookkeeping of the paged KV cache: integers only, no memory, no device.
//!
//! [`BlockAllocator`] knows which blocks are free and how often each is referenced,
//! [`PrefixCache`] knows what full blocks hold, and [`BlockPool`] puts the two together for
//! the scheduler. Knows nothing of sequences, requests or steps.

pub mod allocator;
pub mod block_hash;
pub mod pool;
pub mod prefix_cache;

pub use allocator::BlockAllocator;
pub use block_hash::BlockHash;
pub use pool::{BlockPool, KvUsage};
pub use prefix_cache::PrefixCache;

/// Names one block of the KV cache.
pub type BlockId = u32;
