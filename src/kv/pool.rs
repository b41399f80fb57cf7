//! All blocks of one KV cache: allocation, sharing and caching as the scheduler sees them.
//!
//! A block is in one of three places: on the free list, referenced by running sequences, or
//! unreferenced but kept in the prefix cache. The last kind counts as available, because
//! allocation evicts from it. Running out is `None` or `false`, never an error.

use super::{BlockAllocator, BlockHash, BlockId, PrefixCache};

/// Where the blocks are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvUsage {
    /// All blocks.
    pub num_blocks: usize,
    /// Blocks referenced by running sequences.
    pub num_in_use: usize,
    /// Unreferenced blocks kept for their contents.
    pub num_cached: usize,
}

impl KvUsage {
    /// Fraction of blocks referenced by running sequences, 0 to 1.
    pub fn fraction_in_use(&self) -> f64 {
        self.num_in_use as f64 / self.num_blocks.max(1) as f64
    }
}

/// The blocks of one KV cache.
#[derive(Debug)]
pub struct BlockPool {
    block_size: usize,
    allocator: BlockAllocator,
    cache: PrefixCache,
}

impl BlockPool {
    /// `num_blocks` blocks of `block_size` tokens each, all free.
    pub fn new(num_blocks: usize, block_size: usize) -> BlockPool {
        assert!(block_size > 0, "a block holds at least one token");
        BlockPool {
            block_size,
            allocator: BlockAllocator::new(num_blocks),
            cache: PrefixCache::new(num_blocks),
        }
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Number of blocks altogether.
    pub fn num_blocks(&self) -> usize {
        self.allocator.num_blocks()
    }

    /// Number of blocks that `num_tokens` tokens need.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// Number of blocks that could be allocated now.
    pub fn num_available(&self) -> usize {
        self.allocator.num_free() + self.cache.num_evictable()
    }

    /// Number of blocks that a block table lacks to hold `num_tokens` tokens.
    pub fn num_missing(&self, table: &[BlockId], num_tokens: usize) -> usize {
        // Asked for every sequence in every step; mostly the answer needs no division.
        match num_tokens <= table.len() * self.block_size {
            true => 0,
            false => self.blocks_for(num_tokens) - table.len(),
        }
    }

    /// Extends a block table to hold `num_tokens` tokens; false, and no change, when there are
    /// not enough blocks available.
    pub fn grow(&mut self, table: &mut Vec<BlockId>, num_tokens: usize) -> bool {
        let missing = self.num_missing(table, num_tokens);
        if missing > self.num_available() {
            return false;
        }
        table.extend((0..missing).map_while(|_| self.allocate()));
        true
    }

    fn allocate(&mut self) -> Option<BlockId> {
        if self.allocator.num_free() == 0 {
            let evicted = self.cache.evict()?;
            self.allocator.free(evicted);
        }
        self.allocator.allocate()
    }

    /// Finds the blocks of the longest cached prefix, without referencing them yet.
    pub fn lookup<'a>(&self, hashes: impl Iterator<Item = &'a BlockHash>) -> Vec<BlockId> {
        hashes.map_while(|hash| self.cache.lookup(hash)).collect()
    }

    /// How many of these blocks count as available now and would not if they were retained.
    pub fn num_unreferenced(&self, blocks: &[BlockId]) -> usize {
        blocks.iter().filter(|&&block| self.allocator.refcount(block) == 0).count()
    }

    /// Adds a reference to each block; they are cached or in use.
    pub fn retain(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            if self.allocator.refcount(block) == 0 {
                self.cache.reuse(block);
            }
            self.allocator.retain(block);
        }
    }

    /// Empties a block table. Its last block is released first, so that of blocks kept in the
    /// prefix cache a prefix outlives its continuations.
    pub fn release(&mut self, table: &mut Vec<BlockId>) {
        for block in table.drain(..).rev() {
            if !self.allocator.release(block) {
                continue;
            }
            if self.cache.is_published(block) {
                self.cache.make_evictable(block);
            } else {
                self.allocator.free(block);
            }
        }
    }

    /// Makes a full, computed block findable, unless its contents already are.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) {
        self.cache.publish(block, hash);
    }

    /// True when writing to the block changes nothing for anybody but its only owner.
    pub fn is_private(&self, block: BlockId) -> bool {
        self.allocator.refcount(block) == 1 && !self.cache.is_published(block)
    }

    /// Forgets all cached prefixes; blocks in use stay in use, but can no longer be found.
    pub fn reset_prefix_cache(&mut self) {
        self.cache.forget_all();
        while let Some(block) = self.cache.evict() {
            self.allocator.free(block);
        }
    }

    /// Where the blocks are.
    pub fn usage(&self) -> KvUsage {
        KvUsage {
            num_blocks: self.num_blocks(),
            num_in_use: self.num_blocks() - self.num_available(),
            num_cached: self.cache.num_evictable(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(len: u32) -> Vec<BlockHash> {
        let mut parent = BlockHash::root(None);
        (0..len)
            .map(|i| {
                parent = parent.child([i]);
                parent
            })
            .collect()
    }

    fn published(pool: &mut BlockPool, hashes: &[BlockHash]) -> Vec<BlockId> {
        let mut table = Vec::new();
        assert!(pool.grow(&mut table, 4 * hashes.len()));
        for (&block, &hash) in table.iter().zip(hashes) {
            pool.publish(block, hash);
        }
        table
    }

    #[test]
    fn growth_is_all_or_nothing() {
        let mut pool = BlockPool::new(3, 4);
        let mut table = Vec::new();
        assert!(pool.grow(&mut table, 5));
        assert!(!pool.grow(&mut table, 13));
        assert_eq!(table.len(), 2);
        assert_eq!(pool.num_available(), 1);
    }

    #[test]
    fn released_full_blocks_stay_findable_until_their_memory_is_needed() {
        let mut pool = BlockPool::new(3, 4);
        let hashes = chain(3);
        let mut table = published(&mut pool, &hashes);
        let blocks = table.clone();
        pool.release(&mut table);
        assert_eq!(pool.usage(), KvUsage { num_blocks: 3, num_in_use: 0, num_cached: 3 });
        assert_eq!(pool.lookup(hashes.iter()), blocks);

        assert!(pool.grow(&mut table, 1));
        assert_eq!(table, [blocks[2]], "the tail of the chain goes before its parents");
        assert_eq!(pool.lookup(hashes.iter()), blocks[..2]);
    }

    #[test]
    fn a_retained_prefix_is_not_evicted() {
        let mut pool = BlockPool::new(2, 4);
        let hashes = chain(2);
        let mut table = published(&mut pool, &hashes);
        pool.release(&mut table);
        let prefix = pool.lookup(hashes[..1].iter());
        assert_eq!(pool.num_unreferenced(&prefix), 1);
        pool.retain(&prefix);
        assert!(pool.grow(&mut table, 1));
        assert_ne!(table, prefix);
        assert!(!pool.grow(&mut table, 5));
    }

    #[test]
    fn a_reset_frees_what_was_cached_and_keeps_what_is_in_use() {
        let mut pool = BlockPool::new(4, 4);
        let hashes = chain(3);
        let mut table = published(&mut pool, &hashes);
        let mut tail = table.split_off(1);
        pool.release(&mut tail);
        pool.reset_prefix_cache();
        assert_eq!(pool.usage(), KvUsage { num_blocks: 4, num_in_use: 1, num_cached: 0 });
        assert!(pool.lookup(hashes.iter()).is_empty());
        pool.release(&mut table);
        assert_eq!(pool.usage().num_cached, 0, "a forgotten block is freed, not cached");
        assert_eq!(pool.num_available(), 4);
    }
}
