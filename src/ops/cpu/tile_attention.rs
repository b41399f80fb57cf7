//! Causal attention over a paged cache of bf16, bytes or FP8 on AMX tiles.
//!
//! The same tasks as `attention`. Scores are `K·Qᵀ`: sixteen cached keys are a left operand
//! where they lie in their block, queries are packed once per task as right operands. An
//! accumulator has a row per key and a lane per query, which is what `tile_softmax` turns into
//! pairs of weights, and those are right operands again: sums are `Vᵀ·P`, a row per element of
//! the head and a lane per query. Only values are rearranged, once per task and KV tile; bytes
//! and FP8 are converted to bf16 then, keys too. Where a task has sixteen query rows at most,
//! that would be most of its work: then weights are turned, sums are `P·V` with a row per query,
//! which has the same bits, and they are turned at the end of a part. The scale of a key of
//! bytes multiplies its row of scores, that of a value the value. `tile_pipeline` says in which
//! order all of it is done.
//!
//! Queries (times the scale), keys, values and weights are bf16; scores, totals and sums are
//! f32. KV tiles start at multiples of [`KV_TILE`] positions, and a query's lane never meets
//! another one's, so that a result depends on the query's own position and sequence alone. A
//! value that a query cannot see is multiplied by an exact 0; values that no query of the task
//! can see are taken as 0, and keys that it cannot see may be anything.

use std::arch::x86_64::*;
use std::ops::Range;

use super::amx::{Amx, TILE_LEN, TILE_ROWS, Tiles};
use super::attention::{Attend, AttendTile, Sizes};
use super::avx512::transpose16;
use super::context_parts::{Base, Partial, State, parts_of, within};
use super::kv_rows::Cached;
use super::tile_cache::{CHUNKS, Cache, KV_TILE, MAX_HEAD_DIM, element_of};
use super::tile_pack::pack;
use super::tile_pipeline::{KvTile, Pipeline, Room, Stage, chunks, plan};
use super::tile_rows;
use super::tile_softmax::{CHUNK, Column, Scores, Weights, join_sums, turn};
use super::tile_sums::{Sides, SixteenKeys};

/// Query rows of a task when there are enough for all threads; values are rearranged once for
/// so many.
const MOST_ROWS: usize = 512;
const FEWEST_ROWS: usize = 64;

/// Whether tiles can be used for such heads and such a cache.
pub fn fits(sizes: Sizes, cache: Cached<'_>) -> bool {
    let Sizes { head_dim, value_dim, .. } = sizes;
    let is_right = head_dim.is_multiple_of(32) && head_dim <= MAX_HEAD_DIM;
    tile_rows::fits(cache) && is_right && value_dim == head_dim
}

/// Queries that one task takes for heads in groups of `group`, when `num_queries` should make
/// `num_tasks` tasks.
pub fn queries_per_tile(group: usize, num_queries: usize, num_tasks: usize) -> usize {
    ((num_queries * group / num_tasks).clamp(FEWEST_ROWS, MOST_ROWS) / group).max(1)
}

/// Runs a task whose heads and cache are as [`fits`] demands.
pub fn attend_on_tiles(amx: Amx, attend: Attend<'_>) {
    let Attend { task, partial, next, scratch } = attend;
    let (columns, dim) = (columns(&task), task.sizes.head_dim);
    let seen = match &partial {
        Some(partial) => within(&task.seen(), partial.part),
        None => task.seen(),
    };
    let is_joined = partial.is_none() && (parts_of(&seen).len() > 1 || task.sinks.is_some());
    let lengths = Lengths::new(columns.len(), dim, is_joined);
    // Turning the weights of one column costs less than turning values.
    let sides = match columns.len() {
        1 => Sides::WeightsByValues,
        _ => Sides::ValuesByWeights,
    };
    let mut pass = Pass {
        task: &task,
        cache: Cache::new(&task, seen),
        next: next.as_ref().map(|(next, seen)| Cache::new(next, seen.clone())),
        buffers: Buffers::new(scratch.take_words(lengths.total()), &lengths),
        sides,
        columns,
        stages: Vec::new(),
    };
    // SAFETY: the token proves that the instructions exist.
    unsafe { pass.run(amx, partial, is_joined) }
}

/// Query rows of a task in tiles of sixteen; the last row is repeated to fill the last one.
fn columns(task: &AttendTile<'_>) -> Vec<Column> {
    let group = task.sizes.group();
    let rows = task.queries.len() * group;
    let position = |row: usize| task.first_position + row.min(rows - 1) / group;
    let column = |tile| std::array::from_fn(|lane| position(tile * TILE_ROWS + lane));
    (0..rows.div_ceil(TILE_ROWS)).map(|tile| Column::new(column(tile), task.window)).collect()
}

/// Words of each buffer of a task.
struct Lengths {
    queries: usize,
    sums: usize,
    scores: usize,
    weights: usize,
    values: usize,
    keys: usize,
    wide: usize,
    joined: usize,
}

impl Lengths {
    fn new(num_columns: usize, dim: usize, is_joined: bool) -> Lengths {
        let steps = dim / 32;
        let sums = num_columns * 2 * steps * TILE_LEN;
        Lengths {
            queries: num_columns * steps * TILE_LEN,
            sums,
            scores: 2 * 2 * TILE_LEN,
            weights: 2 * CHUNKS * TILE_LEN,
            values: 2 * steps * CHUNKS * TILE_LEN,
            keys: KV_TILE * dim / 2,
            wide: CHUNK * dim / 2,
            joined: if is_joined { sums } else { 0 },
        }
    }

    fn total(&self) -> usize {
        let operands = self.queries + self.weights + self.values + self.keys;
        operands + self.sums + self.joined + self.scores + self.wide
    }
}

/// The scratch of a task.
struct Buffers<'a> {
    /// `[columns, head_dim / 32]` right operands.
    queries: &'a mut [u32],
    /// `[columns, head_dim / 16]` accumulators of this part, with rows as `sides` says; at its end,
    /// a row per element of the head.
    sums: &'a mut [[u32; TILE_LEN]],
    /// Of two stages.
    scores: &'a mut [Scores; 2],
    /// Of two columns.
    weights: &'a mut [[Weights; CHUNKS]; 2],
    /// `[head_dim / 16, CHUNKS]` operands, as `sides` says.
    values: &'a mut [[u32; TILE_LEN]],
    /// `[KV_TILE, head_dim]` bf16: keys that do not lie sixteen in a row, or were converted.
    keys: &'a mut [u32],
    /// `[CHUNK, head_dim]` bf16: values that were converted.
    wide: &'a mut [u32],
    /// As `sums`, of all parts before; empty when nothing is joined.
    joined: &'a mut [[u32; TILE_LEN]],
}

impl<'a> Buffers<'a> {
    fn new(words: &'a mut [u32], lengths: &Lengths) -> Buffers<'a> {
        let (queries, rest) = words.split_at_mut(lengths.queries);
        let (sums, rest) = rest.split_at_mut(lengths.sums);
        let (scores, rest) = rest.split_at_mut(lengths.scores);
        let (weights, rest) = rest.split_at_mut(lengths.weights);
        let (values, rest) = rest.split_at_mut(lengths.values);
        let (keys, rest) = rest.split_at_mut(lengths.keys);
        let (wide, joined) = rest.split_at_mut(lengths.wide);
        joined.fill(0);
        let scores = scores.as_chunks_mut().0.as_chunks_mut().0.as_chunks_mut().0;
        let weights: &mut [Weights] = weights.as_chunks_mut().0.as_chunks_mut().0;
        Buffers {
            queries,
            sums: sums.as_chunks_mut().0,
            scores: &mut scores[0],
            weights: &mut weights.as_chunks_mut().0.as_chunks_mut().0[0],
            values: values.as_chunks_mut().0,
            keys,
            wide,
            joined: joined.as_chunks_mut().0,
        }
    }
}

/// A task that leads all its queries past its keys and values.
struct Pass<'a> {
    task: &'a AttendTile<'a>,
    cache: Cache<'a>,
    /// What the next task will read.
    next: Option<Cache<'a>>,
    buffers: Buffers<'a>,
    /// How weights and values are multiplied.
    sides: Sides,
    columns: Vec<Column>,
    stages: Vec<Stage>,
}

impl Pass<'_> {
    /// Computes what the task asks for: one part, or all of them and the queries' results.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn run(&mut self, amx: Amx, partial: Option<Partial<'_>>, is_joined: bool) {
        self.pack_queries(amx);
        let mut tiles = Tiles::open(amx);
        if let Some(partial) = partial {
            self.attend_part(&mut tiles, partial.part);
            return self.leave(partial);
        }
        let mut states = self.initial_states();
        for part in parts_of(&self.cache.seen) {
            self.attend_part(&mut tiles, part);
            if is_joined {
                self.join(&mut states);
            } else {
                states = self.columns.iter().map(Column::states).collect();
            }
        }
        let sums = if is_joined { &*self.buffers.joined } else { &*self.buffers.sums };
        let sums = sums.chunks_exact(self.cache.dim / TILE_ROWS);
        for (tile, (states, sums)) in states.iter().zip(sums).enumerate() {
            write_out(self.task, tile, (sums, self.buffers.wide), states);
        }
    }

    /// What the queries of every tile start with.
    fn initial_states(&self) -> Vec<[State; TILE_ROWS]> {
        let group = self.task.sizes.group();
        let state = |row: usize| self.task.initial_state(row % group, Base::Two);
        let tile = |tile| std::array::from_fn(|lane| state(tile * TILE_ROWS + lane));
        (0..self.columns.len()).map(tile).collect()
    }

    /// Joins the part to those before.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn join(&mut self, states: &mut [[State; TILE_ROWS]]) {
        let tiles = self.cache.dim / TILE_ROWS;
        let Buffers { joined, sums, .. } = &mut self.buffers;
        let sums = joined.chunks_exact_mut(tiles).zip(sums.chunks_exact(tiles));
        for ((states, column), (joined, sums)) in states.iter_mut().zip(&self.columns).zip(sums) {
            let mut factors = [[0.0; TILE_ROWS]; 2];
            for (lane, (state, part)) in states.iter_mut().zip(column.states()).enumerate() {
                let (joined, [a, b]) = state.join(part, Base::Two);
                *state = joined;
                factors[0][lane] = a;
                factors[1][lane] = b;
            }
            let rows = sums.as_flattened().as_chunks().0;
            join_sums(joined.as_flattened_mut().as_chunks_mut().0, rows, factors);
        }
    }

    /// Leads all queries past one part, from a fresh start.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn attend_part(&mut self, tiles: &mut Tiles, part: usize) {
        self.columns.iter_mut().for_each(Column::restart);
        let Range { start: begin, end } = within(&self.cache.seen, part);
        for start in (begin - begin % KV_TILE..end).step_by(KV_TILE) {
            let (keys, scales) = self.gather(start);
            if start + KV_TILE >= self.cache.seen.end {
                self.prefetch_next();
            }
            plan(&self.columns, start, &mut self.stages);
            let Buffers { queries, sums, scores, weights, values, .. } = &mut self.buffers;
            let (scales, sides) = (scales.as_ref(), self.sides);
            let mut pipeline = Pipeline {
                columns: &mut self.columns,
                room: Room { queries, sums, scores, weights },
                kv: KvTile { start, keys: &keys, scales, values, sides },
                steps: self.cache.dim / 32,
                cap: self.task.softcap,
                biases: [[0.0; TILE_ROWS]; 2],
            };
            pipeline.run(tiles, &self.stages);
        }
        self.finish_sums();
    }

    /// Brings keys and values of the KV tile at `start` to where tiles read them, and asks for
    /// those of the next one. Returns the keys, and what their scores must be multiplied by.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn gather(&mut self, start: usize) -> ([[SixteenKeys; 2]; CHUNKS], Option<[f32; KV_TILE]>) {
        let none = SixteenKeys { start: self.buffers.keys.as_ptr().cast(), stride: 0 };
        let mut keys = [[none; 2]; CHUNKS];
        let (mut scales, mut has_scales) = ([1.0; KV_TILE], false);
        for chunk in chunks(&self.cache.seen, start) {
            let position = start + chunk * CHUNK;
            let Buffers { keys: room, values, wide, .. } = &mut self.buffers;
            let room = &mut room[chunk * CHUNK * self.cache.dim / 2..];
            keys[chunk] = self.cache.keys(position, room);
            let scales = &mut scales[chunk * CHUNK..][..CHUNK];
            has_scales |= self.cache.key_scales(position, scales);
            let values = &mut values[chunk..];
            match self.sides {
                Sides::ValuesByWeights => self.cache.transpose_values(position, wide, values),
                Sides::WeightsByValues => self.cache.interleave_values(position, wide, values),
            }
            self.cache.prefetch(position + KV_TILE);
        }
        (keys, has_scales.then_some(scales))
    }

    /// Asks for what the next task reads first; nothing else would know where that lies.
    fn prefetch_next(&self) {
        let Some(next) = &self.next else { return };
        let start = next.seen.start - next.seen.start % CHUNK;
        for chunk in 0..CHUNKS {
            next.prefetch(start + chunk * CHUNK);
        }
    }

    /// Gives the sums of a part a row per element, and zeros where there are none.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn finish_sums(&mut self) {
        let sums = self.buffers.sums.chunks_exact_mut(self.cache.dim / TILE_ROWS);
        for (column, sums) in self.columns.iter().zip(sums) {
            if !column.has_sums {
                sums.as_flattened_mut().fill(0);
            } else if self.sides == Sides::WeightsByValues {
                for sums in sums.as_chunks_mut().0 {
                    turn_sums(sums);
                }
            }
        }
    }

    /// Rounds the queries, times the scale, to bf16. Scores are powers of two, or will be once
    /// they are capped.
    #[target_feature(enable = "avx512f")]
    fn pack_queries(&mut self, amx: Amx) {
        let dim = self.cache.dim;
        let unit = self.task.softcap.map_or(std::f32::consts::LOG2_E, |cap| 1.0 / cap);
        let scale = self.task.scale * unit;
        let mut rows = self.task.queries.rows().flat_map(|query| {
            let heads = &self.task.q[self.task.heads_of(query)];
            heads.chunks_exact(dim)
        });
        // Rows are read from end to end, so that the processor sees what comes next.
        let scaled = &mut self.buffers.wide[..TILE_ROWS * dim];
        let factors = _mm512_set1_ps(scale);
        scaled.fill(0);
        for words in self.buffers.queries.chunks_exact_mut(dim / 32 * TILE_LEN) {
            for (to, row) in scaled.chunks_exact_mut(dim).zip(rows.by_ref()) {
                let row = row.as_chunks::<TILE_ROWS>().0;
                for (to, x) in to.as_chunks_mut::<TILE_ROWS>().0.iter_mut().zip(row) {
                    // SAFETY: sixteen elements are read and as many words written.
                    unsafe {
                        let x = _mm512_mul_ps(_mm512_loadu_ps(x.as_ptr()), factors);
                        _mm512_storeu_ps(to.as_mut_ptr().cast(), x);
                    }
                }
            }
            pack(amx, scaled, dim, words);
        }
    }

    /// Leaves a part to be joined later.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn leave(&mut self, mut partial: Partial<'_>) {
        let dim = self.cache.dim;
        let rows = self.task.queries.len() * self.task.sizes.group();
        let sums = self.buffers.sums.chunks_exact(dim / TILE_ROWS);
        for (tile, (column, sums)) in self.columns.iter().zip(sums).enumerate() {
            let rows_of_tile = tile * TILE_ROWS..rows.min((tile + 1) * TILE_ROWS);
            for (row, state) in rows_of_tile.clone().zip(column.states()) {
                partial.put_state(row, state);
            }
            let to = partial.sums(rows);
            for_lines(sums, |at, lines| {
                for (row, line) in rows_of_tile.clone().zip(lines) {
                    store(&mut to[row * dim + at..][..TILE_ROWS], line);
                }
            });
        }
    }
}

/// Sums of 32 interleaved elements with a row per query, as two tiles with a row per element.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn turn_sums(sums: &mut [[u32; TILE_LEN]; 2]) {
    let mut rows = [[0; TILE_ROWS]; 2 * TILE_ROWS];
    for (tile, is_high) in sums.iter().zip([false, true]) {
        let mut tile = *tile.as_chunks().0.first_chunk().expect("a tile has sixteen rows");
        turn(&mut tile);
        for (i, row) in tile.into_iter().enumerate() {
            rows[element_of(i, is_high)] = row;
        }
    }
    sums.as_flattened_mut().copy_from_slice(rows.as_flattened());
}

/// Calls `visit` with the sums of one column of queries: an element's index, and sixteen lines of
/// sixteen elements from it on, one line per query.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn for_lines(sums: &[[u32; TILE_LEN]], mut visit: impl FnMut(usize, [__m512; TILE_ROWS])) {
    for (tile, sums) in sums.iter().enumerate() {
        let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
        // SAFETY: rows have sixteen words; the instructions exist here.
        let lines = unsafe {
            for (line, sums) in lines.iter_mut().zip(sums.as_chunks::<TILE_ROWS>().0) {
                *line = _mm512_loadu_ps(sums.as_ptr().cast());
            }
            transpose16(lines)
        };
        visit(tile * TILE_ROWS, lines);
    }
}

/// Writes the results of one column of queries, as `write_means` does. `room` has a row per query,
/// so that results are written from end to end.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn write_out(
    task: &AttendTile<'_>,
    column: usize,
    (sums, room): (&[[u32; TILE_LEN]], &mut [u32]),
    states: &[State; TILE_ROWS],
) {
    let (dim, group) = (task.sizes.head_dim, task.sizes.group());
    let rows = column * TILE_ROWS..task.queries.len() * group;
    for_lines(sums, |at, lines| {
        for (row, line) in room.chunks_exact_mut(dim).zip(lines) {
            // SAFETY: sixteen words are written.
            unsafe { _mm512_storeu_ps(row[at..][..TILE_ROWS].as_mut_ptr().cast(), line) }
        }
    });
    for ((row, sums), state) in rows.zip(room.chunks_exact(dim)).zip(states) {
        let at = task.heads_of(task.queries.row(row / group)).start + row % group * dim;
        // SAFETY: this task alone writes these heads of these rows.
        let out = unsafe { task.out.part(at..at + dim) };
        let inverse = _mm512_set1_ps(1.0 / state.total);
        for (out, sum) in out.chunks_exact_mut(TILE_ROWS).zip(sums.as_chunks::<TILE_ROWS>().0) {
            // SAFETY: sixteen words are read.
            let sum = unsafe { _mm512_loadu_ps(sum.as_ptr().cast()) };
            store(out, _mm512_mul_ps(_mm512_add_ps(sum, _mm512_setzero_ps()), inverse));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32], line: __m512) {
    assert!(to.len() == TILE_ROWS);
    // SAFETY: sixteen elements are writable.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), line) }
}
