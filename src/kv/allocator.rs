//! Free list and reference counts of KV blocks.
//!
//! A block whose last reference is gone is *not* free by itself: it may still be worth
//! keeping for its contents, so [`BlockPool`](super::BlockPool) decides between
//! [`BlockAllocator::free`] and the prefix cache. Knows nothing of what blocks hold.

use super::BlockId;

/// Hands out blocks and counts their references.
#[derive(Debug)]
pub struct BlockAllocator {
    free: Vec<BlockId>,
    refcounts: Vec<u32>,
}

impl BlockAllocator {
    /// All of `num_blocks` blocks are free; the lowest id is handed out first.
    pub fn new(num_blocks: usize) -> BlockAllocator {
        let num_blocks = BlockId::try_from(num_blocks).expect("a pool has fewer than 2^32 blocks");
        BlockAllocator {
            free: (0..num_blocks).rev().collect(),
            refcounts: vec![0; num_blocks as usize],
        }
    }

    /// A free block, now with one reference; `None` when there is no free block.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.refcounts[block as usize] = 1;
        Some(block)
    }

    /// Adds a reference. The block must not be free.
    pub fn retain(&mut self, block: BlockId) {
        self.refcounts[block as usize] += 1;
    }

    /// Drops a reference; true when it was the last one.
    ///
    /// Panics when the block has no reference, which would mean that it is in use twice.
    pub fn release(&mut self, block: BlockId) -> bool {
        let count = &mut self.refcounts[block as usize];
        *count = count.checked_sub(1).expect("a released block is referenced");
        *count == 0
    }

    /// Puts a block without references on the free list.
    pub fn free(&mut self, block: BlockId) {
        debug_assert_eq!(self.refcount(block), 0, "block {block} is still in use");
        self.free.push(block);
    }

    /// Number of references to a block.
    pub fn refcount(&self, block: BlockId) -> u32 {
        self.refcounts[block as usize]
    }

    /// Number of blocks on the free list.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Number of blocks altogether.
    pub fn num_blocks(&self) -> usize {
        self.refcounts.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exhaustion_is_none() {
        let mut blocks = BlockAllocator::new(2);
        assert_eq!((blocks.allocate(), blocks.allocate()), (Some(0), Some(1)));
        assert_eq!(blocks.allocate(), None);
    }

    #[test]
    fn only_the_last_release_says_so() {
        let mut blocks = BlockAllocator::new(1);
        let block = blocks.allocate().unwrap();
        blocks.retain(block);
        assert!(!blocks.release(block));
        assert!(blocks.release(block));
        assert_eq!(blocks.num_free(), 0, "an unreferenced block is not free by itself");
        blocks.free(block);
        assert_eq!(blocks.allocate(), Some(block));
    }

    #[test]
    #[should_panic(expected = "a released block is referenced")]
    fn a_double_release_is_caught() {
        let mut blocks = BlockAllocator::new(1);
        blocks.release(0);
    }
}
