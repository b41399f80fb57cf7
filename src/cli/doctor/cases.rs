//! A handful of cases of every operation, in sizes that are no multiples of anything.

use crate::config::Quantization;
use crate::formats::{PackedMatrix, dense};
use crate::ops::args::*;
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{OpsError, StepLimits};
use crate::request::SamplingParams;
use crate::tensor::{DType, Tensor};
use crate::weights;

use super::latent::latent_attention;
use super::verify::{COMPUTED, MOVED, OF_FP8, Side};

type Run = fn(&mut Side<'_>) -> Result<(), OpsError>;

/// Operations, how far they may be off, and their cases.
pub(super) const ALL: &[(&str, f64, Run)] = &[
    ("embed", MOVED, embed),
    ("norm", COMPUTED, norm),
    ("layer_norm", COMPUTED, layer_norm),
    ("rope", COMPUTED, rope),
    ("matmul", COMPUTED, matmul),
    ("matmul", OF_FP8, matmul_fp8),
    ("gated_matmul", COMPUTED, gated_matmul),
    ("gated_matmul", OF_FP8, gated_matmul_fp8),
    ("experts", COMPUTED, experts),
    ("attention", COMPUTED, attention),
    ("latent_attention", COMPUTED, latent_attention),
    ("copy_blocks", MOVED, copy_blocks),
    ("gather_rows", MOVED, gather_rows),
    ("soft_cap", COMPUTED, soft_cap),
    ("sample", MOVED, sample),
];

/// Rows of activations: decode, a few sequences, a prompt.
const ROWS: [usize; 3] = [1, 7, 70];

/// A format's name, and how weights become it.
type Named = (&'static str, Option<Quantization>);
/// Weights in FP8.
const FP8: Named = ("fp8", Some(Quantization::Fp8));
/// Weights as they are, and in every other format that weights can be quantized to.
const OTHERS: [Named; 7] = [
    ("bf16", None),
    ("int8", Some(Quantization::Int8)),
    ("w8a16", Some(Quantization::W8A16)),
    ("q8_0", Some(Quantization::Q8_0)),
    ("int4", Some(Quantization::Int4)),
    ("int4-g64", Some(Quantization::Int4G64)),
    ("mxfp4", Some(Quantization::Mxfp4)),
];

/// All of them.
fn formats() -> impl Iterator<Item = Named> {
    OTHERS.into_iter().chain([FP8])
}

/// Random weights, placed.
fn matrix(
    side: &mut Side<'_>,
    quantization: Option<Quantization>,
    [rows, cols]: [usize; 2],
) -> Result<PackedMatrix, OpsError> {
    let values: Vec<half::bf16> =
        side.numbers(rows * cols).into_iter().map(half::bf16::from_f32).collect();
    let plain = dense::pack(Tensor::from_slice(&values, [rows, cols]));
    side.ops.arrange(weights::quantized(plain, quantization, 1))
}

fn reserve(side: &Side<'_>) -> Result<(), OpsError> {
    side.ops.reserve(&StepLimits {
        max_num_tokens: 128,
        max_num_seqs: 8,
        max_context_len: 512,
        max_width: 512,
        num_heads: 8,
        head_dim: 128,
        max_logit_rows: 8,
        vocab_size: 1000,
        hidden_size: 192,
        num_experts: 8,
        experts_per_token: 3,
        expert_width: 80,
    })
}

fn embed(side: &mut Side<'_>) -> Result<(), OpsError> {
    for (name, format) in formats() {
        let table = matrix(side, format, [101, 192])?;
        let token_ids = side.integers(&[3, 100, 0, 3], [4])?;
        let mut out = side.room([4, 192])?;
        let (out_view, token_ids) = (out.view_mut(), token_ids.view());
        side.ops.embed(EmbedArgs { out: out_view, table: &table, token_ids });
        side.note(format!("from {name}"), &out);
    }
    Ok(())
}

fn norm(side: &mut Side<'_>) -> Result<(), OpsError> {
    for width in [64, 200, 4096] {
        let (x, weight) = (side.activations([5, width])?, side.floats([width])?);
        let mut out = side.room([5, width])?;
        side.ops.norm(NormArgs {
            out: out.view_mut(),
            x: x.view(),
            weight: weight.view(),
            eps: 1e-5,
        });
        side.note(format!("of {width}"), &out);
        let mut residual = side.activations([5, width])?;
        side.ops.add_norm(AddNormArgs {
            out: out.view_mut(),
            residual: residual.view_mut(),
            x: x.view(),
            weight: weight.view(),
            eps: 1e-5,
        });
        side.note(format!("of a sum of {width}"), &out);
        side.note(format!("the sum of {width}"), &residual);
    }
    Ok(())
}

fn layer_norm(side: &mut Side<'_>) -> Result<(), OpsError> {
    for width in [64, 200, 4096] {
        let (x, weight) = (side.activations([5, width])?, side.floats([width])?);
        let (bias, mut residual) = (side.floats([width])?, side.activations([5, width])?);
        for has_residual in [false, true] {
            let mut out = side.room([5, width])?;
            side.ops.layer_norm(LayerNormArgs {
                out: out.view_mut(),
                residual: has_residual.then(|| residual.view_mut()),
                x: x.view(),
                weight: weight.view(),
                bias: Some(bias.view()),
                eps: 1e-5,
            });
            side.note(format!("of {width}, residual {has_residual}"), &out);
        }
        side.note(format!("the sum of {width}"), &residual);
    }
    Ok(())
}

fn rope(side: &mut Side<'_>) -> Result<(), OpsError> {
    for (style, name) in [(RopeStyle::Halves, "halves"), (RopeStyle::Interleaved, "interleaved")] {
        let (mut q, mut k) = (side.activations([5, 4, 64])?, side.activations([5, 2, 64])?);
        let (cos, sin) = (side.floats([40, 24])?, side.floats([40, 24])?);
        let positions = side.integers(&[0, 39, 7, 7, 1], [5])?;
        side.ops.rope(RopeArgs {
            q: q.view_mut(),
            k: k.view_mut(),
            positions: positions.view(),
            cos: cos.view(),
            sin: sin.view(),
            style,
        });
        side.note(format!("{name}, queries"), &q);
        side.note(format!("{name}, keys"), &k);
    }
    Ok(())
}

fn matmul(side: &mut Side<'_>) -> Result<(), OpsError> {
    matmul_of(side, &OTHERS)
}

fn matmul_fp8(side: &mut Side<'_>) -> Result<(), OpsError> {
    matmul_of(side, &[FP8])
}

fn matmul_of(side: &mut Side<'_>, formats: &[Named]) -> Result<(), OpsError> {
    reserve(side)?;
    for &(name, format) in formats {
        let (first, second) = (matrix(side, format, [96, 320])?, matrix(side, format, [40, 320])?);
        let bias = side.floats([40])?;
        for rows in ROWS {
            let x = side.activations([rows, 320])?;
            let (mut out, mut with_bias) = (side.room([rows, 96])?, side.room([rows, 40])?);
            let projections = vec![
                Projection { out: out.view_mut(), weight: &first, bias: None },
                Projection { out: with_bias.view_mut(), weight: &second, bias: Some(bias.view()) },
            ];
            side.ops.matmul(MatmulArgs { x: x.view(), projections });
            side.note(format!("{name}, {rows} rows"), &out);
            side.note(format!("{name}, {rows} rows, a bias"), &with_bias);
        }
    }
    Ok(())
}

fn gated_matmul(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    OTHERS.into_iter().try_for_each(|format| gated_matmul_of(side, format, 7))
}

fn gated_matmul_fp8(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    [7, 70].into_iter().try_for_each(|rows| gated_matmul_of(side, FP8, rows))
}

fn gated_matmul_of(
    side: &mut Side<'_>,
    (name, format): Named,
    rows: usize,
) -> Result<(), OpsError> {
    let (gate, up) = (matrix(side, format, [80, 192])?, matrix(side, format, [80, 192])?);
    let x = side.activations([rows, 192])?;
    let room = || side.room([rows, 80]);
    let (mut out, mut a, mut b) = (room()?, room()?, room()?);
    side.ops.gated_matmul(GatedMatmulArgs {
        out: out.view_mut(),
        x: x.view(),
        gate: (&gate, None),
        up: (&up, None),
        activation: Activation::Silu,
        scratch: [a.view_mut(), b.view_mut()],
    });
    side.note(format!("{name}, {rows} rows"), &out);
    Ok(())
}

/// Tokens choose three of eight experts by themselves.
fn experts(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    for (name, format) in formats() {
        let mut expert = || {
            let (gate, up) = (matrix(side, format, [80, 192])?, matrix(side, format, [80, 192])?);
            Ok(Expert { gate, up, down: matrix(side, format, [192, 80])? })
        };
        let experts = (0..8).map(|_| expert()).collect::<Result<_, OpsError>>()?;
        let experts = side.ops.index_experts(experts)?;
        for rows in ROWS {
            mix(side, &experts, rows, &format!("{name}, {rows} rows"))?;
        }
    }
    Ok(())
}

fn mix(side: &mut Side<'_>, experts: &Experts, rows: usize, case: &str) -> Result<(), OpsError> {
    let (x, logits) = (side.activations([rows, 192])?, side.floats([rows, experts.len()])?);
    let mut expert_ids = side.integers(&vec![0; 3 * rows], [rows, 3])?;
    let mut weights = side.floats([rows, 3])?;
    side.ops.route_experts(RouteExpertsArgs {
        expert_ids: expert_ids.view_mut(),
        weights: weights.view_mut(),
        logits: logits.view(),
        bias: None,
        routing: Routing::Softmax { renormalize: true },
    });
    side.note(format!("{case}, weights"), &weights);
    let mut out = side.room([rows, 192])?;
    let (mut gathered, mut yielded) = (side.room([rows, 192])?, side.room([rows, 192])?);
    let (mut a, mut b, mut c) =
        (side.room([rows, 80])?, side.room([rows, 80])?, side.room([rows, 80])?);
    side.ops.expert_mlp(ExpertMlpArgs {
        out: out.view_mut(),
        x: x.view(),
        experts,
        activation: Activation::Silu,
        expert_ids: expert_ids.view(),
        weights: weights.view(),
        scratch: ExpertScratch {
            gathered: gathered.view_mut(),
            middle: [a.view_mut(), b.view_mut(), c.view_mut()],
            yielded: yielded.view_mut(),
        },
    });
    side.note(case, &out);
    Ok(())
}

const BLOCK_SIZE: usize = 16;
const NUM_BLOCKS: usize = 40;

/// Keys and values of three sequences are written and attended to: a prompt, a chunk after a
/// cached prefix, and a decode step.
fn attention(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    for dtype in [DType::BF16, DType::F16, DType::I8, DType::Fp8] {
        for head_dim in [64, 128] {
            attend(side, dtype, head_dim, None)?;
        }
    }
    attend(side, DType::BF16, 64, Some(21))
}

fn attend(
    side: &mut Side<'_>,
    dtype: DType,
    head_dim: usize,
    sliding_window: Option<usize>,
) -> Result<(), OpsError> {
    let (num_heads, num_kv_heads) = (8, 2);
    let contexts = [33_u32, 50, 200];
    let queries = [33_u32, 9, 1];
    let shape = [NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim];
    let mut k_cache = KvTensor::zeros_on(side.ops, dtype, shape)?;
    let mut v_cache = KvTensor::zeros_on(side.ops, dtype, shape)?;
    // Blocks in descending order, so that a table is needed; the last sequence needs thirteen.
    let width = 13;
    let block = |seq: u32, i: u32| NUM_BLOCKS as u32 - 1 - (seq * width as u32 + i);
    let tables: Vec<u32> =
        (0..3).flat_map(|seq| (0..width as u32).map(move |i| block(seq, i))).collect();
    let slot = |seq: u32, position: u32| {
        block(seq, position / BLOCK_SIZE as u32) * BLOCK_SIZE as u32 + position % BLOCK_SIZE as u32
    };
    let slots: Vec<u32> = (0..3_u32)
        .flat_map(|seq| (0..contexts[seq as usize]).map(move |position| slot(seq, position)))
        .collect();
    let kv_shape = [slots.len(), num_kv_heads, head_dim];
    let (k, v) = (side.activations(kv_shape)?, side.activations(kv_shape)?);
    let slot_mapping = side.integers(&slots, [slots.len()])?;
    side.ops.write_kv(WriteKvArgs {
        k_cache: k_cache.view_mut(),
        v_cache: v_cache.view_mut(),
        k: k.view(),
        v: v.view(),
        slot_mapping: slot_mapping.view(),
    });
    let num_queries = queries.iter().sum::<u32>() as usize;
    let q = side.activations([num_queries, num_heads, head_dim])?;
    let mut out = side.room([num_queries, num_heads, head_dim])?;
    let tables = side.integers(&tables, [3, width])?;
    let cu_seqlens = side.integers(&[0, 33, 42, 43], [4])?;
    let context_lens = side.integers(&contexts, [3])?;
    side.ops.attention(AttentionArgs {
        out: out.view_mut(),
        q: q.view(),
        k_cache: k_cache.view(),
        v_cache: v_cache.view(),
        block_tables: tables.view(),
        cu_seqlens_q: cu_seqlens.view(),
        context_lens: context_lens.view(),
        scale: 1.0 / (head_dim as f32).sqrt(),
        sliding_window,
        softcap: None,
        sinks: None,
    });
    let window = sliding_window.map_or(String::new(), |window| format!(", window {window}"));
    side.note(format!("{dtype} cache, heads of {head_dim}{window}"), &out);
    Ok(())
}

fn copy_blocks(side: &mut Side<'_>) -> Result<(), OpsError> {
    let shape = [6, 2, 8, 64];
    let mut k_cache = KvTensor { data: side.activations(shape)?, scales: None };
    let mut v_cache = KvTensor { data: side.activations(shape)?, scales: None };
    side.ops.copy_blocks(CopyBlocksArgs {
        k_cache: k_cache.view_mut(),
        v_cache: Some(v_cache.view_mut()),
        pairs: &[(0, 3), (5, 1)],
    });
    side.note("keys", &k_cache.data);
    side.note("values", &v_cache.data);
    Ok(())
}

fn gather_rows(side: &mut Side<'_>) -> Result<(), OpsError> {
    let x = side.activations([9, 200])?;
    let rows = side.integers(&[8, 0, 3, 3], [4])?;
    let mut out = side.room([4, 200])?;
    side.ops.gather_rows(GatherRowsArgs { out: out.view_mut(), x: x.view(), rows: rows.view() });
    side.note("four of nine", &out);
    Ok(())
}

/// The chosen tokens and their log-probabilities, as numbers.
fn soft_cap(side: &mut Side<'_>) -> Result<(), OpsError> {
    let mut logits = side.floats([3, 1003])?;
    side.ops.soft_cap(SoftCapArgs { x: logits.view_mut(), cap: 0.5 });
    side.note("by 0.5", &logits);
    Ok(())
}

fn sample(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    let greedy = SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() };
    let random =
        SamplingParams { temperature: 0.7, logprobs: Some(0), ..SamplingParams::default() };
    let narrow = SamplingParams { top_k: 20, top_p: 0.9, ..random.clone() };
    let penalised = SamplingParams { repetition_penalty: 1.3, ..greedy.clone() };
    for (name, params) in [
        ("greedy", &greedy),
        ("random", &random),
        ("top-k, top-p", &narrow),
        ("penalty", &penalised),
    ] {
        let values: Vec<f32> = side.numbers(4 * 1000).into_iter().map(|x| 8.0 * x).collect();
        let mut logits = side.ops.place(Tensor::from_slice(&values, [4, 1000]))?;
        let row = |i: u32| SampleRow {
            task: RowTask::Sample,
            params,
            seed: 7 + u64::from(i),
            position: 11 * i,
            prompt_token_ids: &[1, 2, 3],
            output_token_ids: &[4, 5],
            banned_token_ids: &[],
            bitmask: None,
        };
        let rows: Vec<_> = (0..4).map(row).collect();
        let sampled = side.ops.sample(SampleArgs { logits: logits.view_mut(), rows: &rows });
        let numbers = sampled.iter().flat_map(|token| {
            let logprob = token.logprobs.as_ref().map_or(0.0, |logprobs| logprobs.logprob);
            [token.token_id as f32, logprob]
        });
        side.note_numbers(name, numbers.collect());
    }
    Ok(())
}
