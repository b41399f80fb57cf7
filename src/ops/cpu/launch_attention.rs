//! How attention is cut into tasks: some queries of one sequence and one KV head each and, when
//! that makes too few, a part of the context each.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::PoisonError;

use super::CpuOps;
use super::attention::{Attend, AttendTile, Sizes, queries_per_tile};
use super::context_parts::{Base, JoinParts, Partial, parts_of};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::kv_rows::Cached;
use super::partition::TASKS_PER_THREAD;
use super::share::{Parts, Scratch};
#[cfg(target_arch = "x86_64")]
use super::tile_attention;
use crate::ops::args::AttentionArgs;
use crate::tensor::View;

/// Query rows of a task that may be cut into parts; more would leave too much to be joined.
const FEW_ROWS: usize = 16;
/// Numbers that parts may leave to be joined, per thread: 1 MiB.
const PARTIAL_LEN_PER_THREAD: usize = 1 << 18;

/// Some queries of one sequence, for all heads.
struct QueryTile {
    seq: usize,
    queries: Range<usize>,
    first_position: usize,
}

impl QueryTile {
    /// Parts of the context that some query sees.
    fn parts(&self, window: usize) -> Range<usize> {
        let begin = (self.first_position + 1).saturating_sub(window);
        parts_of(&(begin..self.first_position + self.queries.len()))
    }
}

/// One KV head of a tile.
#[derive(Clone, Copy)]
struct TileHead {
    tile: usize,
    kv_head: usize,
}

/// What one call computes; kept to be filled again by the next one.
#[derive(Default)]
pub struct AttentionPlan {
    tiles: Vec<QueryTile>,
    /// With a part, only that, to be left in a slot of `partials`: `(part, slot)`.
    tasks: Vec<(TileHead, Option<(usize, usize)>)>,
    /// What was cut, and the slots of its parts.
    joins: Vec<(TileHead, Range<usize>)>,
    partials: Scratch,
}

impl AttentionPlan {
    /// Makes a task of every tile and KV head, or one of each of their parts as long as threads
    /// would have too little to do. Returns how many slots parts need, of `stride` numbers each.
    fn cut(&mut self, sizes: Sizes, window: usize, stride: usize, threads: usize) -> usize {
        let AttentionPlan { tiles, tasks, joins, .. } = self;
        tasks.clear();
        joins.clear();
        let num_whole = tiles.len() * sizes.num_kv_heads;
        let is_short = threads > 1 && num_whole < threads * TASKS_PER_THREAD;
        let most_slots = threads * PARTIAL_LEN_PER_THREAD / stride;
        let mut num_slots = 0;
        for (i, tile) in tiles.iter().enumerate() {
            let (parts, num_queries) = (tile.parts(window), tile.queries.len());
            let is_cut = is_short
                && parts.len() > 1
                && (num_queries == 1 || num_queries * sizes.group() <= FEW_ROWS)
                && num_slots + sizes.num_kv_heads * parts.len() <= most_slots;
            for head in (0..sizes.num_kv_heads).map(|kv_head| TileHead { tile: i, kv_head }) {
                if is_cut {
                    joins.push((head, num_slots..num_slots + parts.len()));
                    tasks.extend(parts.clone().zip(num_slots..).map(|cut| (head, Some(cut))));
                    num_slots += parts.len();
                } else {
                    tasks.push((head, None));
                }
            }
        }
        // What was not cut takes longer.
        tasks.sort_by_key(|(_, part)| part.is_some());
        num_slots
    }
}

impl CpuOps {
    pub(super) fn attend(&self, args: AttentionArgs<'_>) {
        let sizes = Sizes {
            num_heads: args.q.size(1),
            num_kv_heads: args.k_cache.size(1),
            head_dim: args.q.size(2),
            block_size: args.k_cache.size(2),
        };
        let (k_cache, v_cache) = (Cached::of(args.k_cache), Cached::of(args.v_cache));
        let window = args.sliding_window.unwrap_or(usize::MAX);
        let stride = Partial::len(sizes.group().max(FEW_ROWS), sizes.head_dim);
        let mut plan = self.attention_plan.lock().unwrap_or_else(PoisonError::into_inner);
        let per_tile = self.queries_per_tile(sizes, k_cache, args.q.size(0));
        plan_queries(&mut plan.tiles, &args, per_tile);
        let num_slots = plan.cut(sizes, window, stride, self.threads());
        let AttentionPlan { tiles, tasks, joins, partials } = &mut *plan;
        let partials = partials.take(num_slots * stride);
        let (q, block_tables) = (args.q.as_slice::<f32>(), args.block_tables);
        let sinks = args.sinks.map(View::as_slice);
        let out = Parts::new(args.out.into_mut_slice::<f32>());
        let task = |TileHead { tile, kv_head }| {
            let tile: &QueryTile = &tiles[tile];
            AttendTile {
                q,
                k_cache,
                v_cache,
                out: &out,
                sizes,
                block_table: block_tables.rows(tile.seq..tile.seq + 1).as_slice(),
                kv_head,
                queries: tile.queries.clone(),
                first_position: tile.first_position,
                scale: args.scale,
                window,
                softcap: args.softcap,
                sinks,
            }
        };
        let slots = Parts::new(&mut *partials);
        self.pool.run(tasks.len(), |thread, i| {
            let (head, part) = tasks[i];
            let partial = part.map(|(part, slot)| Partial {
                part,
                // SAFETY: tasks have different slots.
                numbers: unsafe { slots.part(slot * stride..(slot + 1) * stride) },
            });
            let scratch = &mut *self.scratch.lock(thread);
            self.attend_tile(Attend { task: task(head), partial, scratch });
        });
        let base = if self.has_tiles_for(sizes, k_cache) { Base::Two } else { Base::E };
        self.pool.run(joins.len(), |thread, i| {
            let (head, slots) = &joins[i];
            let partials = &partials[slots.start * stride..slots.end * stride];
            let scratch = &mut *self.scratch.lock(thread);
            self.isa.run(JoinParts { task: task(*head), partials, stride, base, scratch });
        });
    }

    fn attend_tile(&self, attend: Attend<'_>) {
        #[cfg(target_arch = "x86_64")]
        if let Isa::Amx(amx) = self.isa
            && tile_attention::fits(attend.task.sizes, attend.task.k_cache)
        {
            return tile_attention::attend_on_tiles(amx, attend);
        }
        self.isa.run(attend);
    }

    #[cfg(target_arch = "x86_64")]
    fn has_tiles_for(&self, sizes: Sizes, cache: Cached<'_>) -> bool {
        matches!(self.isa, Isa::Amx(_)) && tile_attention::fits(sizes, cache)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn has_tiles_for(&self, _: Sizes, _: Cached<'_>) -> bool {
        false
    }

    fn queries_per_tile(&self, sizes: Sizes, cache: Cached<'_>, num_tokens: usize) -> usize {
        #[cfg(target_arch = "x86_64")]
        if self.has_tiles_for(sizes, cache) {
            let num_tasks = (self.threads() * TASKS_PER_THREAD).div_ceil(sizes.num_kv_heads);
            return tile_attention::queries_per_tile(sizes.group(), num_tokens, num_tasks);
        }
        let _ = (cache, num_tokens); // other kernels do not care
        queries_per_tile(sizes.group())
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
