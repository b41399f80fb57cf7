//! The CUDA attention kernels: against the referee, and their bits however work is cut.

use tokenmill::ops::args::AttentionArgs;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::ops::{Ops, StepLimits};
use tokenmill::tensor::{DType, Tensor};

use crate::attention::{Case, Problem, ragged};
use crate::support::*;

/// What a device's cache may hold.
const DTYPES: [DType; 4] = [DType::BF16, DType::F16, DType::I8, DType::Fp8];

/// Room for partial results of every step below.
fn limits() -> StepLimits {
    StepLimits {
        max_num_tokens: 512,
        max_num_seqs: 8,
        max_context_len: 4096,
        max_width: 1024,
        num_heads: 16,
        head_dim: 128,
        max_logit_rows: 1,
        vocab_size: 1,
        hidden_size: 0,
        num_experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    }
}

/// Weighted means of values below 1, whose weights (with INT8, their products with a scale) are
/// rounded to bf16 or, beside a cache of f16 or FP8, to f16: at most 2^-8 or 2^-11 of each. Weights
/// below 2^-14 have fewer digits in f16.
fn tolerance(dtype: DType) -> (f32, f32) {
    if matches!(dtype, DType::F16 | DType::Fp8) { (6e-4, 0.0) } else { (4e-3, 0.0) }
}

fn rounded(case: &Case, seed: u64, size: f32) -> Problem {
    let mut problem = Problem::new(case, seed);
    let values: Vec<f32> = problem.q.as_slice::<f32>().iter().map(|x| x * size).collect();
    let shape = problem.q.shape();
    problem.q = Tensor::from_slice(&widened(&cast(&values, DType::BF16, shape)), shape);
    problem
}

fn assert_agrees(ops: &dyn Ops, problem: &Problem, case: &Case, what: &str) {
    let Case { heads, head_dim, block_size, dtype, window, .. } = case;
    let what = format!(
        "{}: attention {heads:?} x {head_dim}, blocks of {block_size} {dtype}, {window:?}, {what}",
        ops.name()
    );
    let want = problem.run(&ReferenceOps, &what);
    assert_outputs(ops, &what, &problem.run(ops, &what), &want, tolerance(*dtype));
}

/// Compares with the referee.
pub fn check(ops: &dyn Ops) {
    ops.reserve(&limits()).unwrap();
    if wants_few_cases() {
        return every_kernel(ops);
    }
    head_sizes(ops);
    windows(ops);
    long_contexts(ops);
    caps_and_sinks(ops);
    rising_scores(ops);
    hidden_positions_have_no_influence(ops);
}

/// Every kernel once: a prompt and a chunk of one, which fill tiles and leave tails, and decodes.
/// Then a context that CTAs share.
fn every_kernel(ops: &dyn Ops) {
    for (i, head_dim) in [48, 80, 128, 256].into_iter().enumerate() {
        for dtype in DTYPES {
            let (block_size, heads) = ([8, 16, 32][i % 3], [(4, 2), (14, 2)][i % 2]);
            let seqs = vec![(20, 20), (1, 33), (17, 90)];
            let case = Case { heads, head_dim, block_size, dtype, seqs, window: None };
            assert_agrees(ops, &rounded(&case, i as u64, 1.0), &case, "few cases");
        }
    }
    let (heads, dtype, seqs) = ((4, 1), DType::BF16, vec![(1, 600)]);
    let case = Case { heads, head_dim: 64, block_size: 16, dtype, seqs, window: Some(500) };
    assert_agrees(ops, &rounded(&case, 9, 1.0), &case, "few cases");
}

/// Every kernel; block sizes and groups take turns.
fn head_sizes(ops: &dyn Ops) {
    let block_sizes = [8, 16, 32];
    let groups = [(4, 1), (14, 2), (3, 3)];
    for (i, head_dim) in [32, 64, 80, 96, 112, 128, 192, 256].into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let (block_size, heads) = (block_sizes[(i + j) % 3], groups[(i + 2 * j) % 3]);
            let seqs = ragged();
            let case = Case { heads, head_dim, block_size, dtype, seqs, window: None };
            assert_agrees(ops, &rounded(&case, (i * 4 + j) as u64, 1.0), &case, "ragged");
        }
    }
    // More rows of one query than a tile has, so that no sequence is too long for decode.
    for dtype in DTYPES {
        let seqs = vec![(1, 70), (3, 40), (1, 1)];
        let case = Case { heads: (70, 1), head_dim: 16, block_size: 16, dtype, seqs, window: None };
        assert_agrees(ops, &rounded(&case, 77, 1.0), &case, "a large group");
    }
}

fn windows(ops: &dyn Ops) {
    for (i, window) in [1, 7, 16, 33, 64, 1000].into_iter().enumerate() {
        for dtype in [DTYPES[i % 4], DTYPES[(i + 1) % 4]] {
            let (heads, seqs) = ((4, 2), ragged());
            let case =
                Case { heads, head_dim: 64, block_size: 16, dtype, seqs, window: Some(window) };
            assert_agrees(ops, &rounded(&case, i as u64, 1.0), &case, "windows");
        }
    }
}

/// Several tiles and parts: prompts, chunks of them, decodes alone and with few others, for which
/// CTAs share contexts.
fn long_contexts(ops: &dyn Ops) {
    let steps = [
        vec![(1, 300), (150, 150), (40, 513), (3, 129), (1, 256)],
        vec![(1, 3100), (1, 257), (1, 1024)],
        vec![(1, 1025), (4, 2049)],
        vec![(40, 1060)],
    ];
    for (i, seqs) in steps.into_iter().enumerate() {
        for (j, window) in [None, Some(300 + 200 * i)].into_iter().enumerate() {
            let (heads, dtype) = ([(14, 2), (4, 1)][j], DTYPES[(i + 2 * j) % 4]);
            let case =
                Case { heads, head_dim: 64, block_size: 8, dtype, seqs: seqs.clone(), window };
            assert_agrees(ops, &rounded(&case, i as u64, 1.0), &case, "long contexts");
        }
    }
    let seqs = vec![(1, 700), (33, 290)];
    for (head_dim, dtype) in [(128, DType::BF16), (256, DType::I8), (96, DType::Fp8)] {
        let case = Case {
            heads: (4, 2),
            head_dim,
            block_size: 32,
            dtype,
            seqs: seqs.clone(),
            window: None,
        };
        assert_agrees(ops, &rounded(&case, 5, 1.0), &case, "long contexts");
    }
}

/// Scores of up to ±20 under a cap, and sinks from far below them to far above.
fn caps_and_sinks(ops: &dyn Ops) {
    let sinks = [-100.0, -20.0, -1.0, 0.0, 0.5, 3.0, 12.0, 19.0, 25.0, 60.0, f32::NEG_INFINITY];
    let cases = [
        (Some(5.0), false, None),
        (Some(50.0), false, Some(40)),
        (None, true, None),
        (None, true, Some(7)),
        (Some(30.0), true, Some(129)),
    ];
    for (i, (softcap, has_sinks, window)) in cases.into_iter().enumerate() {
        for (heads, head_dim) in [((14, 2), 64), ((22, 1), 32)] {
            let (mut seqs, dtype) = (ragged(), DTYPES[i % 4]);
            seqs.push((40, 300));
            let case = Case { heads, head_dim, block_size: 16, dtype, seqs, window };
            let mut problem = rounded(&case, 20 + i as u64, 10.0);
            problem.softcap = softcap;
            let sinks: Vec<f32> = sinks.into_iter().cycle().take(heads.0).collect();
            problem.sinks = has_sinks.then(|| Tensor::from_slice(&sinks, [heads.0]));
            let what = format!("cap {softcap:?}, sinks {has_sinks}");
            assert_agrees(ops, &problem, &case, &what);
        }
    }
}

/// Scores between -40 and 40 in an order that raises a running maximum often, and by much.
fn rising_scores(ops: &dyn Ops) {
    for (dtype, step) in [(DType::BF16, 1), (DType::I8, 37), (DType::F16, 399)] {
        let seqs = vec![(50, 400)];
        let case = Case { heads: (4, 2), head_dim: 64, block_size: 16, dtype, seqs, window: None };
        let mut problem = rounded(&case, 8, 1.0);
        problem.edit(|position, keys, _| {
            let size = (position * step % 400) as f32 / 200.0 - 1.0;
            for (i, key) in keys.iter_mut().enumerate() {
                *key = if i % 3 == 0 { 60.0 * size } else { -60.0 * size };
            }
        });
        assert_agrees(ops, &problem, &case, "rising scores");
    }
}

/// Keys and values that a query cannot see change none of its bits, however large they are.
fn hidden_positions_have_no_influence(ops: &dyn Ops) {
    for (dtype, window) in
        [(DType::BF16, None), (DType::BF16, Some(40)), (DType::I8, Some(40)), (DType::Fp8, None)]
    {
        let (heads, seqs) = ((4, 2), vec![(70, 300)]);
        let case = Case { heads, head_dim: 64, block_size: 8, dtype, seqs, window };
        let what = format!("{}: hidden positions, {dtype} {window:?}", ops.name());
        let plain = rounded(&case, 7, 1.0).run(ops, &what);
        let run_with_huge = |is_huge: &dyn Fn(usize) -> bool| {
            let mut problem = rounded(&case, 7, 1.0);
            problem.edit(|position, keys, values| {
                if is_huge(position) {
                    keys.fill(1e30);
                    values.fill(-1e30);
                }
            });
            problem.run(ops, &what)
        };
        // Queries are at positions 230..300.
        let row_len = heads.0 * case.head_dim;
        let later = run_with_huge(&|position| position >= 250);
        assert_same(&what, &later[..20 * row_len], &plain[..20 * row_len]);
        if let Some(window) = window {
            let earlier = run_with_huge(&|position| position + window <= 250);
            assert_same(&what, &earlier[20 * row_len..], &plain[20 * row_len..]);
        }
    }
}

/// The same bits in any batch, in any chunks (those of few queries are computed by other kernels),
/// and whether or not CTAs share contexts. `sharing` gets room for that, `alone` does not.
pub fn check_invariance(sharing: &dyn Ops, alone: &dyn Ops) {
    sharing.reserve(&limits()).unwrap();
    for (dtype, head_dim, heads, window, softcap) in [
        (DType::BF16, 64, (14, 2), None, None),
        (DType::F16, 32, (4, 4), Some(300), None),
        (DType::I8, 80, (4, 1), None, Some(2.0)),
        (DType::Fp8, 128, (4, 2), Some(50), None),
        (DType::BF16, 256, (4, 2), None, None),
    ] {
        // Chunks around the boundary of the second and the third part.
        let (first, len) = (490, 60);
        let seqs = vec![(len, first + len), (1, 900), (5, 40), (20, 20)];
        let case = Case { heads, head_dim, block_size: 16, dtype, seqs, window };
        let mut problem = rounded(&case, 15, 1.0);
        problem.edit(|position, keys, _| {
            keys.iter_mut().for_each(|key| *key *= (1 + position * 7 % 50) as f32 / 4.0);
        });
        problem.softcap = softcap;
        problem.sinks = Some(Rng::new(16).tensor(DType::F32, [heads.0]));
        let what = format!("{}: {dtype} {heads:?} x {head_dim}, {window:?}", sharing.name());
        let whole = problem.run(sharing, &what);
        assert_same(&format!("{what}, without room"), &problem.run(alone, &what), &whole);
        let row_len = heads.0 * head_dim;
        for chunk in [1, 2, 29, 60] {
            for start in (0..len).step_by(chunk).step_by(if chunk < 29 { 7 } else { 1 }) {
                let end = len.min(start + chunk);
                let (chunks, rows) = ([(end - start, first + end)], (start, end - start));
                let what = format!("{what}, queries {start}..{end}");
                let piece = problem.run_part(sharing, &[0], &chunks, rows, &what);
                assert_same(&what, &piece, &whole[start * row_len..end * row_len]);
            }
        }
        let mut first_row = len;
        for (seq, &(queries, context)) in problem.seqs.iter().enumerate().skip(1) {
            let rows = (first_row, queries);
            let what = format!("{what}, sequence {seq} alone");
            let piece = problem.run_part(sharing, &[seq], &[(queries, context)], rows, &what);
            first_row += queries;
            assert_same(&what, &piece, &whole[(first_row - queries) * row_len..][..piece.len()]);
        }
    }
}

/// Sequences without a context, as padding may have them, yield zeros.
pub fn check_empty_contexts(ops: &dyn Ops) {
    let case = Case {
        heads: (4, 2),
        head_dim: 64,
        block_size: 16,
        dtype: DType::BF16,
        seqs: vec![(1, 1)],
        window: None,
    };
    let problem = rounded(&case, 1, 1.0);
    for sinks in [None, Some(Tensor::zeros(DType::F32, [4]))] {
        let mut out = Guarded::poisoned([1, 4, 64]);
        ops.attention(AttentionArgs {
            out: out.view(),
            q: problem.q.view(),
            k_cache: problem.k_cache.view(),
            v_cache: problem.v_cache.view(),
            block_tables: problem.block_tables.view(),
            cu_seqlens_q: ids(&[0, 1]).view(),
            context_lens: ids(&[0]).view(),
            scale: 1.0,
            sliding_window: None,
            softcap: None,
            sinks: sinks.as_ref().map(Tensor::view),
        });
        assert_eq!(out.finish("an empty context"), vec![0.0; 256], "{}", ops.name());
    }
}
