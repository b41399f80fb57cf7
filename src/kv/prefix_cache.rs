//! Automatic prefix caching: which block holds which prefix, and which to give up first.
//!
//! Full blocks are published under their [`BlockHash`]. A published block that nobody
//! references stays findable until its memory is needed; then the one that became
//! unreferenced longest ago goes first. Knows nothing of reference counts: its caller says
//! when a block becomes unreferenced and when it is used again.

use std::collections::HashMap;

use super::BlockId;
use super::block_hash::{BlockHash, BuildTruncate};

/// Contents of full blocks and the eviction order of the unreferenced ones.
#[derive(Debug)]
pub struct PrefixCache {
    by_hash: HashMap<BlockHash, BlockId, BuildTruncate>,
    /// Per block, the hash under which it is published.
    published: Vec<Option<BlockHash>>,
    evictable: LruList,
}

impl PrefixCache {
    /// An empty cache over `num_blocks` blocks.
    pub fn new(num_blocks: usize) -> PrefixCache {
        PrefixCache {
            by_hash: HashMap::default(),
            published: vec![None; num_blocks],
            evictable: LruList::new(num_blocks),
        }
    }

    /// The block that holds this prefix's last tokens.
    pub fn lookup(&self, hash: &BlockHash) -> Option<BlockId> {
        self.by_hash.get(hash).copied()
    }

    /// Makes a full, computed block findable; false when another block holds the same prefix
    /// or this one is published already, and nothing changes.
    pub fn publish(&mut self, block: BlockId, hash: BlockHash) -> bool {
        if self.is_published(block) || self.by_hash.contains_key(&hash) {
            return false;
        }
        self.by_hash.insert(hash, block);
        self.published[block as usize] = Some(hash);
        true
    }

    /// True while the block can be found.
    pub fn is_published(&self, block: BlockId) -> bool {
        self.published[block as usize].is_some()
    }

    /// A published block lost its last reference: it becomes the last in line for eviction.
    pub fn make_evictable(&mut self, block: BlockId) {
        debug_assert!(self.is_published(block), "block {block} holds nothing worth keeping");
        self.evictable.push_back(block);
    }

    /// An evictable block is referenced again.
    pub fn reuse(&mut self, block: BlockId) {
        self.evictable.remove(block);
    }

    /// Forgets the contents of the block that became unreferenced longest ago.
    pub fn evict(&mut self) -> Option<BlockId> {
        let block = self.evictable.pop_front()?;
        if let Some(hash) = self.published[block as usize].take() {
            self.by_hash.remove(&hash);
        }
        Some(block)
    }

    /// Forgets the contents of all blocks, referenced or not; what was evictable stays so.
    pub fn forget_all(&mut self) {
        self.by_hash.clear();
        self.published.fill(None);
    }

    /// Number of unreferenced blocks that are kept for their contents.
    pub fn num_evictable(&self) -> usize {
        self.evictable.len
    }
}

/// A doubly linked list through per-block links: every operation is O(1), nothing allocates.
#[derive(Debug)]
struct LruList {
    /// Links of each block; the extra last entry is the anchor of the ring.
    links: Vec<Link>,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    previous: BlockId,
    next: BlockId,
}

impl LruList {
    fn new(num_blocks: usize) -> LruList {
        let anchor = num_blocks as BlockId;
        LruList { links: vec![Link { previous: anchor, next: anchor }; num_blocks + 1], len: 0 }
    }

    fn anchor(&self) -> BlockId {
        (self.links.len() - 1) as BlockId
    }

    fn push_back(&mut self, block: BlockId) {
        let anchor = self.anchor();
        let last = self.links[anchor as usize].previous;
        self.links[block as usize] = Link { previous: last, next: anchor };
        self.links[last as usize].next = block;
        self.links[anchor as usize].previous = block;
        self.len += 1;
    }

    fn remove(&mut self, block: BlockId) {
        let Link { previous, next } = self.links[block as usize];
        debug_assert_eq!(self.links[previous as usize].next, block, "block {block} is listed");
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
        self.len -= 1;
    }

    fn pop_front(&mut self) -> Option<BlockId> {
        let first = self.links[self.anchor() as usize].next;
        if first == self.anchor() {
            return None;
        }
        self.remove(first);
        Some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(count: u32) -> Vec<BlockHash> {
        (0..count).map(|i| BlockHash::root(None).child([i])).collect()
    }

    #[test]
    fn the_longest_unreferenced_block_is_evicted_first() {
        let mut cache = PrefixCache::new(3);
        let hashes = hashes(3);
        for block in 0..3 {
            assert!(cache.publish(block, hashes[block as usize]));
        }
        for block in [2, 0, 1] {
            cache.make_evictable(block);
        }
        cache.reuse(0);
        assert_eq!(cache.evict(), Some(2));
        assert_eq!(cache.lookup(&hashes[2]), None);
        assert_eq!(cache.lookup(&hashes[0]), Some(0));
        assert_eq!(cache.evict(), Some(1));
        assert_eq!(cache.evict(), None, "block 0 is in use");
    }

    #[test]
    fn the_first_publisher_of_a_prefix_wins() {
        let mut cache = PrefixCache::new(2);
        let hash = hashes(1)[0];
        assert!(cache.publish(1, hash));
        assert!(!cache.publish(0, hash));
        assert_eq!(cache.lookup(&hash), Some(1));
        assert!(!cache.is_published(0));
    }
}
