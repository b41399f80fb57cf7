//! How attention is cut into tasks: some queries of one sequence and one KV head each; when that
//! makes too few, a part of the context each; and of a part that several sequences have in common,
//! one task for the queries of all of them.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::PoisonError;

use super::CpuOps;
use super::attention::{Attend, AttendTile, Sizes, queries_per_tile};
use super::context_parts::{Base, JoinParts, PART, Partial, Piece, within};
#[cfg(target_arch = "x86_64")]
use super::isa::Isa;
use super::kv_rows::Cached;
use super::partition::TASKS_PER_THREAD;
use super::share::{Parts, Scratch};
use super::shared_parts::{BlockTables, QueryTile, SharedParts};
#[cfg(target_arch = "x86_64")]
use super::tile_attention;
use crate::ops::args::{AttentionArgs, LatentAttentionArgs};
use crate::tensor::View;

/// Numbers that parts may leave to be joined, per thread: 1 MiB.
const PARTIAL_LEN_PER_THREAD: usize = 1 << 18;

/// Query heads that a task of latent attention has at least, where they are cut to occupy threads:
/// what it takes to widen and transpose a vector is little beside as many heads.
const FEWEST_LATENT_HEADS: usize = 16;
/// Those that it has at most: sums of 64 heads of 512 elements fit the second-level cache twice.
const MOST_LATENT_HEADS: usize = 64;

/// A batch of queries, and the cache that they see.
struct Attended<'a> {
    q: View<'a>,
    out: Parts<'a, f32>,
    k_cache: Cached<'a>,
    v_cache: Option<Cached<'a>>,
    sizes: Sizes,
    block_tables: View<'a>,
    cu_seqlens_q: View<'a>,
    context_lens: View<'a>,
    scale: f32,
    window: usize,
    softcap: Option<f32>,
    sinks: Option<&'a [f32]>,
}

/// What a task leads past keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lead {
    /// The queries of a tile.
    Tile(usize),
    /// Those of several tiles, past a part that all of them see.
    Shared(usize),
}

/// A task of one KV head.
#[derive(Clone, Copy, Debug)]
struct Task {
    lead: Lead,
    kv_head: usize,
    /// With a part, only that, to be left in these numbers of `partials`.
    part: Option<(usize, (usize, usize))>,
}

/// A tile that was cut, one KV head of it.
struct Join {
    tile: usize,
    kv_head: usize,
    /// What its parts leave.
    pieces: Range<usize>,
}

/// What one call computes; kept to be filled again by the next one.
#[derive(Default)]
pub struct AttentionPlan {
    tiles: Vec<QueryTile>,
    shared: SharedParts,
    tasks: Vec<Task>,
    joins: Vec<Join>,
    pieces: Vec<Piece>,
    partials: Scratch,
}

impl AttentionPlan {
    /// Makes a task of every tile and KV head; of parts that several tiles share, one for all of
    /// them; and one of each part of a tile as long as threads would have too little to do.
    /// Returns how many numbers parts leave.
    fn cut(
        &mut self,
        sizes: Sizes,
        window: usize,
        tables: BlockTables<'_>,
        threads: usize,
    ) -> usize {
        let AttentionPlan { tiles, shared, tasks, joins, pieces, .. } = self;
        tasks.clear();
        joins.clear();
        pieces.clear();
        let most_numbers = threads * PARTIAL_LEN_PER_THREAD;
        shared.find(tiles, sizes, window, tables, most_numbers);
        let len = |queries: usize| Partial::len(queries * sizes.group(), sizes.value_dim);
        let mut numbers = 0;
        for (i, group) in shared.groups.iter().enumerate() {
            for kv_head in 0..sizes.num_kv_heads {
                let room = SharedParts::room(sizes, group, kv_head);
                numbers = room.0 + room.1;
                tasks.push(Task { lead: Lead::Shared(i), kv_head, part: Some((group.part, room)) });
            }
        }
        let is_short = threads > 1 && tiles.len() * sizes.num_kv_heads < threads * TASKS_PER_THREAD;
        for (i, tile) in tiles.iter().enumerate() {
            let (parts, num_queries) = (tile.parts(window), tile.queries.len());
            let room = sizes.num_kv_heads * parts.len() * len(num_queries);
            let is_cut = shared.has(i)
                || is_short
                    && parts.len() > 1
                    && tile.has_few_rows(sizes)
                    && numbers + room <= most_numbers;
            for kv_head in 0..sizes.num_kv_heads {
                let lead = Lead::Tile(i);
                if !is_cut {
                    tasks.push(Task { lead, kv_head, part: None });
                    continue;
                }
                let first_piece = pieces.len();
                for part in parts.clone() {
                    if let Some((group, query)) = shared.place(i, part) {
                        pieces.push(shared.piece(sizes, group, kv_head, query));
                        continue;
                    }
                    let (start, rows) = (numbers, num_queries * sizes.group());
                    numbers += len(num_queries);
                    let part = Some((part, (start, len(num_queries))));
                    tasks.push(Task { lead, kv_head, part });
                    pieces.push(Piece { start, rows, first_row: 0 });
                }
                joins.push(Join { tile: i, kv_head, pieces: first_piece..pieces.len() });
            }
        }
        // What was not cut takes longest, then what is shared.
        tasks.sort_by_key(|task| (task.part.is_some(), matches!(task.lead, Lead::Tile(_))));
        numbers
    }
}

impl CpuOps {
    pub(super) fn attend(&self, args: AttentionArgs<'_>) {
        let (num_kv_heads, head_dim) = (args.k_cache.size(1), args.q.size(2));
        self.attend_all(&Attended {
            sizes: Sizes {
                num_heads: args.q.size(1),
                num_kv_heads,
                cache_heads: num_kv_heads,
                head_dim,
                value_dim: head_dim,
                block_size: args.k_cache.size(2),
            },
            q: args.q,
            out: Parts::new(args.out.into_mut_slice()),
            k_cache: Cached::of(args.k_cache),
            v_cache: Some(Cached::of(args.v_cache)),
            block_tables: args.block_tables,
            cu_seqlens_q: args.cu_seqlens_q,
            context_lens: args.context_lens,
            scale: args.scale,
            window: args.sliding_window.unwrap_or(usize::MAX),
            softcap: args.softcap,
            sinks: args.sinks.map(View::as_slice),
        });
    }

    /// The same with one vector as key and value of all heads, which tasks share among them.
    pub(super) fn attend_latents(&self, args: LatentAttentionArgs<'_>) {
        let (num_rows, num_heads) = (args.q.size(0), args.q.size(1));
        self.attend_all(&Attended {
            sizes: Sizes {
                num_heads,
                num_kv_heads: num_head_groups(num_heads, num_rows, self.threads()),
                cache_heads: 1,
                head_dim: args.q.size(2),
                value_dim: args.out.size(2),
                block_size: args.cache.size(2),
            },
            q: args.q,
            out: Parts::new(args.out.into_mut_slice()),
            k_cache: Cached::of(args.cache),
            v_cache: None,
            block_tables: args.block_tables,
            cu_seqlens_q: args.cu_seqlens_q,
            context_lens: args.context_lens,
            scale: args.scale,
            window: usize::MAX,
            softcap: None,
            sinks: None,
        });
    }

    fn attend_all(&self, args: &Attended<'_>) {
        let &Attended { k_cache, v_cache, sizes, window, sinks, ref out, .. } = args;
        let mut plan = self.attention_plan.lock().unwrap_or_else(PoisonError::into_inner);
        let per_tile = self.queries_per_tile(sizes, k_cache, args.q.size(0));
        let tables = BlockTables::of(args.block_tables, sizes.block_size);
        plan_queries(&mut plan.tiles, args, per_tile);
        let num_numbers = plan.cut(sizes, window, tables, self.threads());
        let AttentionPlan { tiles, shared, tasks, joins, pieces, partials } = &mut *plan;
        let partials = partials.take(num_numbers);
        let q = args.q.as_slice::<f32>();
        let task = |lead: Lead, kv_head: usize| {
            let (seq, queries, first_position, window) = match lead {
                Lead::Tile(tile) => {
                    let tile = &tiles[tile];
                    (tile.seq, tile.run(), tile.first_position, window)
                }
                // All of them see the whole part, wherever they are.
                Lead::Shared(group) => {
                    let group = &shared.groups[group];
                    let last = (group.part + 1) * PART - 1;
                    (group.seq, shared.queries(group), last, usize::MAX)
                }
            };
            AttendTile {
                q,
                k_cache,
                v_cache,
                out,
                sizes,
                block_table: tables.of_seq(seq),
                kv_head,
                queries,
                first_position,
                scale: args.scale,
                window,
                softcap: args.softcap,
                sinks,
            }
        };
        let rooms = Parts::new(&mut *partials);
        self.pool.run(tasks.len(), |thread, i| {
            let Task { lead, kv_head, part } = tasks[i];
            let partial = part.map(|(part, (start, len))| Partial {
                part,
                // SAFETY: tasks have different rooms.
                numbers: unsafe { rooms.part(start..start + len) },
            });
            let scratch = &mut self.scratch.lock(thread)[0];
            let next = tasks.get(i + 1).map(|next| {
                let task = task(next.lead, next.kv_head);
                let seen = task.seen();
                let seen = next.part.map_or(seen.clone(), |(part, _)| within(&seen, part));
                (task, seen)
            });
            self.attend_tile(Attend { task: task(lead, kv_head), partial, next, scratch });
        });
        let base = if self.has_tiles_for(sizes, k_cache) { Base::Two } else { Base::E };
        self.pool.run(joins.len(), |thread, i| {
            let Join { tile, kv_head, pieces: range } = &joins[i];
            let (task, pieces) = (task(Lead::Tile(*tile), *kv_head), &pieces[range.clone()]);
            let scratch = &mut self.scratch.lock(thread)[0];
            self.isa.run(JoinParts { task, partials, pieces, base, scratch });
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

/// How many groups the heads of latent attention make: as few as tasks can have, more where
/// `num_rows` queries alone would leave threads without work. Each divides the heads.
fn num_head_groups(num_heads: usize, num_rows: usize, threads: usize) -> usize {
    let fits = |&groups: &usize| {
        num_heads.is_multiple_of(groups) && num_heads / groups <= MOST_LATENT_HEADS
    };
    let mut groups = (1..=num_heads).find(fits).unwrap_or(num_heads);
    while num_rows * groups < threads
        && (num_heads / groups).is_multiple_of(2)
        && num_heads / groups >= 2 * FEWEST_LATENT_HEADS
    {
        groups *= 2;
    }
    groups
}

/// Cuts every sequence's queries into tiles, those with most work first. Panics when the
/// sequences overlap or own rows that are not there: tasks rely on it.
fn plan_queries(tiles: &mut Vec<QueryTile>, args: &Attended<'_>, per_tile: usize) {
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
