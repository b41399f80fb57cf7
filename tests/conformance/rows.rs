//! Embedding, norms, rotary embedding, gated activations, KV writes, gathers, block copies.

use tokenmill::formats::{PackedMatrix, dense};
use tokenmill::ops::Ops;
use tokenmill::ops::args::*;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::tensor::{DType, Tensor};

use crate::support::*;

const ROWS: [usize; 6] = [1, 2, 15, 16, 17, 33];
const WIDTHS: [usize; 6] = [1, 7, 16, 63, 65, 896];

pub fn check(ops: &dyn Ops) {
    let num_rows = if wants_few_cases() { 2 } else { ROWS.len() };
    for (seed, rows) in ROWS.into_iter().rev().take(num_rows).enumerate() {
        for width in WIDTHS {
            let rng = &mut Rng::new((seed * 1000 + width) as u64);
            for dtype in FLOATS {
                embed(ops, rng, (rows, width), dtype);
                norms(ops, rng, (rows, width), dtype);
                layer_norms(ops, rng, (rows, width), dtype);
            }
            embed_packed(ops, rng, (rows, width));
            gated_activation(ops, rng, (rows, width));
            gather_rows(ops, rng, (rows, width));
            soft_cap(ops, rng, (rows, width));
        }
        let rng = &mut Rng::new(seed as u64);
        for head_dim in [32, 64, 80, 96, 128, 256] {
            rope(ops, rng, rows, head_dim);
            for &dtype in caches(ops) {
                kv_writes_and_copies(ops, rng, rows, head_dim, dtype);
                for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
                    rope_and_kv_writes(ops, rng, [rows, head_dim], dtype, style);
                }
            }
        }
    }
}

/// Runs on the backend under test and on the referee.
fn both(ops: &dyn Ops, run: impl Fn(&dyn Ops) -> Vec<f32>) -> (Vec<f32>, Vec<f32>) {
    (run(ops), run(&ReferenceOps))
}

fn embed(ops: &dyn Ops, rng: &mut Rng, (rows, width): (usize, usize), dtype: DType) {
    let what = format!("{} embed {rows} x {width} {dtype}", ops.name());
    let table = rng.matrix(dtype, 50, width);
    // The referee reads the rows as they were, the backend as it arranges them at load.
    let arranged = ops.arrange(dense::pack(table.data.to_owned_memory())).unwrap();
    let token_ids = ids(&(0..rows).map(|_| rng.below(50) as u32).collect::<Vec<_>>());
    let run = |ops: &dyn Ops, table: &PackedMatrix| {
        let mut out = Guarded::poisoned([rows, width]);
        ops.embed(EmbedArgs { out: out.view(), table, token_ids: token_ids.view() });
        out.finish(&what)
    };
    assert_outputs(ops, &what, &run(ops, &arranged), &run(&ReferenceOps, &table), (0.0, 0.0));
}

/// Tables in every packed format; a product of code and scale is rounded once.
fn embed_packed(ops: &dyn Ops, rng: &mut Rng, (rows, width): (usize, usize)) {
    let vocab = 50;
    let mut tables = quantized(rng, vocab, width);
    let in_blocks = dense::into_blocks(rng.matrix(DType::BF16, vocab, width), 1);
    tables.push(("bf16 in blocks", in_blocks));
    let token_ids = ids(&(0..rows).map(|_| rng.below(vocab) as u32).collect::<Vec<_>>());
    for (name, table) in &tables {
        let what = format!("{} embed {rows} x {width} {name}", ops.name());
        let (got, want) = both(ops, |ops| {
            let mut out = Guarded::poisoned([rows, width]);
            ops.embed(EmbedArgs { out: out.view(), table, token_ids: token_ids.view() });
            out.finish(&what)
        });
        assert_outputs(ops, &what, &got, &want, (0.0, 0.0));
    }
}

fn norms(ops: &dyn Ops, rng: &mut Rng, (rows, width): (usize, usize), dtype: DType) {
    let what = format!("{} norm {rows} x {width} {dtype}", ops.name());
    let x = rng.activations(ops, [rows, width]);
    let residual = as_activations(ops, &rng.floats(rows * width));
    let weight = rng.tensor(dtype, [width]);
    let (got, want) = both(ops, |ops| {
        let mut out = Guarded::poisoned([rows, width]);
        let (x, weight) = (x.view(), weight.view());
        ops.norm(NormArgs { out: out.view(), x, weight, eps: 1e-6 });
        out.finish(&what)
    });
    // f32 sums of squares against f64: a relative error of a few units in the last place.
    assert_outputs(ops, &what, &got, &want, (1e-6, 4e-6));
    let (got, want) = both(ops, |ops| {
        let mut out = Guarded::poisoned([rows, width]);
        let mut sum = Guarded::filled(&residual, [rows, width]);
        let (x, weight) = (x.view(), weight.view());
        ops.add_norm(AddNormArgs { out: out.view(), residual: sum.view(), x, weight, eps: 1e-5 });
        let mut both = sum.finish(&what);
        both.extend(out.finish(&what));
        both
    });
    let (sum, out) = got.split_at(rows * width);
    assert_outputs(ops, &what, sum, &want[..rows * width], (0.0, 0.0));
    assert_outputs(ops, &what, out, &want[rows * width..], (1e-6, 4e-6));
}

/// Rows around 0 and far from it, with and without a bias and a residual.
fn layer_norms(ops: &dyn Ops, rng: &mut Rng, (rows, width): (usize, usize), dtype: DType) {
    let (weight, bias) = (rng.tensor(dtype, [width]), rng.tensor(dtype, [width]));
    let residual = as_activations(ops, &rng.floats(rows * width));
    // f32 sums against f64, of numbers that are divided by a deviation above a quarter of the
    // largest: a relative error of a few units in the last place. A large mean is off by its own
    // last place, which the division makes up to four times as large; variances that cancelled
    // would be off by a hundred times as much.
    for (mean, tolerance) in [(0.0, (2e-6, 4e-6)), (100.0, (1e-4, 4e-6))] {
        let x: Vec<f32> = rng.floats(rows * width).iter().map(|x| mean + x).collect();
        let x = Tensor::from_slice(&as_activations(ops, &x), [rows, width]);
        for (has_bias, has_residual) in [(false, false), (true, false), (false, true), (true, true)]
        {
            let what = format!(
                "{} layer_norm {rows} x {width} {dtype} around {mean}, bias {has_bias}, residual \
                 {has_residual}",
                ops.name()
            );
            let (got, want) = both(ops, |ops| {
                let mut out = Guarded::poisoned([rows, width]);
                let mut sum = Guarded::filled(&residual, [rows, width]);
                ops.layer_norm(LayerNormArgs {
                    out: out.view(),
                    residual: has_residual.then(|| sum.view()),
                    x: x.view(),
                    weight: weight.view(),
                    bias: has_bias.then(|| bias.view()),
                    eps: 1e-5,
                });
                let mut both = sum.finish(&what);
                both.extend(out.finish(&what));
                both
            });
            let (sum, out) = got.split_at(rows * width);
            assert_outputs(ops, &what, sum, &want[..rows * width], (0.0, 0.0));
            assert_outputs(ops, &what, out, &want[rows * width..], tolerance);
        }
    }
}

fn gated_activation(ops: &dyn Ops, rng: &mut Rng, (rows, width): (usize, usize)) {
    let wide: Vec<f32> = rng.floats(rows * width).iter().map(|x| 12.0 * x).collect();
    let gate = Tensor::from_slice(&as_activations(ops, &wide), [rows, width]);
    let up = rng.activations(ops, [rows, width]);
    for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
        let what = format!("{} {activation:?} {rows} x {width}", ops.name());
        let (got, want) = both(ops, |ops| {
            let mut out = Guarded::poisoned([rows, width]);
            let (gate, up) = (gate.view(), up.view());
            ops.gated_activation(GatedActivationArgs { out: out.view(), gate, up, activation });
            out.finish(&what)
        });
        // GELU subtracts nearly equal numbers where it is small, hence the absolute part.
        assert_outputs(ops, &what, &got, &want, (2e-6, 2e-6));
    }
}

/// From far below the cap to far beyond it.
fn soft_cap(ops: &dyn Ops, rng: &mut Rng, (rows, width): (usize, usize)) {
    let mut x = rng.floats(rows * width);
    for (i, x) in x.iter_mut().enumerate() {
        *x *= 10f32.powi((i % 9) as i32 - 4);
    }
    for cap in [1.0, 30.0] {
        let what = format!("{} soft_cap {rows} x {width} by {cap}", ops.name());
        let (got, want) = both(ops, |ops| {
            let mut capped = Guarded::filled(&x, [rows, width]);
            ops.soft_cap(SoftCapArgs { x: capped.view(), cap });
            capped.finish(&what)
        });
        // A tanh of 4 units in the last place and two products; logits are f32 on every device.
        assert_close(&what, &got, &want, (0.0, 1e-6));
    }
}

fn gather_rows(ops: &dyn Ops, rng: &mut Rng, (rows, width): (usize, usize)) {
    let what = format!("{} gather_rows {rows} x {width}", ops.name());
    let x = rng.activations(ops, [rows, width]);
    let wanted = ids(&(0..rows + 3).map(|_| rng.below(rows) as u32).collect::<Vec<_>>());
    let (got, want) = both(ops, |ops| {
        let mut out = Guarded::poisoned([rows + 3, width]);
        ops.gather_rows(GatherRowsArgs { out: out.view(), x: x.view(), rows: wanted.view() });
        out.finish(&what)
    });
    assert_same(&what, &got, &want);
}

fn rope(ops: &dyn Ops, rng: &mut Rng, tokens: usize, head_dim: usize) {
    let positions = ids(&(0..tokens).map(|_| rng.below(100) as u32).collect::<Vec<_>>());
    for rotary_dim in [head_dim, head_dim / 2, 2] {
        let (cos, sin) = (
            rng.tensor(DType::F32, [100, rotary_dim / 2]),
            rng.tensor(DType::F32, [100, rotary_dim / 2]),
        );
        let mut heads = |count: usize| as_activations(ops, &rng.floats(tokens * count * head_dim));
        let (q, k) = (heads(4), heads(2));
        for style in [RopeStyle::Halves, RopeStyle::Interleaved] {
            let what = format!("{} rope {tokens} x {head_dim} {rotary_dim} {style:?}", ops.name());
            let (got, want) = both(ops, |ops| {
                let mut q = Guarded::filled(&q, [tokens, 4, head_dim]);
                let mut k = Guarded::filled(&k, [tokens, 2, head_dim]);
                let (cos, sin, positions) = (cos.view(), sin.view(), positions.view());
                let (q_view, k_view) = (q.view(), k.view());
                ops.rope(RopeArgs { q: q_view, k: k_view, positions, cos, sin, style });
                let mut both = q.finish(&what);
                both.extend(k.finish(&what));
                both
            });
            // One rounding more or less, of products below 1.
            assert_outputs(ops, &what, &got, &want, (2e-7, 0.0));
        }
    }
}

fn kv_writes_and_copies(
    ops: &dyn Ops,
    rng: &mut Rng,
    tokens: usize,
    head_dim: usize,
    dtype: DType,
) {
    let heads = 2;
    for block_size in [8, 16, 32] {
        let what = format!("{} write_kv {tokens} x {head_dim} {block_size} {dtype}", ops.name());
        let num_blocks = tokens.div_ceil(block_size) + 2;
        let mut slots = rng.permutation((num_blocks - 1) * block_size);
        slots.truncate(tokens);
        let slots = ids(&slots);
        // From far below what FP8 can tell from 0 to beyond what it can hold.
        let mut values = || {
            let mut values = rng.floats(tokens * heads * head_dim);
            for (i, x) in values.iter_mut().enumerate() {
                *x *= 2f32.powi((i % 24) as i32 - 12);
            }
            Tensor::from_slice(&as_activations(ops, &values), [tokens, heads, head_dim])
        };
        let (k, v) = (values(), values());
        let old = rng.floats(num_blocks * heads * block_size * head_dim);
        let run = |ops: &dyn Ops| {
            let shape = [num_blocks, heads, block_size, head_dim];
            let (mut k_cache, mut v_cache) =
                (cast_cache(&old, dtype, shape), cast_cache(&old, dtype, shape));
            ops.write_kv(WriteKvArgs {
                k_cache: k_cache.view_mut(),
                v_cache: v_cache.view_mut(),
                k: k.view(),
                v: v.view(),
                slot_mapping: slots.view(),
            });
            ops.copy_blocks(CopyBlocksArgs {
                k_cache: k_cache.view_mut(),
                v_cache: Some(v_cache.view_mut()),
                pairs: &[(0, num_blocks as u32 - 1)],
            });
            let tensors = [Some(k_cache.data), k_cache.scales, Some(v_cache.data), v_cache.scales];
            tensors.map(|tensor| tensor.map_or(Vec::new(), |tensor| tensor.bytes().to_vec()))
        };
        assert!(run(ops) == run(&ReferenceOps), "{what}");
    }
}

/// Rotating and storing at once equals both one after the other, bit for bit.
fn rope_and_kv_writes(
    ops: &dyn Ops,
    rng: &mut Rng,
    [tokens, head_dim]: [usize; 2],
    dtype: DType,
    style: RopeStyle,
) {
    const BLOCK_SIZE: usize = 16;
    let what = format!("{} rope {style:?} and write_kv {tokens} x {head_dim} {dtype}", ops.name());
    let mut heads = |count: usize| as_activations(ops, &rng.floats(tokens * count * head_dim));
    let (q, k, v) = (heads(4), heads(2), heads(2));
    let v = Tensor::from_slice(&v, [tokens, 2, head_dim]);
    let positions = ids(&(0..tokens).map(|_| rng.below(100) as u32).collect::<Vec<_>>());
    let angles = [0, 1].map(|_| rng.tensor(DType::F32, [100, head_dim / 4]));
    let num_blocks = tokens.div_ceil(BLOCK_SIZE) + 1;
    let mut slots = rng.permutation(num_blocks * BLOCK_SIZE);
    slots.truncate(tokens);
    let slots = ids(&slots);
    let old = rng.floats(num_blocks * 2 * BLOCK_SIZE * head_dim);
    let run = |in_steps: bool| {
        let mut q = Guarded::filled(&q, [tokens, 4, head_dim]);
        let mut k = Guarded::filled(&k, [tokens, 2, head_dim]);
        let shape = [num_blocks, 2, BLOCK_SIZE, head_dim];
        let (mut k_cache, mut v_cache) =
            (cast_cache(&old, dtype, shape), cast_cache(&old, dtype, shape));
        let args = RopeKvArgs {
            rope: RopeArgs {
                q: q.view(),
                k: k.view(),
                positions: positions.view(),
                cos: angles[0].view(),
                sin: angles[1].view(),
                style,
            },
            v: v.view(),
            k_cache: k_cache.view_mut(),
            v_cache: v_cache.view_mut(),
            slot_mapping: slots.view(),
        };
        if in_steps {
            args.in_steps(ops);
        } else {
            ops.rope_and_write_kv(args);
        }
        let tensors = [Some(k_cache.data), k_cache.scales, Some(v_cache.data), v_cache.scales];
        let stored = tensors.map(|tensor| tensor.map_or(Vec::new(), |t| t.bytes().to_vec()));
        let mut rotated = q.finish(&what);
        rotated.extend(k.finish(&what));
        (rotated, stored)
    };
    let (at_once, in_steps) = (run(false), run(true));
    assert_same(&what, &at_once.0, &in_steps.0);
    assert!(at_once.1 == in_steps.1, "{what}");
}
