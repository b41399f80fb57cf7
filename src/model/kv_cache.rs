//! The memory of the paged KV cache: two tensors per layer.
//!
//! Which block belongs to whom is `kv`'s business; this is only where the numbers lie.

use super::spec::ModelSpec;
use crate::ops::Ops;
use crate::ops::args::CopyBlocksArgs;
use crate::tensor::{DType, Tensor};

/// Keys and values of one layer.
pub struct KvLayer {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k: Tensor,
    /// As `k`.
    pub v: Tensor,
}

/// Keys and values of all layers.
pub struct KvCache {
    /// One per decoder layer.
    pub layers: Vec<KvLayer>,
    /// Tokens per block.
    pub block_size: usize,
}

impl KvCache {
    /// Allocates the pool. Pages are touched only when blocks are first written.
    pub fn new(spec: &ModelSpec, num_blocks: usize, block_size: usize, dtype: DType) -> KvCache {
        let layer = |num_kv_heads: usize, head_dim: usize| {
            let shape = [num_blocks, num_kv_heads, block_size, head_dim];
            KvLayer { k: Tensor::zeros(dtype, shape), v: Tensor::zeros(dtype, shape) }
        };
        let layers = spec.layers.iter();
        KvCache {
            layers: layers.map(|l| layer(l.attention.num_kv_heads, l.attention.head_dim)).collect(),
            block_size,
        }
    }

    /// Bytes that one block takes over all layers.
    pub fn block_bytes(spec: &ModelSpec, block_size: usize, dtype: DType) -> usize {
        let per_token = |l: &super::spec::LayerSpec| {
            2 * l.attention.num_kv_heads * l.attention.head_dim * dtype.size_bytes()
        };
        block_size * spec.layers.iter().map(per_token).sum::<usize>()
    }

    /// Copies whole blocks in every layer, as (source, destination).
    pub fn copy_blocks(&mut self, ops: &dyn Ops, pairs: &[(u32, u32)]) {
        for layer in &mut self.layers {
            let (k_cache, v_cache) = (layer.k.view_mut(), layer.v.view_mut());
            ops.copy_blocks(CopyBlocksArgs { k_cache, v_cache, pairs });
        }
    }
}
