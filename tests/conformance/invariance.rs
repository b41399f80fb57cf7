//! Bit-equality: a row alone and in a batch, a prompt whole and in chunks, one thread and two.

use tokenmill::formats::PackedMatrix;
use tokenmill::ops::Ops;
use tokenmill::ops::args::*;
use tokenmill::tensor::{DType, Tensor, View};

use crate::attention::{Case, Problem, ragged};
use crate::support::*;

pub fn check(ops: &dyn Ops) {
    for (cols, k) in [(1, 1), (5, 17), (63, 65), (130, 100), (33, 1100), (70, 64)] {
        let rng = &mut Rng::new((cols * k) as u64);
        for dtype in FLOATS {
            matmul(ops, &dtype.to_string(), &rng.matrix(dtype, cols, k));
            matmul(
                ops,
                &format!("{dtype}, arranged"),
                &ops.arrange(rng.matrix(dtype, cols, k)).unwrap(),
            );
        }
        for (name, weight) in quantized(rng, cols, k) {
            matmul(ops, name, &weight);
        }
    }
    norm(ops);
    layer_norm(ops);
    attention_in_chunks(ops);
    attention_after_a_long_context(ops);
    capped_attention_in_chunks(ops);
    attention_over_parts(ops);
    attention_over_a_shared_prefix(ops);
    attention_alone(ops);
}

/// Runs one of everything on both backends and compares bits.
pub fn check_equal(one: &dyn Ops, two: &dyn Ops) {
    let rng = &mut Rng::new(3);
    for (rows, cols, k) in [(1, 3000, 256), (16, 515, 1100), (130, 70, 300)] {
        let x = rng.tensor(DType::F32, [rows, k]);
        let mut weights = quantized(rng, cols, k);
        weights.push(("bf16", rng.matrix(DType::BF16, cols, k)));
        weights.push(("bf16, arranged", one.arrange(rng.matrix(DType::BF16, cols, k)).unwrap()));
        for (name, weight) in weights {
            let (a, b) = (multiply(one, x.view(), &weight), multiply(two, x.view(), &weight));
            assert_same(&format!("{} matmul {rows} x {cols} x {k} {name}", two.name()), &a, &b);
        }
    }
    for dtype in CACHES {
        // The last two are few enough for the parts of their contexts to be shared.
        let few = vec![(1, 2500), (2, 1400)];
        for (seqs, window) in [(ragged(), None), (ragged(), Some(40)), (few, None)] {
            let problem = Problem::new(&Case { seqs, ..case(dtype, window) }, 4);
            let (a, b) = (problem.run(one, "one thread"), problem.run(two, "two threads"));
            assert_same(&format!("{} attention {dtype}", two.name()), &a, &b);
        }
    }
}

fn multiply(ops: &dyn Ops, x: View<'_>, weight: &PackedMatrix) -> Vec<f32> {
    let mut out = Guarded::poisoned([x.size(0), weight.num_rows]);
    ops.matmul(MatmulArgs {
        x,
        projections: vec![Projection { out: out.view(), weight, bias: None }],
    });
    out.finish("matmul")
}

/// Every batch size from 1 to 40, and more rows than are kept at once.
fn matmul(ops: &dyn Ops, name: &str, weight: &PackedMatrix) {
    let (cols, k, most) = (weight.num_rows, weight.num_cols, 101);
    let x = Rng::new(k as u64).tensor(DType::F32, [most, k]);
    let alone: Vec<f32> =
        (0..most).flat_map(|row| multiply(ops, x.view().rows(row..row + 1), weight)).collect();
    for rows in (1..=40).chain([96, 97, most]) {
        let what = format!("{} matmul {rows} x {cols} x {k} {name}", ops.name());
        let batched = multiply(ops, x.view().rows(0..rows), weight);
        assert_same(&what, &batched, &alone[..rows * cols]);
    }
}

fn norm(ops: &dyn Ops) {
    let rng = &mut Rng::new(9);
    let (rows, width) = (40, 901);
    let x = rng.tensor(DType::F32, [rows, width]);
    let weight = rng.tensor(DType::BF16, [width]);
    let run = |x: View<'_>| {
        let mut out = Guarded::poisoned(x.shape());
        ops.norm(NormArgs { out: out.view(), x, weight: weight.view(), eps: 1e-6 });
        out.finish("norm")
    };
    let batched = run(x.view());
    for row in 0..rows {
        let alone = run(x.view().rows(row..row + 1));
        let what = format!("{} norm row {row}", ops.name());
        assert_same(&what, &alone, &batched[row * width..(row + 1) * width]);
    }
}

fn layer_norm(ops: &dyn Ops) {
    let rng = &mut Rng::new(19);
    let (rows, width) = (40, 901);
    let (x, residual) = (rng.tensor(DType::F32, [rows, width]), rng.floats(rows * width));
    let (weight, bias) = (rng.tensor(DType::BF16, [width]), rng.tensor(DType::BF16, [width]));
    let run = |x: View<'_>, residual: &[f32]| {
        let (mut out, mut sum) =
            (Guarded::poisoned(x.shape()), Guarded::filled(residual, x.shape()));
        ops.layer_norm(LayerNormArgs {
            out: out.view(),
            residual: Some(sum.view()),
            x,
            weight: weight.view(),
            bias: Some(bias.view()),
            eps: 1e-6,
        });
        out.finish("layer_norm")
    };
    let batched = run(x.view(), &residual);
    for row in 0..rows {
        let part = row * width..(row + 1) * width;
        let alone = run(x.view().rows(row..row + 1), &residual[part.clone()]);
        assert_same(&format!("{} layer_norm row {row}", ops.name()), &alone, &batched[part]);
    }
}

fn case(dtype: DType, window: Option<usize>) -> Case {
    Case { heads: (14, 2), head_dim: 64, block_size: 16, dtype, seqs: ragged(), window }
}

/// A prompt in one piece, in chunks of several sizes, and token by token.
fn attention_in_chunks(ops: &dyn Ops) {
    let caches = [(DType::BF16, None), (DType::F16, Some(50)), (DType::F32, Some(3))];
    for (dtype, window) in caches.into_iter().chain([(DType::I8, None), (DType::Fp8, Some(50))]) {
        for heads in [(14, 2), (4, 4), (4, 1)] {
            let len = 150;
            let seqs = vec![(len, len)];
            let problem = Problem::new(&Case { heads, seqs, ..case(dtype, window) }, 5);
            let whole = problem.run(ops, "whole prompt");
            for chunk in [1, 3, 7, 32, 33, 64, 149] {
                let mut pieces = Vec::new();
                for start in (0..len).step_by(chunk) {
                    let end = len.min(start + chunk);
                    let chunks = [(end - start, end)];
                    let rows = (start, end - start);
                    pieces.extend(problem.run_part(ops, &[0], &chunks, rows, "chunk"));
                }
                let what = format!("{} {heads:?} in chunks of {chunk}, {window:?}", ops.name());
                assert_same(&what, &pieces, &whole);
            }
        }
    }
}

/// Queries around the boundaries of a context's parts: in one piece, in pieces, and as decodes,
/// whose parts are tasks of their own on two threads.
fn attention_over_parts(ops: &dyn Ops) {
    for (dtype, window, has_sinks) in [
        (DType::F32, None, false),
        (DType::F16, Some(1030), true),
        (DType::BF16, None, false),
        (DType::BF16, Some(1030), true),
        (DType::I8, None, true),
    ] {
        let (first, len) = (2020, 60);
        let seqs = vec![(len, first + len)];
        let mut problem = Problem::new(&Case { seqs, ..case(dtype, window) }, 15);
        problem.edit(|position, keys, _| {
            keys.iter_mut().for_each(|key| *key *= (1 + position * 7 % 50) as f32 / 4.0);
        });
        problem.sinks = has_sinks.then(|| Rng::new(16).tensor(DType::F32, [14]));
        let whole = problem.run(ops, "whole");
        for chunk in [1, 2, 29] {
            let mut pieces = Vec::new();
            for start in (0..len).step_by(chunk) {
                let end = len.min(start + chunk);
                let (chunks, rows) = ([(end - start, first + end)], (start, end - start));
                pieces.extend(problem.run_part(ops, &[0], &chunks, rows, "chunk"));
            }
            let what = format!("{} parts in chunks of {chunk}, {dtype} {window:?}", ops.name());
            assert_same(&what, &pieces, &whole);
        }
    }
}

/// Sequences whose tables name the same blocks for what they have in common, or copies of them.
fn attention_over_a_shared_prefix(ops: &dyn Ops) {
    // Prefixes of many parts, of two, and one that only begins alike.
    let few = [(1, 2100), (1, 2049), (2, 2070), (30, 2060), (1, 1030), (1, 1500), (1, 40)];
    let few = few.into_iter().zip([128, 128, 128, 128, 64, 70, 1]).collect::<Vec<_>>();
    // More decodes than a tile has positions, none of which goes on for long after the prefix.
    let many: Vec<_> = (0..40).map(|i| ((1, 513 + i % 16), 32)).collect();
    let dtypes = [
        (DType::F32, None, true),
        (DType::BF16, None, false),
        (DType::I8, Some(1500), true),
        (DType::Fp8, None, true),
    ];
    for (dtype, window, has_sinks) in dtypes {
        for common in [&few, &many] {
            let seqs = common.iter().map(|(seq, _)| *seq).collect();
            let case = Case { block_size: 16, seqs, ..case(dtype, window) };
            let mut problem = Problem::new(&case, 17);
            problem.sinks = has_sinks.then(|| Rng::new(18).tensor(DType::F32, [14]));
            let shared = share_blocks(&mut problem, common.iter().map(|(_, blocks)| *blocks));
            let what =
                format!("{} prefix shared by {}, {dtype} {window:?}", ops.name(), common.len());
            let apart = problem.run(ops, "copies");
            problem.block_tables = shared;
            assert_same(&what, &problem.run(ops, &what), &apart);
        }
    }
}

/// Copies the first blocks of the first sequence, as many as each has in common with it, to all
/// others; the tables that name them instead.
fn share_blocks(problem: &mut Problem, in_common: impl Iterator<Item = usize>) -> Tensor {
    let sizes = problem.block_tables.shape();
    let width = sizes.sizes()[1];
    let own = problem.block_tables.as_slice::<u32>().to_vec();
    let mut shared = own.clone();
    for (seq, blocks) in in_common.enumerate().skip(1) {
        for block in 0..blocks {
            let (source, copy) = (own[block], own[seq * width + block]);
            problem.k_cache.view_mut().copy_block(source, copy);
            problem.v_cache.view_mut().copy_block(source, copy);
            shared[seq * width + block] = source;
        }
    }
    Tensor::from_slice(&shared, sizes.sizes())
}

/// A capped prompt with sinks, whole and in chunks.
fn capped_attention_in_chunks(ops: &dyn Ops) {
    for dtype in CACHES {
        let seqs = vec![(100, 100)];
        let mut problem = Problem::new(&Case { seqs, ..case(dtype, Some(60)) }, 12);
        problem.softcap = Some(2.0);
        problem.sinks = Some(Rng::new(13).tensor(DType::F32, [14]));
        let whole = problem.run(ops, "whole prompt");
        for chunk in [1, 7, 64] {
            let mut pieces = Vec::new();
            for start in (0..100).step_by(chunk) {
                let end = 100.min(start + chunk);
                let rows = (start, end - start);
                pieces.extend(problem.run_part(ops, &[0], &[(end - start, end)], rows, "chunk"));
            }
            assert_same(&format!("{} capped, {dtype}", ops.name()), &pieces, &whole);
        }
    }
}

/// The end of a long prompt in chunks, whose scores raise the running maximum now and then.
fn attention_after_a_long_context(ops: &dyn Ops) {
    let caches = [(8, None, DType::BF16), (16, Some(200), DType::BF16), (32, None, DType::BF16)];
    let codes = [(16, None, DType::I8), (8, Some(200), DType::I8), (16, Some(200), DType::Fp8)];
    for (block_size, window, dtype) in caches.into_iter().chain(codes) {
        let seqs = vec![(90, 600)];
        let mut problem = Problem::new(&Case { block_size, seqs, ..case(dtype, window) }, 10);
        problem.edit(|position, keys, _| {
            keys.iter_mut().for_each(|key| *key *= (1 + position * 7 % 50) as f32);
        });
        let whole = problem.run(ops, "whole");
        for chunk in [1, 5, 31, 64, 89] {
            let mut pieces = Vec::new();
            for start in (0..90).step_by(chunk) {
                let end = 90.min(start + chunk);
                let chunks = [(end - start, 510 + end)];
                let rows = (start, end - start);
                pieces.extend(problem.run_part(ops, &[0], &chunks, rows, "chunk"));
            }
            let what = format!("{} long context in chunks of {chunk}, {window:?}", ops.name());
            assert_same(&what, &pieces, &whole);
        }
    }
}

/// Each sequence of a batch by itself.
fn attention_alone(ops: &dyn Ops) {
    for dtype in CACHES {
        attention_alone_in(ops, dtype);
    }
}

fn attention_alone_in(ops: &dyn Ops, dtype: DType) {
    let problem = Problem::new(&case(dtype, None), 6);
    let batched = problem.run(ops, "batch");
    let row_len = problem.num_heads * problem.head_dim;
    let mut first = 0;
    for (seq, &(queries, context)) in problem.seqs.iter().enumerate() {
        let chunks = [(queries, context)];
        let alone = problem.run_part(ops, &[seq], &chunks, (first, queries), "alone");
        let what = format!("{} sequence {seq} {dtype}", ops.name());
        assert_same(&what, &alone, &batched[first * row_len..(first + queries) * row_len]);
        first += queries;
    }
}
