//! The memory of the paged KV cache: two tensors per layer.
//!
//! Which block belongs to whom is `kv`'s business; this is only where the numbers lie.

use super::spec::ModelSpec;
use crate::ops::args::CopyBlocksArgs;
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{Ops, OpsError};
use crate::tensor::DType;

/// Keys and values of one layer.
pub struct KvLayer {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k: KvTensor,
    /// As `k`.
    pub v: KvTensor,
}

/// Keys and values of all layers.
pub struct KvCache {
    /// One per decoder layer.
    pub layers: Vec<KvLayer>,
    /// Tokens per block.
    pub block_size: usize,
}

impl KvCache {
    /// Allocates the pool. Pages of the host's memory are touched only when blocks are first
    /// written.
    pub fn new(
        ops: &dyn Ops,
        spec: &ModelSpec,
        num_blocks: usize,
        block_size: usize,
        dtype: DType,
    ) -> Result<KvCache, OpsError> {
        let layer = |num_kv_heads: usize, head_dim: usize| -> Result<KvLayer, OpsError> {
            let zeros =
                || KvTensor::zeros_on(ops, dtype, [num_blocks, num_kv_heads, block_size, head_dim]);
            Ok(KvLayer { k: zeros()?, v: zeros()? })
        };
        let attentions = spec.layers.iter().map(|l| &l.attention);
        let layers: Result<_, _> = attentions.map(|a| layer(a.num_kv_heads, a.head_dim)).collect();
        Ok(KvCache { layers: layers?, block_size })
    }

    /// Bytes that one block takes over all layers, scales among them.
    pub fn block_bytes(spec: &ModelSpec, block_size: usize, dtype: DType) -> usize {
        let per_token = |l: &super::spec::LayerSpec| {
            2 * l.attention.num_kv_heads * KvTensor::vector_bytes(dtype, l.attention.head_dim)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::ReferenceOps;
    use crate::tensor::Tensor;

    const CONFIG: &str = r#"{
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 20,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
        "tie_word_embeddings": true, "hidden_act": "silu"
    }"#;

    #[test]
    fn blocks_take_the_bytes_that_are_planned_for_them() {
        let spec = ModelSpec::from_config(CONFIG).expect("the config is supported");
        for dtype in [DType::F32, DType::BF16, DType::I8, DType::Fp8] {
            let cache = KvCache::new(&ReferenceOps, &spec, 5, 16, dtype).expect("it is small");
            let tensors = cache.layers.iter().flat_map(|layer| [&layer.k, &layer.v]);
            let bytes = |t: &KvTensor| {
                t.data.size_bytes() + t.scales.as_ref().map_or(0, Tensor::size_bytes)
            };
            let allocated: usize = tensors.map(bytes).sum();
            assert_eq!(allocated, 5 * KvCache::block_bytes(&spec, 16, dtype), "{dtype}");
        }
    }
}
