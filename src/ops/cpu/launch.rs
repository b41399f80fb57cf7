//! How each operation is cut into tasks for the threads.
//!
//! A task is worth at least a few microseconds, so that small operations run on the calling
//! thread alone; how work is cut never changes a result.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::PoisonError;

use super::attention::{AttendTile, Sizes, queries_per_tile};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::kv_rows::{Cached, EncodeRow, QuantizeRow};
#[cfg(target_arch = "x86_64")]
use super::launch_matmul::TASKS_PER_THREAD;
use super::rows::{Convert, GatedActivation, Norm, ReadRow, Rotate};
use super::share::Parts;
use super::simd::Float;
#[cfg(target_arch = "x86_64")]
use super::tile_attention;
use super::weight_rows::WeightRows;
use super::{CpuOps, sample, with_float};
use crate::formats::PackedMatrix;
use crate::ops::args::{AttentionArgs, GatedActivationArgs, RopeArgs, SampleArgs};
use crate::ops::kv_tensor::KvViewMut;
use crate::output::SampledToken;
use crate::tensor::{DType, Fp8, View};

/// Elements per task of a row-wise operation: a few microseconds.
const TASK_ELEMENTS: usize = 16_384;

/// Some queries of one sequence, for all heads.
pub struct QueryTile {
    seq: usize,
    queries: Range<usize>,
    first_position: usize,
}

impl CpuOps {
    /// Calls `task` with ranges that cover `0..num_rows`, on all threads when it is worth it.
    fn for_rows(&self, num_rows: usize, width: usize, task: impl Fn(Range<usize>) + Sync) {
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

    /// `out[i]` = row `ids[i]` of a matrix of any format; panics on an id beyond it.
    pub(super) fn embed_rows(
        &self,
        out: &mut [f32],
        rows: impl WeightRows,
        ids: &[u32],
        table: &PackedMatrix,
    ) {
        let width = table.num_cols;
        let out = Parts::new(out);
        self.for_rows(ids.len(), width, |tokens| {
            for token in tokens {
                let row = ids[token] as usize;
                assert!(row < table.num_rows, "token {row} of {}", table.num_rows);
                // SAFETY: tasks have different tokens.
                let out = unsafe { out.part(token * width..(token + 1) * width) };
                self.isa.run(ReadRow { out, rows, row });
            }
        });
    }

    /// As [`CpuOps::embed_rows`], for a matrix in blocks.
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

    pub(super) fn attend(&self, args: AttentionArgs<'_>) {
        let sizes = Sizes {
            num_heads: args.q.size(1),
            num_kv_heads: args.k_cache.size(1),
            head_dim: args.q.size(2),
            block_size: args.k_cache.size(2),
        };
        let mut tiles = self.query_tiles.lock().unwrap_or_else(PoisonError::into_inner);
        let (k_cache, v_cache) = (Cached::of(args.k_cache), Cached::of(args.v_cache));
        let per_tile = self.queries_per_tile(sizes, k_cache, args.q.size(0));
        plan_queries(&mut tiles, &args, per_tile);
        let (q, block_tables) = (args.q.as_slice::<f32>(), args.block_tables);
        let sinks = args.sinks.map(View::as_slice);
        let out = Parts::new(args.out.into_mut_slice::<f32>());
        self.pool.run(tiles.len() * sizes.num_kv_heads, |thread, i| {
            let tile = &tiles[i / sizes.num_kv_heads];
            self.attend_tile(AttendTile {
                q,
                k_cache,
                v_cache,
                out: &out,
                sizes,
                block_table: block_tables.rows(tile.seq..tile.seq + 1).as_slice(),
                kv_head: i % sizes.num_kv_heads,
                queries: tile.queries.clone(),
                first_position: tile.first_position,
                scale: args.scale,
                window: args.sliding_window.unwrap_or(usize::MAX),
                softcap: args.softcap,
                sinks,
                scratch: &mut self.scratch.lock(thread),
            });
        });
    }

    fn attend_tile(&self, task: AttendTile<'_>) {
        #[cfg(target_arch = "x86_64")]
        if let (Isa::Amx(amx), true) = (self.isa, tile_attention::fits(task.sizes, task.k_cache)) {
            let mut task = task;
            return tile_attention::attend_on_tiles(amx, &mut task);
        }
        self.isa.run(task);
    }

    fn queries_per_tile(&self, sizes: Sizes, cache: Cached<'_>, num_tokens: usize) -> usize {
        #[cfg(target_arch = "x86_64")]
        if matches!(self.isa, Isa::Amx(_)) && tile_attention::fits(sizes, cache) {
            let num_tasks = (self.threads() * TASKS_PER_THREAD).div_ceil(sizes.num_kv_heads);
            return tile_attention::queries_per_tile(sizes.group(), num_tokens, num_tasks);
        }
        let _ = (cache, num_tokens); // other kernels do not care
        queries_per_tile(sizes.group())
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

/// Cuts every sequence's queries into tiles, those with most work first. Panics when the
/// sequences overlap or own rows that are not there: tasks rely on it.
fn plan_queries(tiles: &mut Vec<QueryTile>, args: &AttentionArgs<'_>, per_tile: usize) {
    tiles.clear();
    let cu_seqlens = args.cu_seqlens_q.as_slice::<u32>();
    for (seq, &context) in args.context_lens.as_slice::<u32>().iter().enumerate() {
        let rows = cu_seqlens[seq] as usize..cu_seqlens[seq + 1] as usize;
        assert!(rows.start <= rows.end && rows.end <= args.q.size(0), "attention: rows {rows:?}");
        let first_position = (context as usize).checked_sub(rows.len());
        let first_position = first_position.expect("a context includes its queries");
        for start in rows.clone().step_by(per_tile) {
            tiles.push(QueryTile {
                seq,
                queries: start..rows.end.min(start + per_tile),
                first_position: first_position + start - rows.start,
            });
        }
    }
    tiles.sort_unstable_by_key(|tile| {
        Reverse((tile.first_position + tile.queries.len()) * tile.queries.len())
    });
}
