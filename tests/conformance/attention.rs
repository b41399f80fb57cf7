//! Paged attention: head sizes, groups, block sizes, windows, cache dtypes, ragged batches.

use tokenmill::ops::Ops;
use tokenmill::ops::args::AttentionArgs;
use tokenmill::ops::cpu::CpuOps;
use tokenmill::ops::kv_tensor::KvTensor;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::tensor::{DType, Tensor};

use crate::support::*;

/// A ragged batch over a paged cache.
pub struct Problem {
    pub num_heads: usize,
    pub head_dim: usize,
    /// `(queries, context)` per sequence.
    pub seqs: Vec<(usize, usize)>,
    pub window: Option<usize>,
    pub softcap: Option<f32>,
    pub sinks: Option<Tensor>,
    pub q: Tensor,
    pub k_cache: KvTensor,
    pub v_cache: KvTensor,
    pub block_tables: Tensor,
    /// What the caches were made of.
    k: Vec<f32>,
    v: Vec<f32>,
}

pub struct Case {
    pub heads: (usize, usize),
    pub head_dim: usize,
    pub block_size: usize,
    pub dtype: DType,
    pub seqs: Vec<(usize, usize)>,
    pub window: Option<usize>,
}

impl Problem {
    /// Random queries, keys and values; slots and table entries of no token are poisoned. Tables
    /// are as wide as the longest context needs.
    pub fn new(case: &Case, seed: u64) -> Problem {
        let Case { heads: (num_heads, num_kv_heads), head_dim, block_size, dtype, .. } = *case;
        let rng = &mut Rng::new(seed);
        let num_blocks = |context: usize| context.div_ceil(block_size);
        let total: usize = case.seqs.iter().map(|seq| num_blocks(seq.1)).sum();
        let width = case.seqs.iter().map(|seq| num_blocks(seq.1)).max().unwrap();
        let mut free = rng.permutation(total);
        let shape = [total, num_kv_heads, block_size, head_dim];
        let len = shape.iter().product();
        let (mut k, mut v) = (vec![f32::NAN; len], vec![f32::NAN; len]);
        let mut tables = vec![u32::MAX; case.seqs.len() * width];
        for (seq, &(_, context)) in case.seqs.iter().enumerate() {
            for position in 0..context {
                let entry = &mut tables[seq * width + position / block_size];
                if position % block_size == 0 {
                    *entry = free.pop().unwrap();
                }
                for head in 0..num_kv_heads {
                    let row = (*entry as usize * num_kv_heads + head) * block_size;
                    let at = (row + position % block_size) * head_dim;
                    k[at..at + head_dim].copy_from_slice(&rng.floats(head_dim));
                    v[at..at + head_dim].copy_from_slice(&rng.floats(head_dim));
                }
            }
        }
        let num_tokens: usize = case.seqs.iter().map(|seq| seq.0).sum();
        Problem {
            num_heads,
            head_dim,
            seqs: case.seqs.clone(),
            window: case.window,
            softcap: None,
            sinks: None,
            q: rng.tensor(DType::F32, [num_tokens, num_heads, head_dim]),
            k_cache: cast_cache(&k, dtype, shape),
            v_cache: cast_cache(&v, dtype, shape),
            block_tables: Tensor::from_slice(&tables, [case.seqs.len(), width]),
            k,
            v,
        }
    }

    /// Changes keys and values of the first sequence: `edit` gets a position, its keys and its
    /// values in one head.
    pub fn edit(&mut self, mut edit: impl FnMut(usize, &mut [f32], &mut [f32])) {
        let shape: [usize; 4] = self.k_cache.data.shape().sizes().try_into().unwrap();
        let [_, num_kv_heads, block_size, head_dim] = shape;
        let table = self.block_tables.view().rows(0..1).as_slice::<u32>();
        for position in 0..self.seqs[0].1 {
            for head in 0..num_kv_heads {
                let block = table[position / block_size] as usize;
                let row = (block * num_kv_heads + head) * block_size + position % block_size;
                let at = row * head_dim..(row + 1) * head_dim;
                edit(position, &mut self.k[at.clone()], &mut self.v[at]);
            }
        }
        let dtype = self.k_cache.data.dtype();
        self.k_cache = cast_cache(&self.k, dtype, shape);
        self.v_cache = cast_cache(&self.v, dtype, shape);
    }

    /// Attention of all queries.
    pub fn run(&self, ops: &dyn Ops, what: &str) -> Vec<f32> {
        let seqs: Vec<usize> = (0..self.seqs.len()).collect();
        let num_tokens = self.q.shape().sizes()[0];
        self.run_part(ops, &seqs, &self.seqs, (0, num_tokens), what)
    }

    /// Attention of rows `first_row..` of q as a batch of `chunks` of the given sequences.
    pub fn run_part(
        &self,
        ops: &dyn Ops,
        seqs: &[usize],
        chunks: &[(usize, usize)],
        (first_row, num_rows): (usize, usize),
        what: &str,
    ) -> Vec<f32> {
        let mut out = Guarded::poisoned([num_rows, self.num_heads, self.head_dim]);
        let mut cu_seqlens = vec![0];
        for &(queries, _) in chunks {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + queries as u32);
        }
        let contexts: Vec<u32> = chunks.iter().map(|chunk| chunk.1 as u32).collect();
        let width = self.block_tables.shape().sizes()[1];
        let tables: Vec<u32> = seqs
            .iter()
            .flat_map(|&seq| self.block_tables.view().rows(seq..seq + 1).as_slice::<u32>().to_vec())
            .collect();
        ops.attention(AttentionArgs {
            out: out.view(),
            q: self.q.view().rows(first_row..first_row + num_rows),
            k_cache: self.k_cache.view(),
            v_cache: self.v_cache.view(),
            block_tables: Tensor::from_slice(&tables, [seqs.len(), width]).view(),
            cu_seqlens_q: ids(&cu_seqlens).view(),
            context_lens: ids(&contexts).view(),
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            sliding_window: self.window,
            softcap: self.softcap,
            sinks: self.sinks.as_ref().map(Tensor::view),
        });
        out.finish(what)
    }
}

/// Fresh prompts, a continued prompt, decodes, and lengths around block and tile boundaries.
pub fn ragged() -> Vec<(usize, usize)> {
    vec![(17, 17), (1, 1), (1, 33), (5, 40), (33, 65), (1, 100), (2, 32), (16, 31)]
}

/// Weighted means of values below 1. Weights of f32 carry a few units of 1e-7. On tiles,
/// queries and weights are rounded to bf16, at most 2^-9 of each, and so are values of bytes times
/// their scale; errors of many keys average out: the largest of a million means was off by 3e-3.
/// The referee reads the same codes, so what quantizing itself loses does not count.
fn tolerance(ops: &dyn Ops, case: &Case) -> (f32, f32) {
    let has_tiles = matches!(case.dtype, DType::BF16 | DType::I8 | DType::Fp8);
    let on_tiles = ops.name().starts_with("cpu (amx") && has_tiles;
    if on_tiles && case.head_dim.is_multiple_of(32) { (5e-3, 0.0) } else { (2e-6, 2e-6) }
}

/// Every block size with every cache that it is tested with.
const LAYOUTS: [(usize, DType); 9] = [
    (8, DType::F32),
    (16, DType::BF16),
    (32, DType::F16),
    (8, DType::I8),
    (16, DType::I8),
    (32, DType::I8),
    (8, DType::Fp8),
    (16, DType::Fp8),
    (32, DType::Fp8),
];

/// All backends at once, because the referee takes longer than they do.
pub fn check(backends: &[CpuOps]) {
    agrees(backends);
    caps_and_sinks(backends);
    let layouts = [(8, DType::BF16), (16, DType::BF16), (32, DType::F32)];
    for (block_size, dtype) in layouts.into_iter().chain([(16, DType::I8), (8, DType::Fp8)]) {
        for window in [None, Some(40)] {
            for ops in backends {
                hidden_positions_have_no_influence(ops, block_size, dtype, window);
            }
        }
        scores_may_rise_and_fall(backends, block_size, dtype);
    }
}

/// Compares every backend with the referee; scores are `size` times those that the tolerance is
/// for, and rounding moves a score by a part of itself.
fn assert_agree(backends: &[CpuOps], problem: &Problem, case: &Case, size: f32, what: &str) {
    let want = problem.run(&ReferenceOps, what);
    for ops in backends {
        let what = format!("{} {what}", ops.name());
        let (absolute, relative) = tolerance(ops, case);
        assert_close(&what, &problem.run(ops, &what), &want, (size * absolute, size * relative));
    }
}

fn agrees(backends: &[CpuOps]) {
    let mut seed = 0;
    let mut check_case = |case: Case| {
        seed += 1;
        let Case { heads, head_dim, block_size, dtype, window, .. } = &case;
        let what =
            format!("attention {heads:?} x {head_dim}, blocks of {block_size} {dtype}, {window:?}");
        assert_agree(backends, &Problem::new(&case, seed), &case, 1.0, &what);
    };
    for head_dim in [32, 64, 80, 96, 128, 256] {
        for heads in [(1, 1), (4, 1), (14, 2)] {
            for (block_size, dtype) in LAYOUTS {
                let (seqs, window) = (ragged(), None);
                check_case(Case { heads, head_dim, block_size, dtype, seqs, window });
            }
        }
    }
    for window in [1, 7, 16, 32, 33, 64, 1000] {
        let layouts = [(8, DType::BF16), (16, DType::F16), (32, DType::F32)];
        for (block_size, dtype) in layouts.into_iter().chain([(8, DType::I8), (16, DType::Fp8)]) {
            let (heads, window) = ((4, 2), Some(window));
            check_case(Case { heads, head_dim: 64, block_size, dtype, seqs: ragged(), window });
        }
    }
    // Contexts of several KV tiles.
    let layouts = [(8, DType::BF16), (16, DType::BF16), (32, DType::F16)];
    for (block_size, dtype) in layouts.into_iter().chain([(16, DType::I8), (8, DType::Fp8)]) {
        for window in [None, Some(100), Some(129)] {
            let seqs = vec![(1, 300), (150, 150), (40, 513), (3, 129), (1, 256)];
            check_case(Case { heads: (14, 2), head_dim: 64, block_size, dtype, seqs, window });
        }
    }
    // Contexts of several parts, which few decodes share among threads.
    for (block_size, dtype) in [(8, DType::F32), (16, DType::BF16), (16, DType::I8)] {
        for window in [None, Some(1500)] {
            for seqs in [vec![(1, 3100)], vec![(1, 1024), (2, 1025), (1, 2049)], vec![(40, 2060)]] {
                check_case(Case { heads: (14, 2), head_dim: 64, block_size, dtype, seqs, window });
            }
        }
    }
    // A head size that fills no vector, and a group larger than a task's rows.
    for (heads, head_dim) in [((3, 3), 20), ((70, 1), 32)] {
        for dtype in CACHES {
            let (block_size, seqs, window) = (16, ragged(), None);
            check_case(Case { heads, head_dim, block_size, dtype, seqs, window });
        }
    }
}

/// Scores of up to ±20 under a cap, and sinks from far below them to far above, which leave
/// next to nothing to the values.
fn caps_and_sinks(backends: &[CpuOps]) {
    let sinks = [-100.0, -20.0, -1.0, 0.0, 0.5, 3.0, 12.0, 19.0, 25.0, 60.0, f32::NEG_INFINITY];
    for (seed, dtype) in CACHES.into_iter().enumerate() {
        for (softcap, has_sinks, window) in [
            (Some(5.0), false, None),
            (Some(50.0), false, Some(40)),
            (None, true, None),
            (None, true, Some(7)),
            (Some(30.0), true, Some(129)),
        ] {
            for (heads, head_dim) in [((14, 2), 64), ((3, 3), 20), ((22, 1), 32)] {
                let (mut seqs, block_size) = (ragged(), 16);
                seqs.push((40, 300));
                let case = Case { heads, head_dim, block_size, dtype, seqs, window };
                let mut problem = Problem::new(&case, 20 + seed as u64);
                problem.q.as_mut_slice::<f32>().iter_mut().for_each(|x| *x *= 10.0);
                problem.softcap = softcap;
                let sinks: Vec<f32> = sinks.into_iter().cycle().take(heads.0).collect();
                problem.sinks = has_sinks.then(|| Tensor::from_slice(&sinks, [heads.0]));
                let what = format!(
                    "attention {heads:?} x {head_dim} {dtype}, cap {softcap:?}, sinks \
                     {has_sinks}, {window:?}"
                );
                assert_agree(backends, &problem, &case, 10.0, &what);
            }
        }
    }
}

/// Keys and values that a query cannot see change none of its bits, however large they are.
fn hidden_positions_have_no_influence(
    ops: &dyn Ops,
    block_size: usize,
    dtype: DType,
    window: Option<usize>,
) {
    let seqs = vec![(70, 300)];
    let case = Case { heads: (14, 2), head_dim: 64, block_size, dtype, seqs, window };
    let what = format!("{} attention, hidden positions, {window:?}", ops.name());
    let plain = Problem::new(&case, 7).run(ops, &what);
    let run_with_huge = |is_huge: &dyn Fn(usize) -> bool| {
        let mut problem = Problem::new(&case, 7);
        problem.edit(|position, keys, values| {
            if is_huge(position) {
                keys.fill(1e30);
                values.fill(-1e30);
            }
        });
        problem.run(ops, &what)
    };
    // Queries are at positions 230..300.
    let row_len = 14 * 64;
    let later = run_with_huge(&|position| position >= 250);
    assert_same(&what, &later[..20 * row_len], &plain[..20 * row_len]);
    if let Some(window) = window {
        let earlier = run_with_huge(&|position| position + window <= 250);
        assert_same(&what, &earlier[20 * row_len..], &plain[20 * row_len..]);
    }
}

/// Scores between -40 and 40 in an order that raises a running maximum often, and by much, in
/// many queries and in one.
fn scores_may_rise_and_fall(backends: &[CpuOps], block_size: usize, dtype: DType) {
    for (queries, step) in [(150, 1), (150, 37), (150, 399), (1, 1), (1, 37), (1, 399)] {
        let seqs = vec![(queries, 400)];
        let case = Case { heads: (14, 2), head_dim: 64, block_size, dtype, seqs, window: None };
        let what = format!("attention, rising scores, {queries} queries, {dtype}");
        let mut problem = Problem::new(&case, 8);
        problem.edit(|position, keys, _| {
            let size = (position * step % 400) as f32 / 200.0 - 1.0;
            for (i, key) in keys.iter_mut().enumerate() {
                *key = if i % 3 == 0 { 60.0 * size } else { -60.0 * size };
            }
        });
        assert_agree(backends, &problem, &case, 10.0, &what);
    }
}
