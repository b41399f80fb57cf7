//! What a full block holds, as a chained hash: equal hashes mean equal prefixes.
//!
//! A block's hash covers its parent's hash, and the first parent covers the cache salt, so
//! one comparison of 32 bytes stands for the whole prefix up to the end of the block.
//! SHA-256, because a collision that someone can construct would show one client's context
//! to another.

use std::hash::{BuildHasherDefault, Hash, Hasher};

use sha2::{Digest, Sha256};

/// SHA-256 over a prefix that ends with a full block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHash([u8; 32]);

impl BlockHash {
    /// The parent of every first block of prompts with this salt.
    pub fn root(cache_salt: Option<&str>) -> BlockHash {
        let mut sha = Sha256::new();
        // The leading byte keeps the empty salt apart from no salt.
        sha.update([u8::from(cache_salt.is_some())]);
        sha.update(cache_salt.unwrap_or_default());
        BlockHash(sha.finalize().into())
    }

    /// The hash of the block that holds `token_ids` after the prefix `self`.
    pub fn child(&self, token_ids: impl IntoIterator<Item = u32>) -> BlockHash {
        let mut sha = Sha256::new();
        sha.update(self.0);
        // Feeding whole compression blocks is several times faster than token by token.
        let mut bytes = [0; 64];
        let mut filled = 0;
        for token_id in token_ids {
            bytes[filled..filled + 4].copy_from_slice(&token_id.to_le_bytes());
            filled += 4;
            if filled == bytes.len() {
                sha.update(bytes);
                filled = 0;
            }
        }
        sha.update(&bytes[..filled]);
        BlockHash(sha.finalize().into())
    }
}

impl Hash for BlockHash {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        state.write_u64(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
    }
}

/// Uses the first bytes of a [`BlockHash`] as they are: they are uniform already.
#[derive(Debug, Default)]
pub struct Truncate(u64);

impl Hasher for Truncate {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// For maps keyed by [`BlockHash`].
pub type BuildTruncate = BuildHasherDefault<Truncate>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_covers_tokens_parent_and_salt() {
        let root = BlockHash::root(None);
        let block = root.child([1, 2, 3, 4]);
        assert_eq!(block, BlockHash::root(None).child([1, 2, 3, 4]));
        assert_ne!(block, root.child([1, 2, 3, 5]));
        assert_ne!(block, block.child([1, 2, 3, 4]));
        assert_ne!(block, BlockHash::root(Some("a")).child([1, 2, 3, 4]));
        assert_ne!(BlockHash::root(None), BlockHash::root(Some("")));
    }

    #[test]
    fn long_blocks_are_hashed_to_their_end() {
        let root = BlockHash::root(None);
        assert_ne!(root.child(0..32), root.child((0..31).chain([99])));
        assert_ne!(root.child(0..16), root.child(0..17));
    }
}
