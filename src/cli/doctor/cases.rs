//! A handful of cases of every operation, in sizes that are no multiples of anything.

use super::attention::attention;
use super::latent::latent_attention;
use super::sampling::{recorded, sample};
use super::verify::{COMPUTED, MOVED, OF_FP8, Side};
use super::weights::{FP8, Named, OTHERS, formats, matrix};
use crate::ops::args::*;
use crate::ops::kv_tensor::KvTensor;
use crate::ops::{OpsError, StepLimits};

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
    ("route_experts", COMPUTED, route_experts),
    ("experts", COMPUTED, experts),
    ("attention", COMPUTED, attention),
    ("latent_attention", COMPUTED, latent_attention),
    ("copy_blocks", MOVED, copy_blocks),
    ("gather_rows", MOVED, gather_rows),
    ("soft_cap", COMPUTED, soft_cap),
    ("sample", MOVED, sample),
    ("recorded", COMPUTED, recorded),
];

/// Rows of activations of products: each kernel of a GPU takes some of them.
const ROWS: [usize; 7] = [1, 4, 8, 13, 40, 130, 300];
/// Rows of activations of experts: decode, a few sequences, a prompt.
const EXPERT_ROWS: [usize; 3] = [1, 7, 70];

/// Room for every case of products and experts.
pub(super) fn reserve(side: &Side<'_>) -> Result<(), OpsError> {
    side.ops.reserve(&StepLimits {
        max_num_tokens: 512,
        max_num_seqs: 8,
        max_context_len: 512,
        max_width: 512,
        num_heads: 8,
        head_dim: 128,
        max_logit_rows: 8,
        vocab_size: 1000,
        hidden_size: 192,
        num_experts: 16,
        experts_per_token: 4,
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

/// Four of sixteen experts, also those of the best two of four groups only.
fn route_experts(side: &mut Side<'_>) -> Result<(), OpsError> {
    reserve(side)?;
    let grouped = |scoring, renormalize| {
        let (num_groups, num_chosen_groups) = (4, 2);
        let scale = 2.5;
        Routing::Grouped(GroupedRouting {
            scoring,
            num_groups,
            num_chosen_groups,
            renormalize,
            scale,
        })
    };
    for (name, routing, has_bias) in [
        ("softmax", Routing::Softmax { renormalize: false }, false),
        ("softmax, renormalized", Routing::Softmax { renormalize: true }, false),
        ("groups by softmax", grouped(Scoring::Softmax, false), false),
        ("groups by sigmoid", grouped(Scoring::Sigmoid, true), false),
        ("groups by sigmoid, a bias", grouped(Scoring::Sigmoid, true), true),
    ] {
        let logits = side.floats([37, 16])?;
        let bias = if has_bias { Some(side.floats([16])?) } else { None };
        let mut expert_ids = side.integers(&[0; 37 * 4], [37, 4])?;
        let mut weights = side.floats([37, 4])?;
        side.ops.route_experts(RouteExpertsArgs {
            expert_ids: expert_ids.view_mut(),
            weights: weights.view_mut(),
            logits: logits.view(),
            bias: bias.as_ref().map(|bias| bias.view()),
            routing,
        });
        side.note(name, &weights);
        side.note(format!("{name}, experts"), &expert_ids);
    }
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
        for rows in EXPERT_ROWS {
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

fn soft_cap(side: &mut Side<'_>) -> Result<(), OpsError> {
    let mut logits = side.floats([3, 1003])?;
    side.ops.soft_cap(SoftCapArgs { x: logits.view_mut(), cap: 0.5 });
    side.note("by 0.5", &logits);
    Ok(())
}
