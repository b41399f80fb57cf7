//! Cases of attention over a paged cache: every dtype of a cache and size of a head, contexts of one
//! part and of several, windows, capped scores and sinks.

use super::verify::Side;
use crate::ops::args::{AttentionArgs, WriteKvArgs};
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{OpsError, StepLimits};
use crate::tensor::DType;

const BLOCK_SIZE: u32 = 16;
const NUM_HEADS: usize = 8;
const NUM_KV_HEADS: usize = 2;
const MAX_CONTEXT: usize = 1536;

/// Contexts of three sequences, and their new tokens.
type Sizes = ([u32; 3], [u32; 3]);

/// A prompt, a chunk after a cached prefix, and a decode step.
const SHORT: Sizes = ([33, 50, 200], [33, 9, 1]);
/// Decode steps: a GPU shares a context of more than 256 positions between its multiprocessors, a
/// processor one of more than 1,024 between its threads.
const DECODED: Sizes = ([700, 20, 1300], [1, 1, 1]);
/// Chunks after long prefixes, beside a decode step.
const CHUNKS: Sizes = ([300, 270, 1100], [40, 17, 1]);

/// One case.
#[derive(Clone, Copy)]
struct Case {
    dtype: DType,
    head_dim: usize,
    sizes: Sizes,
    sliding_window: Option<usize>,
    softcap: Option<f32>,
    has_sinks: bool,
}

impl Case {
    fn new(dtype: DType, head_dim: usize, sizes: Sizes) -> Case {
        Case { dtype, head_dim, sizes, sliding_window: None, softcap: None, has_sinks: false }
    }

    fn name(&self) -> String {
        let Case { dtype, head_dim, sizes: (contexts, queries), .. } = self;
        let longest = contexts.iter().max().copied().unwrap_or_default();
        let what = if queries.iter().all(|&queries| queries == 1) { "decode" } else { "mixed" };
        let window =
            self.sliding_window.map_or(String::new(), |window| format!(", window {window}"));
        let cap = if self.softcap.is_some() { ", capped" } else { "" };
        let sinks = if self.has_sinks { ", sinks" } else { "" };
        format!("{dtype}, heads of {head_dim}, {what} to {longest}{window}{cap}{sinks}")
    }
}

/// Runs all cases.
pub(super) fn attention(side: &mut Side<'_>) -> Result<(), OpsError> {
    side.ops.reserve(&StepLimits {
        max_num_tokens: 128,
        max_num_seqs: 3,
        max_context_len: MAX_CONTEXT,
        max_width: 256,
        num_heads: NUM_HEADS,
        head_dim: 256,
        max_logit_rows: 1,
        vocab_size: 16,
        hidden_size: 64,
        num_experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    })?;
    for dtype in [DType::BF16, DType::F16, DType::I8, DType::Fp8] {
        for head_dim in [64, 96, 128, 256] {
            attend(side, Case::new(dtype, head_dim, SHORT))?;
            attend(side, Case::new(dtype, head_dim, DECODED))?;
        }
    }
    attend(side, Case::new(DType::BF16, 128, CHUNKS))?;
    for (dtype, sizes) in [(DType::BF16, SHORT), (DType::Fp8, DECODED), (DType::BF16, CHUNKS)] {
        let plain = Case::new(dtype, 64, sizes);
        attend(side, Case { sliding_window: Some(21), ..plain })?;
        attend(side, Case { softcap: Some(0.5), ..plain })?;
        attend(side, Case { has_sinks: true, ..plain })?;
    }
    let all = Case::new(DType::BF16, 128, DECODED);
    attend(side, Case { sliding_window: Some(300), softcap: Some(0.5), has_sinks: true, ..all })
}

/// Keys and values of three sequences are written and attended to.
fn attend(side: &mut Side<'_>, case: Case) -> Result<(), OpsError> {
    let Case { dtype, head_dim, sizes: (contexts, queries), .. } = case;
    let width = contexts.iter().max().map_or(1, |context| context.div_ceil(BLOCK_SIZE));
    let shape = [3 * width as usize, NUM_KV_HEADS, BLOCK_SIZE as usize, head_dim];
    let mut k_cache = KvTensor::zeros_on(side.ops, dtype, shape)?;
    let mut v_cache = KvTensor::zeros_on(side.ops, dtype, shape)?;
    // Blocks in descending order, so that a table is needed.
    let block = |seq: u32, i: u32| 3 * width - 1 - (seq * width + i);
    let tables: Vec<u32> = (0..3).flat_map(|seq| (0..width).map(move |i| block(seq, i))).collect();
    let slot = |seq: u32, at: u32| block(seq, at / BLOCK_SIZE) * BLOCK_SIZE + at % BLOCK_SIZE;
    let slots: Vec<u32> = (0..3_u32)
        .flat_map(|seq| (0..contexts[seq as usize]).map(move |at| slot(seq, at)))
        .collect();
    let kv_shape = [slots.len(), NUM_KV_HEADS, head_dim];
    let (k, v) = (side.activations(kv_shape)?, side.activations(kv_shape)?);
    let slot_mapping = side.integers(&slots, [slots.len()])?;
    side.ops.write_kv(WriteKvArgs {
        k_cache: k_cache.view_mut(),
        v_cache: v_cache.view_mut(),
        k: k.view(),
        v: v.view(),
        slot_mapping: slot_mapping.view(),
    });
    let starts: Vec<u32> = (0..=3).map(|seq| queries[..seq].iter().sum()).collect();
    let q = side.activations([starts[3] as usize, NUM_HEADS, head_dim])?;
    let mut out = side.room([starts[3] as usize, NUM_HEADS, head_dim])?;
    let tables = side.integers(&tables, [3, width as usize])?;
    let cu_seqlens = side.integers(&starts, [4])?;
    let context_lens = side.integers(&contexts, [3])?;
    let sinks = if case.has_sinks { Some(side.floats([NUM_HEADS])?) } else { None };
    side.ops.attention(AttentionArgs {
        out: out.view_mut(),
        q: q.view(),
        k_cache: k_cache.view(),
        v_cache: v_cache.view(),
        block_tables: tables.view(),
        cu_seqlens_q: cu_seqlens.view(),
        context_lens: context_lens.view(),
        scale: 1.0 / (head_dim as f32).sqrt(),
        sliding_window: case.sliding_window,
        softcap: case.softcap,
        sinks: sinks.as_ref().map(|sinks| sinks.view()),
    });
    side.note(case.name(), &out);
    Ok(())
}
