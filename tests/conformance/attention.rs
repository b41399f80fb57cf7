//! Paged attention: head sizes, groups, block sizes, windows, cache dtypes, ragged batches.

use tokenmill::ops::Ops;
use tokenmill::ops::args::AttentionArgs;
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
    pub q: Tensor,
    pub k_cache: Tensor,
    pub v_cache: Tensor,
    pub block_tables: Tensor,
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
    /// Random queries, keys and values; slots and table entries of no token are poisoned.
    pub fn new(case: &Case, seed: u64) -> Problem {
        let Case { heads: (num_heads, num_kv_heads), head_dim, block_size, dtype, .. } = *case;
        let rng = &mut Rng::new(seed);
        let num_blocks = |context: usize| context.div_ceil(block_size);
        let total: usize = case.seqs.iter().map(|seq| num_blocks(seq.1)).sum();
        let width = case.seqs.iter().map(|seq| num_blocks(seq.1)).max().unwrap() + 1;
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
            q: rng.tensor(DType::F32, [num_tokens, num_heads, head_dim]),
            k_cache: cast(&k, dtype, shape),
            v_cache: cast(&v, dtype, shape),
            block_tables: Tensor::from_slice(&tables, [case.seqs.len(), width]),
        }
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
        });
        out.finish(what)
    }
}

/// Fresh prompts, a continued prompt, decodes, and lengths around block and tile boundaries.
pub fn ragged() -> Vec<(usize, usize)> {
    vec![(17, 17), (1, 1), (1, 33), (5, 40), (33, 65), (1, 100), (2, 32), (16, 31)]
}

pub fn check(ops: &dyn Ops) {
    let mut seed = 0;
    let mut check_case = |case: Case| {
        seed += 1;
        let Case { heads, head_dim, block_size, dtype, window, .. } = &case;
        let what = format!(
            "{} attention {heads:?} x {head_dim}, blocks of {block_size} {dtype}, {window:?}",
            ops.name()
        );
        let problem = Problem::new(&case, seed);
        let (got, want) = (problem.run(ops, &what), problem.run(&ReferenceOps, &what));
        // Weighted means of values below 1; the weights carry a few units of 1e-7.
        assert_close(&what, &got, &want, (2e-6, 2e-6));
    };
    for head_dim in [32, 64, 80, 96, 128, 256] {
        for heads in [(1, 1), (4, 1), (14, 2)] {
            for (block_size, dtype) in [(8, DType::F32), (16, DType::BF16), (32, DType::F16)] {
                let (seqs, window) = (ragged(), None);
                check_case(Case { heads, head_dim, block_size, dtype, seqs, window });
            }
        }
    }
    for window in [1, 7, 16, 32, 33, 64, 1000] {
        for (block_size, dtype) in [(8, DType::BF16), (16, DType::F16), (32, DType::F32)] {
            let (heads, window) = ((4, 2), Some(window));
            check_case(Case { heads, head_dim: 64, block_size, dtype, seqs: ragged(), window });
        }
    }
    // A head size that fills no vector, and a group larger than a task's rows.
    for (heads, head_dim) in [((3, 3), 20), ((70, 1), 32)] {
        let (block_size, dtype, seqs, window) = (16, DType::BF16, ragged(), None);
        check_case(Case { heads, head_dim, block_size, dtype, seqs, window });
    }
}
