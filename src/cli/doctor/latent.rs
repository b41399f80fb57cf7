//! Cases of latent attention, in the sizes of DeepSeek's heads and in small ones.

use super::verify::Side;
use crate::ops::args::*;
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{OpsError, StepLimits};
use crate::tensor::{DType, Tensor};

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 40;
const NUM_HEADS: usize = 18;

/// Sizes of a head and of what is cached.
#[derive(Clone, Copy)]
struct Sizes {
    rank: usize,
    rope_dim: usize,
    nope_dim: usize,
    value_dim: usize,
}

/// Latents of a prompt and of a decode step are written and attended to, with what comes before and
/// after.
pub(super) fn latent_attention(side: &mut Side<'_>) -> Result<(), OpsError> {
    side.ops.reserve(&StepLimits {
        max_num_tokens: 64,
        max_num_seqs: 2,
        max_context_len: 320,
        max_width: 512,
        num_heads: NUM_HEADS,
        head_dim: 576,
        max_logit_rows: 1,
        vocab_size: 16,
        hidden_size: 64,
        num_experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    })?;
    let small = Sizes { rank: 48, rope_dim: 16, nope_dim: 24, value_dim: 40 };
    let large = Sizes { rank: 512, rope_dim: 64, nope_dim: 128, value_dim: 128 };
    for (sizes, dtype) in [(small, DType::BF16), (large, DType::BF16), (large, DType::F16)] {
        attend(side, sizes, dtype, &[17])?;
        attend(side, sizes, dtype, &[1, 1])?;
    }
    Ok(())
}

fn heads(side: &mut Side<'_>, shape: [usize; 3]) -> Result<Tensor, OpsError> {
    let len = shape.iter().product();
    let values: Vec<half::bf16> = side.numbers(len).into_iter().map(half::bf16::from_f32).collect();
    side.ops.place_heads(Tensor::from_slice(&values, shape))
}

/// So many queries of each sequence, at the end of contexts of twenty blocks.
fn attend(
    side: &mut Side<'_>,
    sizes: Sizes,
    dtype: DType,
    queries: &[u32],
) -> Result<(), OpsError> {
    let Sizes { rank, rope_dim, nope_dim, value_dim } = sizes;
    let dim = rank + rope_dim;
    let context = NUM_BLOCKS as u32 / 2 * BLOCK_SIZE as u32;
    let mut cache = KvTensor::zeros_on(side.ops, dtype, [NUM_BLOCKS, 1, BLOCK_SIZE, dim])?;
    // What was cached before: every slot gets a latent, which the sequences' tables name.
    let num_slots = NUM_BLOCKS * BLOCK_SIZE;
    let slots: Vec<u32> = (0..num_slots as u32).collect();
    let q = side.activations([num_slots, 1, nope_dim + rope_dim])?;
    let mut latent = side.activations([num_slots, dim])?;
    let mut absorbed = side.room([num_slots, 1, dim])?;
    let weight = side.floats([rank])?;
    let (cos, sin) =
        (side.floats([num_slots, rope_dim / 2])?, side.floats([num_slots, rope_dim / 2])?);
    let positions = side.integers(&slots, [num_slots])?;
    side.ops.write_latent(WriteLatentArgs {
        cache: cache.view_mut(),
        absorbed: absorbed.view_mut(),
        latent: latent.view_mut(),
        q: q.view(),
        weight: weight.view(),
        eps: 1e-6,
        positions: positions.view(),
        cos: cos.view(),
        sin: sin.view(),
        style: RopeStyle::Interleaved,
        slot_mapping: positions.view(),
    });
    let num_tokens = queries.iter().sum::<u32>() as usize;
    let x = side.activations([num_tokens, NUM_HEADS, nope_dim + rope_dim])?;
    let mut q = side.activations([num_tokens, NUM_HEADS, dim])?;
    let absorb = heads(side, [NUM_HEADS, rank, nope_dim])?;
    side.ops.head_matmul(HeadMatmulArgs { out: q.view_mut(), x: x.view(), weight: absorb.view() });
    let case = format!("{rank} + {rope_dim} in {dtype}, {num_tokens} tokens");
    side.note(format!("{case}, absorbed queries"), &q);
    let starts: Vec<u32> = (0..=queries.len()).map(|seq| queries[..seq].iter().sum()).collect();
    let blocks: Vec<u32> = (0..(queries.len() * NUM_BLOCKS / 2) as u32).rev().collect();
    let tables = side.integers(&blocks, [queries.len(), NUM_BLOCKS / 2])?;
    let cu_seqlens = side.integers(&starts, [starts.len()])?;
    let context_lens = side.integers(&vec![context; queries.len()], [queries.len()])?;
    let mut means = side.room([num_tokens, NUM_HEADS, rank])?;
    // Products of as many elements as absorption adds up are larger than those of heads.
    side.ops.latent_attention(LatentAttentionArgs {
        out: means.view_mut(),
        q: q.view(),
        cache: cache.view(),
        block_tables: tables.view(),
        cu_seqlens_q: cu_seqlens.view(),
        context_lens: context_lens.view(),
        scale: 0.2 / ((nope_dim + rope_dim) as f32).sqrt(),
    });
    side.note(format!("{case}, means"), &means);
    let release = heads(side, [NUM_HEADS, value_dim, rank])?;
    let mut out = side.room([num_tokens, NUM_HEADS, value_dim])?;
    let (to, x) = (out.view_mut(), means.view());
    side.ops.head_matmul(HeadMatmulArgs { out: to, x, weight: release.view() });
    let addend = side.activations([num_tokens, NUM_HEADS, value_dim])?;
    side.ops.add(AddArgs { out: out.view_mut(), x: addend.view() });
    side.note(format!("{case}, values and a sum"), &out);
    Ok(())
}
