//! How the operations of latent attention are cut into tasks: matrices of heads, and what is cached.
//! Attention itself is that of `launch_attention`.

use std::ops::Range;

use super::isa::Isa;
use super::matmul::{DenseRows, Operands, PANEL, multiply_columns};
use super::rows::{Add, Norm, Rotate};
use super::share::{Parts, Scratch};
use super::simd::Float;
use super::{CpuOps, with_float};
use crate::ops::args::{HeadMatmulArgs, RopeStyle, WriteLatentArgs};
use crate::tensor::DType;

/// Rows that a task multiplies at once: their activations and results stay in the second-level
/// cache beside a head's matrix.
const MOST_ROWS: usize = 128;
/// Tokens of a task that normalises and rotates: some ten thousand elements.
const TOKENS_PER_TASK: usize = 4;

/// Matrices of heads, and what they multiply.
struct HeadProducts<'a, E> {
    x: &'a [f32],
    x_width: usize,
    out: Parts<'a, f32>,
    out_width: usize,
    /// `[num_heads, num_out, num_in]`.
    weight: &'a [E],
    num_heads: usize,
    num_out: usize,
    num_in: usize,
}

impl<E: Float> HeadProducts<'_, E> {
    fn num_rows(&self) -> usize {
        self.x.len() / (self.num_heads * self.x_width).max(1)
    }

    /// Multiplies all rows by some rows of a head's matrix.
    fn multiply(&self, isa: Isa, head: usize, cols: Range<usize>, scratch: &mut [Scratch; 2]) {
        let num_rows = self.num_rows();
        for start in (0..num_rows).step_by(MOST_ROWS) {
            let rows = start..num_rows.min(start + MOST_ROWS);
            self.multiply_rows(isa, head, cols.clone(), rows, scratch);
        }
    }

    /// Through scratch, in which the head's rows follow each other.
    fn multiply_rows(
        &self,
        isa: Isa,
        head: usize,
        cols: Range<usize>,
        rows: Range<usize>,
        [own, wide]: &mut [Scratch; 2],
    ) {
        let &HeadProducts { num_heads, num_out, num_in, x_width, out_width, .. } = self;
        let (num_rows, num_cols) = (rows.len(), cols.len());
        let (x, sums) = own.take(num_rows * (num_in + num_cols)).split_at_mut(num_rows * num_in);
        for (row, to) in rows.clone().zip(x.chunks_exact_mut(num_in)) {
            to.copy_from_slice(&self.x[(row * num_heads + head) * x_width..][..num_in]);
        }
        let matrix = &self.weight[head * num_out * num_in..(head + 1) * num_out * num_in];
        let weight = DenseRows::new(&matrix[cols.start * num_in..], num_in);
        let operands =
            Operands { x: &*x, weight, k: num_in, num_cols, out: &Parts::new(&mut *sums) };
        multiply_columns(isa, operands, 0..num_cols, None, wide);
        for (row, from) in rows.zip(sums.chunks_exact(num_cols)) {
            let at = (row * num_heads + head) * out_width;
            // SAFETY: tasks have different heads, or different columns of a head.
            let out = unsafe { self.out.part(at + cols.start..at + cols.end) };
            out.copy_from_slice(from);
        }
    }
}

/// Tokens before they are cached.
struct LatentTokens<'a, W> {
    latents: Parts<'a, f32>,
    absorbed: Parts<'a, f32>,
    q: &'a [f32],
    q_width: usize,
    num_heads: usize,
    weight: &'a [W],
    rank: usize,
    rope_dim: usize,
    eps: f32,
    positions: &'a [u32],
    /// Cosines and sines.
    tables: [&'a [f32]; 2],
    style: RopeStyle,
}

impl<W: Float> LatentTokens<'_, W> {
    /// Normalises a token's latent, and rotates its key and its queries.
    fn prepare(&self, isa: Isa, token: usize, scratch: &mut Scratch) {
        let &LatentTokens { rank, rope_dim, q_width, num_heads, eps, style, .. } = self;
        let len = rank + rope_dim;
        let at = self.positions[token] as usize * rope_dim / 2;
        let [cos, sin] = self.tables.map(|table| &table[at..at + rope_dim / 2]);
        // SAFETY: tasks have different tokens.
        let latent = unsafe { self.latents.part(token * len..(token + 1) * len) };
        let (out, key) = latent.split_at_mut(rank);
        let x = scratch.take(rank);
        x.copy_from_slice(out);
        isa.run(Norm { out, x, residual: None, weight: self.weight, eps });
        isa.run(Rotate { heads: key, head_dim: rope_dim, cos, sin, style });
        for head in token * num_heads..(token + 1) * num_heads {
            // SAFETY: as above.
            let heads = unsafe { self.absorbed.part(head * len + rank..(head + 1) * len) };
            let end = (head + 1) * q_width;
            heads.copy_from_slice(&self.q[end - rope_dim..end]);
            isa.run(Rotate { heads, head_dim: rope_dim, cos, sin, style });
        }
    }
}

impl CpuOps {
    pub(super) fn multiply_heads(&self, args: HeadMatmulArgs<'_>) {
        let HeadMatmulArgs { out, x, weight } = args;
        let (num_heads, num_out, num_in) = (weight.size(0), weight.size(1), weight.size(2));
        let (x_width, out_width) = (x.size(2), out.size(2));
        // As many tasks as threads at least.
        let tasks_per_head = self.threads().div_ceil(num_heads);
        let cols_per_task = num_out.div_ceil(tasks_per_head).next_multiple_of(PANEL);
        let tasks_per_head = num_out.div_ceil(cols_per_task);
        with_float!(weight.dtype(), E => {
            let products = HeadProducts {
                x: x.as_slice(),
                x_width,
                out: Parts::new(out.into_mut_slice()),
                out_width,
                weight: weight.as_slice::<E>(),
                num_heads,
                num_out,
                num_in,
            };
            self.pool.run(num_heads * tasks_per_head, |thread, task| {
                let start = task % tasks_per_head * cols_per_task;
                let cols = start..num_out.min(start + cols_per_task);
                let scratch = &mut self.scratch.lock(thread);
                products.multiply(self.isa, task / tasks_per_head, cols, scratch);
            });
        });
    }

    pub(super) fn write_latents(&self, args: WriteLatentArgs<'_>) {
        let (rank, rope_dim) = (args.rank(), args.rope_dim());
        let WriteLatentArgs { cache, absorbed, mut latent, q, weight, eps, style, .. } = args;
        let num_tokens = latent.size(0);
        with_float!(weight.dtype(), W => {
            let tokens = LatentTokens {
                latents: Parts::new(latent.reborrow().into_mut_slice()),
                absorbed: Parts::new(absorbed.into_mut_slice()),
                q: q.as_slice(),
                q_width: q.size(2),
                num_heads: q.size(1),
                weight: weight.as_slice::<W>(),
                rank,
                rope_dim,
                eps,
                positions: args.positions.as_slice(),
                tables: [args.cos.as_slice(), args.sin.as_slice()],
                style,
            };
            self.pool.run(num_tokens.div_ceil(TOKENS_PER_TASK), |thread, task| {
                let scratch = &mut self.scratch.lock(thread)[0];
                let first = task * TOKENS_PER_TASK;
                for token in first..num_tokens.min(first + TOKENS_PER_TASK) {
                    tokens.prepare(self.isa, token, scratch);
                }
            });
        });
        self.write_slots(cache, latent.as_view(), args.slot_mapping.as_slice());
    }

    pub(super) fn add_elements(&self, out: &mut [f32], x: &[f32]) {
        let out = Parts::new(out);
        self.for_rows(x.len(), 1, |range| {
            // SAFETY: tasks have different elements.
            let out = unsafe { out.part(range.clone()) };
            self.isa.run(Add { out, x: &x[range] });
        });
    }
}
