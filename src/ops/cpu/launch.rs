//! How each operation is cut into tasks for the threads.
//!
//! A task is worth at least a few microseconds, so that small operations run on the calling
//! thread alone; how work is cut never changes a result.

use std::ops::Range;

use super::kv_rows::{EncodeRow, QuantizeRow};
use super::rows::{Convert, GatedActivation, LayerNorm, Norm, Rotate, SoftCap};
use super::share::Parts;
use super::simd::Float;
use super::{CpuOps, sample, with_float};
use crate::formats::PackedMatrix;
use crate::ops::args::{GatedActivationArgs, RopeArgs, SampleArgs};
use crate::ops::kv_tensor::KvViewMut;
use crate::output::SampledToken;
use crate::tensor::{DType, Fp8, View};

/// Elements per task of a row-wise operation: a few microseconds.
pub(super) const TASK_ELEMENTS: usize = 16_384;

impl CpuOps {
    /// Calls `task` with ranges that cover `0..num_rows`, on all threads when it is worth it.
    pub(super) fn for_rows(
        &self,
        num_rows: usize,
        width: usize,
        task: impl Fn(Range<usize>) + Sync,
    ) {
        let rows_per_task = (TASK_ELEMENTS / width.max(1)).max(1);
        self.pool.run(num_rows.div_ceil(rows_per_task), |_, i| {
            let first = i * rows_per_task;
            task(first..num_rows.min(first + rows_per_task));
        });
    }

    /// `out[i] = table[ids[i]]`, widened; panics on an id beyond the table.
    pub(super) fn copy_rows<E: Float>(
        &self,
        out: &mut [f32],
        table: &[E],
        ids: &[u32],
        width: usize,
    ) {
        let out = Parts::new(out);
        self.for_rows(ids.len(), width, |rows| {
            for row in rows {
                let from = &table[ids[row] as usize * width..][..width];
                // SAFETY: tasks have different rows.
                let out = unsafe { out.part(row * width..(row + 1) * width) };
                self.isa.run(Convert { out, from });
            }
        });
    }

    /// As [`CpuOps::copy_rows`], for a matrix in blocks.
    pub(super) fn embed_from_blocks(&self, out: &mut [f32], ids: &[u32], table: &PackedMatrix) {
        let width = table.num_cols;
        let out = Parts::new(out);
        self.for_rows(ids.len(), width, |tokens| {
            for token in tokens {
                // SAFETY: tasks have different tokens.
                let out = unsafe { out.part(token * width..(token + 1) * width) };
                table.read_row(ids[token] as usize, out);
            }
        });
    }

    pub(super) fn norm_rows<W: Float>(&self, norm: Norm<'_, W>) {
        let Norm { out, x, residual, weight, eps } = norm;
        let width = weight.len();
        let out = Parts::new(out);
        let residual = residual.map(Parts::new);
        self.for_rows(x.len() / width.max(1), width, |rows| {
            let part = rows.start * width..rows.end * width;
            self.isa.run(Norm {
                // SAFETY: tasks have different rows.
                out: unsafe { out.part(part.clone()) },
                x: &x[part.clone()],
                // SAFETY: as above.
                residual: residual.as_ref().map(|all| unsafe { all.part(part) }),
                weight,
                eps,
            });
        });
    }

    pub(super) fn layer_norm_rows<W: Float>(&self, norm: LayerNorm<'_, W>) {
        let LayerNorm { out, x, residual, weight, bias, eps } = norm;
        let width = weight.len();
        let out = Parts::new(out);
        let residual = residual.map(Parts::new);
        self.for_rows(x.len() / width.max(1), width, |rows| {
            let part = rows.start * width..rows.end * width;
            self.isa.run(LayerNorm {
                // SAFETY: tasks have different rows.
                out: unsafe { out.part(part.clone()) },
                x: &x[part.clone()],
                // SAFETY: as above.
                residual: residual.as_ref().map(|all| unsafe { all.part(part) }),
                weight,
                bias,
                eps,
            });
        });
    }

    pub(super) fn rotate_tokens(&self, args: RopeArgs<'_>) {
        let RopeArgs { q, k, positions, cos, sin, style } = args;
        let half = cos.size(1);
        let (cos, sin) = (cos.as_slice::<f32>(), sin.as_slice::<f32>());
        let positions = positions.as_slice::<u32>();
        for heads in [q, k] {
            let (head_dim, width) = (heads.size(2), heads.size(1) * heads.size(2));
            let heads = Parts::new(heads.into_mut_slice::<f32>());
            self.for_rows(positions.len(), width, |tokens| {
                for token in tokens {
                    let at = positions[token] as usize * half;
                    self.isa.run(Rotate {
                        // SAFETY: tasks have different tokens.
                        heads: unsafe { heads.part(token * width..(token + 1) * width) },
                        head_dim,
                        cos: &cos[at..at + half],
                        sin: &sin[at..at + half],
                        style,
                    });
                }
            });
        }
    }

    pub(super) fn activate(&self, args: GatedActivationArgs<'_>) {
        let (gate, up) = (args.gate.as_slice::<f32>(), args.up.as_slice::<f32>());
        let out = Parts::new(args.out.into_mut_slice::<f32>());
        self.for_rows(gate.len(), 1, |range| {
            self.isa.run(GatedActivation {
                // SAFETY: tasks have different elements.
                out: unsafe { out.part(range.clone()) },
                gate: &gate[range.clone()],
                up: &up[range],
                activation: args.activation,
            });
        });
    }

    pub(super) fn cap_elements(&self, x: &mut [f32], cap: f32) {
        let num_elements = x.len();
        let x = Parts::new(x);
        self.for_rows(num_elements, 1, |range| {
            // SAFETY: tasks have different elements.
            self.isa.run(SoftCap { x: unsafe { x.part(range) }, cap });
        });
    }

    /// Stores `new [num_tokens, num_kv_heads, head_dim]` in the tokens' slots. On one thread: it
    /// is a few rows, and slots come from the caller.
    pub(super) fn write_slots(&self, cache: KvViewMut<'_>, new: View<'_>, slots: &[u32]) {
        let (new, head_dim) = (new.as_slice::<f32>(), cache.size(3));
        let sizes = (cache.size(1), cache.size(2), head_dim);
        match cache.data.dtype() {
            DType::I8 => {
                let scales = cache.scales.expect("a checked cache of bytes has scales");
                let scales = scales.into_mut_slice::<f32>();
                let codes = cache.data.into_mut_slice::<i8>();
                for_slots(new, slots, sizes, |row, from| {
                    let codes = &mut codes[row * head_dim..][..head_dim];
                    self.isa.run(QuantizeRow { codes, scale: &mut scales[row], from });
                });
            }
            DType::Fp8 => {
                let codes = cache.data.into_mut_slice::<Fp8>();
                for_slots(new, slots, sizes, |row, from| {
                    self.isa
                        .run(EncodeRow { codes: &mut codes[row * head_dim..][..head_dim], from });
                });
            }
            dtype => with_float!(dtype, E => {
                let elements = cache.data.into_mut_slice::<E>();
                for_slots(new, slots, sizes, |row, from| {
                    self.isa.run(Convert { out: &mut elements[row * head_dim..][..head_dim], from });
                });
            }),
        }
    }

    pub(super) fn sample_rows(&self, args: SampleArgs<'_>) -> Vec<SampledToken> {
        let vocab_size = args.logits.size(1);
        let logits = Parts::new(args.logits.into_mut_slice::<f32>());
        let mut tokens = vec![SampledToken { token_id: 0, logprobs: None }; args.rows.len()];
        let results = Parts::new(&mut tokens);
        self.pool.run(args.rows.len(), |thread, i| {
            // SAFETY: tasks have different rows.
            let logits = unsafe { logits.part(i * vocab_size..(i + 1) * vocab_size) };
            let scratch = &mut self.samplers.lock(thread);
            let token = sample::sample_row(self.isa, logits, &args.rows[i], scratch);
            // SAFETY: as above.
            let result = unsafe { results.part(i..i + 1) };
            result[0] = token;
        });
        tokens
    }
}

/// Calls `write` with the cache row and the values of every new vector.
fn for_slots(
    new: &[f32],
    slots: &[u32],
    (num_kv_heads, block_size, head_dim): (usize, usize, usize),
    mut write: impl FnMut(usize, &[f32]),
) {
    for (token, &slot) in new.chunks_exact(num_kv_heads * head_dim).zip(slots) {
        let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
        for (head, from) in token.chunks_exact(head_dim).enumerate() {
            write((block * num_kv_heads + head) * block_size + offset, from);
        }
    }
}
