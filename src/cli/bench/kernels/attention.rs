//! Attention of decoded sequences and of a prompt, over a cache that was written as a step writes it.

use super::figures::KernelRow;
use super::{BLOCK_SIZE, Bench, KernelsArgs};
use crate::ops::OpsError;
use crate::ops::args::{AttentionArgs, WriteKvArgs};
use crate::ops::kv_tensor::KvTensor;
use crate::tensor::{DType, Tensor};

impl Bench<'_> {
    fn integers(&self, values: &[u32], shape: &[usize]) -> Result<Tensor, OpsError> {
        self.ops.place(Tensor::from_slice(values, shape))
    }

    /// Keys and values of `num_seqs` contexts, in blocks one after the other.
    fn caches(&self, dtype: DType, num_seqs: usize) -> Result<[KvTensor; 2], OpsError> {
        let &KernelsArgs { num_kv_heads, head_dim, context_len, .. } = self.args;
        let width = context_len.div_ceil(BLOCK_SIZE);
        let shape = [num_seqs * width, num_kv_heads, BLOCK_SIZE, head_dim];
        let mut k_cache = KvTensor::zeros_on(self.ops, dtype, shape)?;
        let mut v_cache = KvTensor::zeros_on(self.ops, dtype, shape)?;
        let vectors = [context_len, num_kv_heads, head_dim];
        let k = self.normals.activations(self.ops, vectors)?;
        let v = self.normals.activations(self.ops, vectors)?;
        for seq in 0..num_seqs {
            let first = (seq * width * BLOCK_SIZE) as u32;
            let slots: Vec<u32> = (first..first + context_len as u32).collect();
            let slots = self.integers(&slots, &[context_len])?;
            self.ops.write_kv(WriteKvArgs {
                k_cache: k_cache.view_mut(),
                v_cache: v_cache.view_mut(),
                k: k.view(),
                v: v.view(),
                slot_mapping: slots.view(),
            });
            // The slots must outlive what reads them.
            self.ops.synchronize()?;
        }
        Ok([k_cache, v_cache])
    }

    /// Attention of `num_queries` new tokens of each of `num_seqs` sequences.
    pub(super) fn attention(
        &self,
        operation: &str,
        dtype: DType,
        num_seqs: usize,
        num_queries: usize,
    ) -> Result<KernelRow, OpsError> {
        let &KernelsArgs { num_heads, num_kv_heads, head_dim, context_len, .. } = self.args;
        let width = context_len.div_ceil(BLOCK_SIZE);
        let [k_cache, v_cache] = self.caches(dtype, num_seqs)?;
        let blocks: Vec<u32> = (0..(num_seqs * width) as u32).collect();
        let tables = self.integers(&blocks, &[num_seqs, width])?;
        let starts: Vec<u32> = (0..=num_seqs).map(|seq| (seq * num_queries) as u32).collect();
        let cu_seqlens = self.integers(&starts, &[num_seqs + 1])?;
        let context_lens = self.integers(&vec![context_len as u32; num_seqs], &[num_seqs])?;
        let shape = [num_seqs * num_queries, num_heads, head_dim];
        let q = self.normals.activations(self.ops, shape)?;
        let mut out = self.ops.zeros(self.ops.activation_dtype(), shape.into())?;
        let microseconds = self.time(1, |_| {
            self.ops.attention(AttentionArgs {
                out: out.view_mut(),
                q: q.view(),
                k_cache: k_cache.view(),
                v_cache: v_cache.view(),
                block_tables: tables.view(),
                cu_seqlens_q: cu_seqlens.view(),
                context_lens: context_lens.view(),
                scale: 1.0 / (head_dim as f32).sqrt(),
                sliding_window: None,
                softcap: None,
                sinks: None,
            });
        })?;
        let vectors = 2 * num_seqs * context_len * num_kv_heads;
        // A query of a prompt sees half of it on average.
        let seen = if num_queries == 1 { context_len } else { context_len.div_ceil(2) };
        Ok(KernelRow {
            operation: operation.to_owned(),
            case: format!("{dtype} cache, {num_seqs} × {context_len}"),
            format: None,
            rows: None,
            microseconds,
            bytes: (vectors * KvTensor::vector_bytes(dtype, head_dim) + 2 * q.size_bytes()) as f64,
            flops: 4.0 * (num_seqs * num_queries * seen * num_heads * head_dim) as f64,
            fraction: None,
        })
    }
}
