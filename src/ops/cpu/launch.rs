//! How each operation is cut into tasks for the threads.
//!
//! A task is worth at least a few microseconds, so that small operations run on the calling
//! thread alone; how work is cut never changes a result.

use std::ops::Range;

use super::isa::Isa;
use super::kv_rows::Slots;
use super::rows::{Convert, GatedActivation, LayerNorm, Norm, Rotate, SoftCap};
use super::share::Parts;
use super::simd::Float;
use super::{CpuOps, sample};
use crate::formats::PackedMatrix;
use crate::ops::args::{GatedActivationArgs, RopeArgs, RopeKvArgs, RopeStyle, SampleArgs};
use crate::ops::kv_tensor::KvViewMut;
use crate::output::SampledToken;
use crate::tensor::View;

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
        let (width, num_tokens) = (args.q.size(1) * args.q.size(2), args.positions.size(0));
        let rotation = Rotation::of(self.isa, args);
        self.for_rows(num_tokens, width, |tokens| {
            for token in tokens {
                // SAFETY: tasks have different tokens.
                unsafe { rotation.rotate(token) };
            }
        });
    }

    /// Rotates and stores in one pass: a token's heads are in the nearest cache then.
    pub(super) fn rotate_and_write(&self, args: RopeKvArgs<'_>) {
        args.check();
        let RopeKvArgs { rope, v, k_cache, v_cache, slot_mapping } = args;
        let (k_slots, v_slots) = (Slots::of(k_cache), Slots::of(v_cache));
        let (width, kv_width) = (rope.q.size(1) * rope.q.size(2), v_slots.token_len());
        let (v, slots) = (v.as_slice::<f32>(), slot_mapping.as_slice::<u32>());
        let rotation = Rotation::of(self.isa, rope);
        assert_different(slots);
        self.for_rows(slots.len(), width + 2 * kv_width, |tokens| {
            for token in tokens {
                let v = &v[token * kv_width..(token + 1) * kv_width];
                // SAFETY: tasks have different tokens, and these different slots.
                unsafe {
                    let k = rotation.rotate(token);
                    k_slots.write(self.isa, slots[token], k);
                    v_slots.write(self.isa, slots[token], v);
                }
            }
        });
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

    /// Stores the vectors of all heads of tokens in their slots, which are different.
    pub(super) fn write_slots(&self, cache: KvViewMut<'_>, new: View<'_>, slots: &[u32]) {
        let (new, cache) = (new.as_slice::<f32>(), Slots::of(cache));
        let width = cache.token_len();
        assert_different(slots);
        self.for_rows(slots.len(), width, |tokens| {
            for token in tokens {
                let vectors = &new[token * width..(token + 1) * width];
                // SAFETY: tasks have different tokens, and these different slots.
                unsafe { cache.write(self.isa, slots[token], vectors) };
            }
        });
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

/// Panics unless all slots are different: tasks write them at the same time.
fn assert_different(slots: &[u32]) {
    let ascend = |slots: &[u32]| slots.is_sorted_by(|a, b| a < b);
    if !ascend(slots) {
        let mut sorted = slots.to_vec();
        sorted.sort_unstable();
        assert!(ascend(&sorted), "write_kv: a slot is written twice");
    }
}

/// Heads of queries and keys, and their angles.
struct Rotation<'a> {
    isa: Isa,
    heads: [Parts<'a, f32>; 2],
    /// Elements of a token of each.
    widths: [usize; 2],
    head_dim: usize,
    positions: &'a [u32],
    cos: &'a [f32],
    sin: &'a [f32],
    /// Angles of a position.
    half: usize,
    style: RopeStyle,
}

impl<'a> Rotation<'a> {
    fn of(isa: Isa, args: RopeArgs<'a>) -> Rotation<'a> {
        let RopeArgs { q, k, positions, cos, sin, style } = args;
        let (head_dim, half) = (q.size(2), cos.size(1));
        let widths = [q.size(1) * head_dim, k.size(1) * head_dim];
        Rotation {
            isa,
            heads: [q, k].map(|heads| Parts::new(heads.into_mut_slice())),
            widths,
            head_dim,
            positions: positions.as_slice(),
            cos: cos.as_slice(),
            sin: sin.as_slice(),
            half,
            style,
        }
    }

    /// Rotates a token's heads; returns its keys.
    ///
    /// # Safety
    /// No other task may have the token.
    unsafe fn rotate(&self, token: usize) -> &[f32] {
        let at = self.positions[token] as usize * self.half;
        let [_, k] = [0, 1].map(|i| {
            let part = token * self.widths[i]..(token + 1) * self.widths[i];
            // SAFETY: the caller's contract.
            let heads = unsafe { self.heads[i].part(part) };
            self.isa.run(Rotate {
                heads: &mut *heads,
                head_dim: self.head_dim,
                cos: &self.cos[at..at + self.half],
                sin: &self.sin[at..at + self.half],
                style: self.style,
            });
            &*heads
        });
        k
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_slot_is_written_by_two_tasks() {
        for slots in [&[][..], &[3], &[1, 2, 9], &[9, 1, 2]] {
            assert_different(slots);
        }
        for slots in [&[3, 3][..], &[1, 2, 2], &[9, 1, 9]] {
            assert!(std::panic::catch_unwind(|| assert_different(slots)).is_err(), "{slots:?}");
        }
    }
}
