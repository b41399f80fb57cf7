//! Latent attention: products with matrices of heads, what is cached, and attention over it.

use tokenmill::ops::args::*;
use tokenmill::ops::kv_tensor::KvTensor;
use tokenmill::ops::reference::ReferenceOps;
use tokenmill::ops::{Ops, StepLimits};
use tokenmill::tensor::{DType, Tensor};

use crate::support::*;

/// `[num_heads, out, in]`, and how many elements heads of activations have beyond them.
const PRODUCTS: [([usize; 3], [usize; 2]); 7] = [
    ([1, 16, 16], [0, 0]),
    ([2, 32, 24], [16, 16]),
    ([3, 40, 32], [0, 0]),
    ([6, 48, 16], [8, 64]),
    ([16, 8, 40], [0, 24]),
    ([2, 512, 128], [64, 64]),
    ([2, 128, 512], [0, 0]),
];
const ROWS: [usize; 6] = [1, 2, 7, 16, 33, 130];

/// Sums of up to 512 products of numbers below 1, of which bf16 keeps eight bits.
const PRODUCT_TOLERANCE: (f32, f32) = (2e-5, 1e-6);

pub fn check_products(ops: &dyn Ops) {
    for (seed, ([num_heads, num_out, num_in], [beyond_in, beyond_out])) in
        PRODUCTS.into_iter().enumerate()
    {
        let rng = &mut Rng::new(seed as u64);
        let dtypes = if ops.activation_dtype() == DType::F32 { &FLOATS[..] } else { &FLOATS[1..2] };
        for &dtype in dtypes {
            let weight = rng.tensor(dtype, [num_heads, num_out, num_in]);
            for num_rows in ROWS {
                let x = rng.activations(ops, [num_rows, num_heads, num_in + beyond_in]);
                let before = rng.activations(ops, [num_rows, num_heads, num_out + beyond_out]);
                let product = |ops: &dyn Ops, what: &str| {
                    let mut out = Guarded::filled(before.as_slice(), before.shape());
                    let (x, weight) = (x.view(), weight.view());
                    ops.head_matmul(HeadMatmulArgs { out: out.view(), x, weight });
                    out.finish(what)
                };
                let what = format!(
                    "{} {num_rows} x {num_heads} heads, {num_out} x {num_in} of {dtype}",
                    ops.name()
                );
                let want = product(&ReferenceOps, &what);
                assert_outputs(ops, &what, &product(ops, &what), &want, PRODUCT_TOLERANCE);
            }
        }
    }
}

/// Bits of a row alone and in every batch.
pub fn check_product_rows(ops: &dyn Ops) {
    let (rng, num_rows) = (&mut Rng::new(3), 150);
    for ([num_heads, num_out, num_in], _) in PRODUCTS {
        let weight = rng.tensor(DType::BF16, [num_heads, num_out, num_in]);
        let x = rng.activations(ops, [num_rows, num_heads, num_in]);
        let run = |rows: std::ops::Range<usize>| {
            let mut out = Guarded::poisoned([rows.len(), num_heads, num_out]);
            let (x, weight) = (x.view().rows(rows), weight.view());
            ops.head_matmul(HeadMatmulArgs { out: out.view(), x, weight });
            out.finish("matrices of heads")
        };
        let whole = run(0..num_rows);
        let len = num_heads * num_out;
        for rows in [0..1, 3..5, 17..33, 60..127, 149..150] {
            let what = format!("{} rows {rows:?} of {num_heads} heads", ops.name());
            assert_same(&what, &run(rows.clone()), &whole[rows.start * len..rows.end * len]);
        }
    }
}

/// `(rank, rope_dim, num_heads)`.
const SIZES: [(usize, usize, usize); 4] = [(16, 16, 1), (48, 16, 6), (32, 32, 3), (512, 64, 16)];

pub fn check_writes(ops: &dyn Ops) {
    for (seed, (rank, rope_dim, num_heads)) in SIZES.into_iter().enumerate() {
        for (block_size, style) in [(8, RopeStyle::Interleaved), (16, RopeStyle::Halves)] {
            // Kernels of a device read floats only.
            let is_device = ops.activation_dtype() != DType::F32;
            let dtypes = if is_device { &CACHES[1..3] } else { &CACHES[..] };
            for &dtype in dtypes {
                check_write(
                    ops,
                    seed as u64,
                    (rank, rope_dim, num_heads),
                    (block_size, style, dtype),
                );
            }
        }
    }
}

fn check_write(
    ops: &dyn Ops,
    seed: u64,
    (rank, rope_dim, num_heads): (usize, usize, usize),
    (block_size, style, dtype): (usize, RopeStyle, DType),
) {
    let (num_tokens, num_blocks, nope_dim, len) = (11, 4, 24, rank + rope_dim);
    let rng = &mut Rng::new(seed);
    let latent = rng.activations(ops, [num_tokens, len]);
    let q = rng.activations(ops, [num_tokens, num_heads, nope_dim + rope_dim]);
    let before = rng.activations(ops, [num_tokens, num_heads, len]);
    let weight = rng.tensor(FLOATS[seed as usize % 3], [rank]);
    let [cos, sin] = [(); 2].map(|()| rng.tensor(DType::F32, [40, rope_dim / 2]));
    let positions: Vec<u32> = (0..num_tokens).map(|_| rng.below(40) as u32).collect();
    let slots = rng.permutation(num_blocks * block_size)[..num_tokens].to_vec();
    let shape = [num_blocks, 1, block_size, len];
    let old = rng.floats(shape.iter().product());
    let what = format!("{} write_latent {rank} + {rope_dim} in {dtype}, {style:?}", ops.name());
    let run = |ops: &dyn Ops| {
        let mut cache = cast_cache(&old, dtype, shape);
        let mut absorbed = Guarded::filled(before.as_slice(), before.shape());
        ops.write_latent(WriteLatentArgs {
            cache: cache.view_mut(),
            absorbed: absorbed.view(),
            latent: latent.to_owned_memory().view_mut(),
            q: q.view(),
            weight: weight.view(),
            eps: 1e-6,
            positions: ids(&positions).view(),
            cos: cos.view(),
            sin: sin.view(),
            style,
            slot_mapping: ids(&slots).view(),
        });
        (widened_cache(&cache), absorbed.finish(&what))
    };
    let ((cache, absorbed), (wanted, expected)) = (run(ops), run(&ReferenceOps));
    assert_outputs(ops, &what, &absorbed, &expected, (1e-6, 1e-6));
    // A value between two numbers of the cache may become either.
    let step = match dtype {
        DType::F32 => 1e-6,
        DType::F16 => 2f32.powi(-10),
        DType::BF16 => 2f32.powi(-7),
        DType::Fp8 => 2f32.powi(-3),
        _ => 2f32.powi(-5),
    };
    assert_close(&what, &cache, &wanted, (if dtype == DType::F32 { 1e-6 } else { 2e-2 }, step));
    let written: Vec<usize> = slots.iter().map(|&slot| slot as usize * len).collect();
    let untouched = |i: &usize| !written.iter().any(|start| (*start..start + len).contains(i));
    let old = widened_cache(&cast_cache(&old, dtype, shape));
    assert!((0..cache.len()).filter(untouched).all(|i| cache[i] == old[i]), "{what}: other slots");
}

fn widened_cache(cache: &KvTensor) -> Vec<f32> {
    let len = cache.data.shape().sizes()[3];
    match (cache.data.dtype(), &cache.scales) {
        (DType::I8, Some(scales)) => {
            let rows = cache.data.as_slice::<i8>().chunks_exact(len).zip(scales.as_slice::<f32>());
            rows.flat_map(|(row, scale)| row.iter().map(move |&x| f32::from(x) * scale)).collect()
        }
        (DType::Fp8, _) => {
            let codes = cache.data.bytes().iter();
            codes.map(|&code| tokenmill::formats::fp8::decode(code)).collect()
        }
        _ => widened(&cache.data),
    }
}

/// A ragged batch over a cache of latents.
pub struct Problem {
    q: Tensor,
    cache: KvTensor,
    block_tables: Tensor,
    seqs: Vec<(usize, usize)>,
    rank: usize,
    scale: f32,
}

#[derive(Clone, Debug)]
pub struct Case {
    pub num_heads: usize,
    pub rank: usize,
    pub rope_dim: usize,
    pub block_size: usize,
    pub dtype: DType,
    /// `(queries, context)` per sequence.
    pub seqs: Vec<(usize, usize)>,
}

impl Problem {
    /// Random queries and latents; slots and table entries of no token are poisoned.
    pub fn new(ops: &dyn Ops, case: &Case, seed: u64) -> Problem {
        let Case { num_heads, rank, rope_dim, block_size, dtype, ref seqs } = *case;
        let (rng, len) = (&mut Rng::new(seed), rank + rope_dim);
        let num_blocks = |context: usize| context.div_ceil(block_size);
        let total: usize = seqs.iter().map(|seq| num_blocks(seq.1)).sum();
        let width = seqs.iter().map(|seq| num_blocks(seq.1)).max().unwrap() + 1;
        let mut free = rng.permutation(total);
        let shape = [total, 1, block_size, len];
        let mut values = vec![f32::NAN; total * block_size * len];
        let mut tables = vec![u32::MAX; seqs.len() * width];
        for (seq, &(_, context)) in seqs.iter().enumerate() {
            for position in 0..context {
                let entry = &mut tables[seq * width + position / block_size];
                if position % block_size == 0 {
                    *entry = free.pop().unwrap();
                }
                let at = (*entry as usize * block_size + position % block_size) * len;
                // Scores rise and fall by much.
                let size = if position % 7 == 3 { 2.0 } else { 1.0 };
                let latent = rng.floats(len).into_iter().map(|x| x * size);
                values[at..at + len].copy_from_slice(&latent.collect::<Vec<_>>());
            }
        }
        let num_tokens: usize = seqs.iter().map(|seq| seq.0).sum();
        Problem {
            q: rng.activations(ops, [num_tokens, num_heads, len]),
            cache: cast_cache(&values, dtype, shape),
            block_tables: Tensor::from_slice(&tables, [seqs.len(), width]),
            seqs: seqs.clone(),
            rank,
            scale: 3.0 / (len as f32).sqrt(),
        }
    }

    /// Attention of all queries.
    pub fn run(&self, ops: &dyn Ops, what: &str) -> Vec<f32> {
        let seqs: Vec<usize> = (0..self.seqs.len()).collect();
        self.run_part(ops, &seqs, &self.seqs, 0, what)
    }

    /// Attention of rows `first_row..` of q as a batch of `chunks` of the given sequences.
    pub fn run_part(
        &self,
        ops: &dyn Ops,
        seqs: &[usize],
        chunks: &[(usize, usize)],
        first_row: usize,
        what: &str,
    ) -> Vec<f32> {
        let num_rows: usize = chunks.iter().map(|chunk| chunk.0).sum();
        let mut out = Guarded::poisoned([num_rows, self.q.shape().sizes()[1], self.rank]);
        let mut cu_seqlens = vec![0];
        for &(queries, _) in chunks {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + queries as u32);
        }
        let contexts: Vec<u32> = chunks.iter().map(|chunk| chunk.1 as u32).collect();
        let width = self.block_tables.shape().sizes()[1];
        let table = |&seq: &usize| self.block_tables.view().rows(seq..seq + 1).as_slice().to_vec();
        let tables: Vec<u32> = seqs.iter().flat_map(table).collect();
        ops.latent_attention(LatentAttentionArgs {
            out: out.view(),
            q: self.q.view().rows(first_row..first_row + num_rows),
            cache: self.cache.view(),
            block_tables: Tensor::from_slice(&tables, [seqs.len(), width]).view(),
            cu_seqlens_q: ids(&cu_seqlens).view(),
            context_lens: ids(&contexts).view(),
            scale: self.scale,
        });
        out.finish(what)
    }

    /// The first sequence in chunks, piece by piece.
    pub fn run_in_chunks(&self, ops: &dyn Ops, chunk: usize, what: &str) -> Vec<f32> {
        let (len, context) = self.seqs[0];
        let mut pieces = Vec::new();
        for start in (0..len).step_by(chunk) {
            let end = len.min(start + chunk);
            let chunks = [(end - start, context - len + end)];
            pieces.extend(self.run_part(ops, &[0], &chunks, start, what));
        }
        pieces
    }
}

/// Fresh prompts, a continued prompt, decodes, and lengths around block and tile boundaries.
fn ragged() -> Vec<(usize, usize)> {
    vec![(17, 17), (1, 1), (1, 33), (5, 40), (1, 64), (1, 100), (2, 32)]
}

/// Cases of attention: awkward and real sizes, heads that fill no tile, every block size, cached
/// prefixes, and contexts of several parts.
pub fn attention_cases(dtypes: &[DType], part: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in dtypes {
        for (i, (rank, rope_dim, num_heads)) in
            [(16, 16, 1), (32, 16, 6), (48, 16, 16), (64, 32, 20), (512, 64, 16)]
                .into_iter()
                .enumerate()
        {
            let block_size = [8, 16, 32][i % 3];
            let seqs = if rank == 512 { vec![(3, 20), (1, 70), (1, 1)] } else { ragged() };
            cases.push(Case { num_heads, rank, rope_dim, block_size, dtype, seqs });
        }
        let long = vec![(1, 2 * part + 76), (2, part + 1), (1, part), (12, part + 5)];
        let (num_heads, rank, rope_dim) = (6, 32, 16);
        cases.push(Case { num_heads, rank, rope_dim, block_size: 16, dtype, seqs: long });
    }
    cases
}

/// Positions of a part of the context on a CPU.
const CPU_PART: usize = 1024;

pub fn check_attention(backends: &[&dyn Ops]) {
    let mut cases = attention_cases(&CACHES, CPU_PART);
    // More heads than a task takes, and sizes that fill no vector.
    for (rank, rope_dim, num_heads) in [(40, 8, 128), (24, 10, 3)] {
        let (block_size, dtype, seqs) = (16, DType::BF16, ragged());
        cases.push(Case { num_heads, rank, rope_dim, block_size, dtype, seqs });
    }
    for (seed, case) in cases.iter().enumerate() {
        let problem = Problem::new(backends[0], case, seed as u64);
        let want = problem.run(&ReferenceOps, "latents");
        for ops in backends {
            let what = format!("{} {case:?}", ops.name());
            assert_close(&what, &problem.run(*ops, &what), &want, (1e-5, 1e-5));
        }
    }
}

/// Chunks, company and the order of blocks change no bit.
pub fn check_invariance(ops: &dyn Ops) {
    for (num_heads, rank, rope_dim, dtype) in
        [(6, 32, 16, DType::BF16), (40, 16, 16, DType::F32), (128, 24, 8, DType::I8)]
    {
        let long = vec![(60, 2080), (1, 2100), (1, 1030), (3, 40)];
        for seqs in [vec![(150, 150), (1, 33), (7, 90)], long] {
            let case = Case { num_heads, rank, rope_dim, block_size: 16, dtype, seqs };
            let problem = Problem::new(ops, &case, 5);
            let what = format!("{} {case:?}", ops.name());
            let whole = problem.run(ops, &what);
            let first = &whole[..case.seqs[0].0 * num_heads * rank];
            for chunk in [1, 7, 64] {
                assert_same(&what, &problem.run_in_chunks(ops, chunk, &what), first);
            }
            let mut row = 0;
            for (seq, &chunk) in case.seqs.iter().enumerate() {
                let alone = problem.run_part(ops, &[seq], &[chunk], row, &what);
                let rows = row * num_heads * rank..(row + chunk.0) * num_heads * rank;
                assert_same(&what, &alone, &whole[rows]);
                row += chunk.0;
            }
        }
    }
}

/// One of everything on two backends; bits must be equal.
pub fn check_equal(one: &dyn Ops, other: &dyn Ops) {
    for case in attention_cases(&[DType::BF16], CPU_PART) {
        let problem = Problem::new(one, &case, 9);
        let what = format!("{} and {}, {case:?}", one.name(), other.name());
        assert_same(&what, &problem.run(one, &what), &problem.run(other, &what));
    }
    let rng = &mut Rng::new(10);
    let weight = rng.tensor(DType::BF16, [3, 200, 40]);
    let x = rng.tensor(DType::F32, [70, 3, 40]);
    let run = |ops: &dyn Ops| {
        let mut out = Guarded::poisoned([70, 3, 200]);
        ops.head_matmul(HeadMatmulArgs { out: out.view(), x: x.view(), weight: weight.view() });
        out.finish("matrices of heads")
    };
    assert_same("matrices of heads", &run(one), &run(other));
}

/// `out += x`.
pub fn check_add(ops: &dyn Ops) {
    for (rows, width) in [(1, 8), (3, 40), (70, 72)] {
        let rng = &mut Rng::new((rows * width) as u64);
        let (a, b) = (rng.activations(ops, [rows, width]), rng.activations(ops, [rows, width]));
        let run = |ops: &dyn Ops| {
            let mut out = Guarded::filled(a.as_slice(), a.shape());
            ops.add(AddArgs { out: out.view(), x: b.view() });
            out.finish("add")
        };
        assert_outputs(ops, "add", &run(ops), &run(&ReferenceOps), (0.0, 0.0));
    }
}

/// Positions of a part of the context on a GPU.
const DEVICE_PART: usize = 256;

/// Weights and sums of the kernel are rounded to sixteen bits, at most 2^-9 of each, and values are
/// below 2; errors of many keys average out.
const KERNEL_TOLERANCE: (f32, f32) = (1e-2, 0.0);

fn limits() -> StepLimits {
    StepLimits {
        max_num_tokens: 64,
        max_num_seqs: 8,
        max_context_len: 1024,
        max_width: 64,
        num_heads: 32,
        head_dim: 80,
        max_logit_rows: 1,
        vocab_size: 16,
        hidden_size: 64,
        num_experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    }
}

/// The kernels against the referee; and that neither chunks nor company, nor whether CTAs share a
/// context (they do where room was reserved), change a bit.
pub fn check_kernels(sharing: &dyn Ops, alone: &dyn Ops) {
    sharing.reserve(&limits()).unwrap();
    let dtypes = if wants_few_cases() { &[DType::BF16][..] } else { &[DType::BF16, DType::F16] };
    let mut cases = attention_cases(dtypes, DEVICE_PART);
    // Two teams of warps, and one, of each cache.
    for dtype in [DType::BF16, DType::F16] {
        for num_heads in [7, 40] {
            let seqs = vec![(1, 300), (1, 33), (1, 1)];
            cases.push(Case { num_heads, rank: 48, rope_dim: 32, block_size: 8, dtype, seqs });
        }
    }
    for (seed, case) in cases.iter().enumerate() {
        let problem = Problem::new(sharing, case, seed as u64);
        let what = format!("{} {case:?}", sharing.name());
        let got = problem.run(sharing, &what);
        assert_outputs(sharing, &what, &got, &problem.run(&ReferenceOps, &what), KERNEL_TOLERANCE);
        assert_same(&what, &problem.run(alone, &what), &got);
        let row_len = case.num_heads * case.rank;
        let mut row = 0;
        for (seq, &chunk) in case.seqs.iter().enumerate() {
            let one = problem.run_part(sharing, &[seq], &[chunk], row, &what);
            assert_same(&what, &one, &got[row * row_len..(row + chunk.0) * row_len]);
            row += chunk.0;
        }
    }
    let seqs = vec![(40, 540)];
    let case =
        Case { num_heads: 6, rank: 32, rope_dim: 16, block_size: 16, dtype: DType::BF16, seqs };
    let problem = Problem::new(sharing, &case, 4);
    let whole = problem.run(sharing, "whole");
    for chunk in [1, 7] {
        assert_same("chunks", &problem.run_in_chunks(sharing, chunk, "chunks"), &whole);
    }
    check_product_rows(sharing);
    check_empty_context(sharing);
    check_empty_context(alone);
}

/// A sequence without a context, as padding may be, yields zeros.
fn check_empty_context(ops: &dyn Ops) {
    let seqs = vec![(1, 600), (1, 1)];
    let case =
        Case { num_heads: 6, rank: 32, rope_dim: 16, block_size: 16, dtype: DType::BF16, seqs };
    let problem = Problem::new(ops, &case, 4);
    let out = problem.run_part(ops, &[0, 1], &[(1, 600), (1, 0)], 0, "an empty context");
    assert!(out[6 * 32..].iter().all(|&x| x == 0.0));
}
