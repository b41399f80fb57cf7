//! The memory of the paged KV cache: two tensors per layer, or one where attention is latent.
//!
//! Which block belongs to whom is `kv`'s business; this is only where the numbers lie.

use super::spec::{AttentionSpec, ModelSpec};
use crate::ops::args::CopyBlocksArgs;
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{Ops, OpsError};
use crate::tensor::DType;

/// Keys and values of one layer.
pub struct KvLayer {
    /// `[num_blocks, num_kv_heads, block_size, head_dim]`.
    pub k: KvTensor,
    /// As `k`; `None` where one vector is key and value.
    pub v: Option<KvTensor>,
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
        let layer = |attention: &AttentionSpec| -> Result<KvLayer, OpsError> {
            let &AttentionSpec { num_kv_heads, head_dim, .. } = attention;
            let zeros =
                || KvTensor::zeros_on(ops, dtype, [num_blocks, num_kv_heads, block_size, head_dim]);
            let has_values = attention.latent().is_none();
            Ok(KvLayer { k: zeros()?, v: has_values.then(zeros).transpose()? })
        };
        let layers: Result<_, _> = spec.layers.iter().map(|l| layer(&l.attention)).collect();
        Ok(KvCache { layers: layers?, block_size })
    }

    /// Bytes that one block takes over all layers, scales among them.
    pub fn block_bytes(spec: &ModelSpec, block_size: usize, dtype: DType) -> usize {
        let per_token = |attention: &AttentionSpec| {
            attention.cached_vectors() * KvTensor::vector_bytes(dtype, attention.head_dim)
        };
        block_size * spec.layers.iter().map(|l| per_token(&l.attention)).sum::<usize>()
    }

    /// Copies whole blocks in every layer, as (source, destination).
    pub fn copy_blocks(&mut self, ops: &dyn Ops, pairs: &[(u32, u32)]) {
        for layer in &mut self.layers {
            let k_cache = layer.k.view_mut();
            let v_cache = layer.v.as_mut().map(KvTensor::view_mut);
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

    const LATENT: &str = r#"{
        "architectures": ["DeepseekV2ForCausalLM"], "torch_dtype": "bfloat16", "hidden_size": 8,
        "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 2,
        "vocab_size": 20, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2,
        "v_head_dim": 4, "first_k_dense_replace": 3
    }"#;

    #[test]
    fn a_latent_is_cached_once() {
        let spec = ModelSpec::from_config(LATENT).expect("the config is supported");
        assert_eq!(KvCache::block_bytes(&spec, 16, DType::BF16), 3 * 16 * (6 + 2) * 2);
        assert_eq!(KvCache::block_bytes(&spec, 8, DType::I8), 3 * 8 * (6 + 2 + 4));
    }

    #[test]
    fn blocks_take_the_bytes_that_are_planned_for_them() {
        for config in [CONFIG, LATENT] {
            blocks_take_the_bytes_planned(config);
        }
    }

    fn blocks_take_the_bytes_planned(config: &str) {
        let spec = ModelSpec::from_config(config).expect("the config is supported");
        for dtype in [DType::F32, DType::BF16, DType::I8, DType::Fp8] {
            let cache = KvCache::new(&ReferenceOps, &spec, 5, 16, dtype).expect("it is small");
            let tensors =
                cache.layers.iter().flat_map(|layer| std::iter::once(&layer.k).chain(&layer.v));
            let bytes = |t: &KvTensor| {
                t.data.size_bytes() + t.scales.as_ref().map_or(0, Tensor::size_bytes)
            };
            let allocated: usize = tensors.map(bytes).sum();
            assert_eq!(allocated, 5 * KvCache::block_bytes(&spec, 16, dtype), "{dtype}");
        }
    }
}
