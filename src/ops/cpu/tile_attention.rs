//! Causal attention over a paged cache of bf16, bytes or FP8 on AMX tiles.
//!
//! The same tasks as `attention`. Scores are `K·Qᵀ`: sixteen cached keys are a left operand
//! where they lie in their block, queries are packed once per task as right operands. An
//! accumulator has a row per key and a lane per query, which is what `tile_softmax` turns into
//! pairs of weights, and those are right operands again: sums are `Vᵀ·P`, a row per element of
//! the head and a lane per query. Only values are rearranged, once per task and KV tile; bytes
//! and FP8 are converted to bf16 then, keys too. The scale of a key of bytes multiplies its row
//! of scores, that of a value the value.
//!
//! Queries (times the scale), keys, values and weights are bf16; scores, totals and sums are
//! f32. KV tiles start at multiples of [`KV_TILE`] positions, and a query's lane never meets
//! another one's, so that a result depends on the query's own position and sequence alone. A
//! value that a query cannot see is multiplied by an exact 0; values that no query of the task
//! can see are taken as 0, and keys that it cannot see may be anything.

use std::arch::x86_64::*;
use std::ops::Range;

use super::amx::{Amx, Bf16, ROW_BYTES, TILE_BYTES, TILE_LEN, TILE_ROWS, Tiles};
use super::attention::{Attend, AttendTile, Sizes};
use super::avx512::transpose16;
use super::context_parts::{Base, Partial, State, parts_of, within};
use super::kv_rows::Cached;
use super::tile_cache::{CHUNKS, Cache, KV_TILE, MAX_HEAD_DIM, left};
use super::tile_pack::pack;
use super::tile_products::{Left, Right};
use super::tile_rows::{self, TileRows};
use super::tile_softmax::{CHUNK, Column, Sums, join_sums, limit, rescale, rows_in};

/// Query rows of a task when there are enough for all threads; values are rearranged once for
/// so many.
const MOST_ROWS: usize = 256;
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
    let Attend { task, partial, scratch } = attend;
    let (columns, dim) = (columns(&task), task.sizes.head_dim);
    let keys = TileRows::new(task.k_cache, dim).without_scales();
    let v_cache = task.v_cache.expect("tiles read values from a cache of their own");
    let values = TileRows::new(v_cache, dim);
    let seen = match &partial {
        Some(partial) => within(&task.seen(), partial.part),
        None => task.seen(),
    };
    let is_joined = partial.is_none() && (parts_of(&seen).len() > 1 || task.sinks.is_some());
    let lengths = Lengths::new(columns.len(), dim, is_joined);
    let mut pass = Pass {
        task: &task,
        cache: Cache { task: &task, keys, values, dim, seen },
        buffers: Buffers::new(scratch.take_words(lengths.total()), &lengths),
        columns,
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
    fn new(num_tiles: usize, dim: usize, is_joined: bool) -> Lengths {
        let steps = dim / 32;
        let sums = num_tiles.div_ceil(2) * steps * 4 * TILE_LEN;
        Lengths {
            queries: num_tiles * steps * TILE_LEN,
            sums,
            scores: CHUNKS * 4 * TILE_LEN,
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
    /// `[tiles, head_dim / 32]` right operands.
    queries: &'a mut [u32],
    /// `[pairs of tiles, head_dim / 32]` accumulators of this part: a row per element of the head.
    sums: &'a mut [Sums],
    /// `[CHUNKS]` accumulators of a pair of tiles: a row per key.
    scores: &'a mut [Sums],
    /// `[2, CHUNKS]` right operands.
    weights: &'a mut [[u32; TILE_LEN]],
    /// `[head_dim / 16, CHUNKS]` left operands: a row per element of the head.
    values: &'a mut [[u32; TILE_LEN]],
    /// `[KV_TILE, head_dim]` bf16: keys that do not lie sixteen in a row, or were converted.
    keys: &'a mut [u32],
    /// `[CHUNK, head_dim]` bf16: values that were converted.
    wide: &'a mut [u32],
    /// As `sums`, of all parts before; empty when nothing is joined.
    joined: &'a mut [Sums],
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
        Buffers {
            queries,
            sums: sums.as_chunks_mut().0.as_chunks_mut().0,
            scores: scores.as_chunks_mut().0.as_chunks_mut().0,
            weights: weights.as_chunks_mut().0,
            values: values.as_chunks_mut().0,
            keys,
            wide,
            joined: joined.as_chunks_mut().0.as_chunks_mut().0,
        }
    }
}

/// The keys of one KV tile.
#[derive(Clone, Copy)]
struct Keys<'a> {
    /// Left operands.
    keys: &'a [Left; CHUNKS],
    /// What their scores are multiplied by.
    scales: Option<&'a [f32; KV_TILE]>,
}

/// A task that leads all its queries past its keys and values.
struct Pass<'a> {
    task: &'a AttendTile<'a>,
    cache: Cache<'a>,
    buffers: Buffers<'a>,
    columns: Vec<Column>,
}

impl Pass<'_> {
    /// Computes what the task asks for: one part, or all of them and the queries' results.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
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
        for (tile, states) in states.iter().enumerate() {
            write_out(self.task, (sums, tile), states);
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
        let steps = self.cache.dim / 32;
        for (tile, (states, column)) in states.iter_mut().zip(&self.columns).enumerate() {
            let mut factors = [[0.0; TILE_ROWS]; 2];
            for (lane, (state, part)) in states.iter_mut().zip(column.states()).enumerate() {
                let (joined, [a, b]) = state.join(part, Base::Two);
                *state = joined;
                factors[0][lane] = a;
                factors[1][lane] = b;
            }
            let pair = tile / 2 * steps..(tile / 2 + 1) * steps;
            let Buffers { joined, sums, .. } = &mut self.buffers;
            join_sums(&mut joined[pair.clone()], &mut sums[pair], tile % 2, factors);
        }
    }

    /// Leads all queries past one part, from a fresh start.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn attend_part(&mut self, tiles: &mut Tiles, part: usize) {
        self.buffers.sums.as_flattened_mut().as_flattened_mut().fill(0);
        self.columns.iter_mut().for_each(Column::restart);
        let Range { start: begin, end } = within(&self.cache.seen, part);
        for start in (begin - begin % KV_TILE..end).step_by(KV_TILE) {
            let mut keys = [left(self.buffers.keys.as_ptr().cast(), 0); CHUNKS];
            let (mut scales, mut has_scales) = ([1.0; KV_TILE], false);
            for chunk in chunks(&self.cache.seen, start) {
                let position = start + chunk * CHUNK;
                let Buffers { keys: room, values, wide, .. } = &mut self.buffers;
                let room = &mut room[chunk * CHUNK * self.cache.dim / 2..];
                keys[chunk] = self.cache.keys(position, room);
                let scales = &mut scales[chunk * CHUNK..][..CHUNK];
                has_scales |= self.cache.key_scales(position, scales);
                self.cache.transpose_values(position, wide, &mut values[chunk..]);
                self.cache.prefetch(position + KV_TILE);
            }
            let keys = Keys { keys: &keys, scales: has_scales.then_some(&scales) };
            for pair in 0..self.columns.len().div_ceil(2) {
                self.attend_pair(tiles, pair, start, keys);
            }
        }
    }

    /// Rounds the queries, times the scale, to bf16. Scores are powers of two, or will be once
    /// they are capped.
    fn pack_queries(&mut self, amx: Amx) {
        let dim = self.cache.dim;
        let unit = self.task.softcap.map_or(std::f32::consts::LOG2_E, |cap| 1.0 / cap);
        let (group, scale) = (self.task.sizes.group(), self.task.scale * unit);
        let mut rows = self.task.queries.rows().flat_map(|query| {
            let heads = &self.task.q[self.task.heads_of(query)];
            (0..group).map(move |head| &heads[head * dim..][..dim])
        });
        let mut scaled = [0.0; TILE_ROWS * MAX_HEAD_DIM];
        let scaled = &mut scaled[..TILE_ROWS * dim];
        for words in self.buffers.queries.chunks_exact_mut(dim / 32 * TILE_LEN) {
            for (to, row) in scaled.chunks_exact_mut(dim).zip(rows.by_ref()) {
                for (to, x) in to.iter_mut().zip(row) {
                    *to = x * scale;
                }
            }
            pack(amx, scaled, dim, words);
        }
    }

    /// Leads two tiles of queries past one KV tile.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn attend_pair(&mut self, tiles: &mut Tiles, pair: usize, start: usize, keys: Keys<'_>) {
        let steps = self.cache.dim / 32;
        let columns = 2 * pair..self.columns.len().min(2 * pair + 2);
        let last = self.columns[columns.end - 1].seen().end;
        let chunks = chunks(&(self.columns[columns.start].seen().start..last), start);
        if chunks.is_empty() {
            return;
        }
        let Buffers { queries, sums, scores, weights, values, .. } = &mut self.buffers;
        let query = |tile: usize| right(queries[tile * steps * TILE_LEN..].as_ptr().cast());
        for chunk in chunks.clone() {
            tiles.clear();
            // SAFETY: sixteen rows of keys are readable at both halves, and queries have all
            // their steps.
            unsafe { multiply(tiles, keys.keys[chunk], columns.clone().map(query), steps) };
            tiles.store(&mut scores[chunk]);
        }
        let first_key = start + chunks.start * CHUNK;
        let scales = keys.scales.map(|scales| &scales[chunks.start * CHUNK..]);
        let scores = &mut scores[chunks.clone()];
        let sums = &mut sums[pair * steps..(pair + 1) * steps];
        for (i, column) in self.columns[columns.clone()].iter_mut().enumerate() {
            let weights = &mut weights[i * CHUNKS..(i + 1) * CHUNKS][chunks.clone()];
            let mut scales = scales;
            if let Some(cap) = self.task.softcap {
                limit((&mut *scores, scales.take()), i, cap);
            }
            if let Some(factors) = column.weigh(first_key, (&mut *scores, scales), i, weights) {
                rescale(sums, i, &factors);
            }
        }
        let weight = |i: usize| right(weights[i * CHUNKS + chunks.start..].as_ptr().cast());
        let value = |row: usize| values[row * CHUNKS + chunks.start..].as_ptr().cast::<u8>();
        for (i, sums) in sums.iter_mut().enumerate() {
            tiles.load(sums);
            let values = Left {
                upper: value(2 * i),
                lower: value(2 * i + 1),
                row_stride: ROW_BYTES,
                step: TILE_BYTES,
            };
            // SAFETY: values and weights have a tile for every chunk.
            unsafe { multiply(tiles, values, (0..columns.len()).map(weight), chunks.len()) };
            tiles.store(sums);
        }
    }

    /// Leaves a part to be joined later.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    fn leave(&mut self, mut partial: Partial<'_>) {
        let dim = self.cache.dim;
        let rows = self.task.queries.len() * self.task.sizes.group();
        for (tile, column) in self.columns.iter().enumerate() {
            let rows_of_tile = tile * TILE_ROWS..rows.min((tile + 1) * TILE_ROWS);
            for (row, state) in rows_of_tile.clone().zip(column.states()) {
                partial.put_state(row, state);
            }
            let to = partial.sums(rows);
            for_lines((self.buffers.sums, tile), dim, |at, lines| {
                for (row, line) in rows_of_tile.clone().zip(lines) {
                    store(&mut to[row * dim + at..][..TILE_ROWS], line);
                }
            });
        }
    }
}

/// Calls `visit` with the sums of one tile of queries: an element's index, and sixteen lines of
/// sixteen elements from it on, one line per query.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn for_lines(
    (sums, tile): (&[Sums], usize),
    dim: usize,
    mut visit: impl FnMut(usize, [__m512; TILE_ROWS]),
) {
    let steps = dim / 32;
    for (step, sums) in sums[tile / 2 * steps..][..steps].iter().enumerate() {
        for (half, sums) in rows_in(sums, tile % 2).as_chunks::<TILE_ROWS>().0.iter().enumerate() {
            let mut lines = [_mm512_setzero_ps(); TILE_ROWS];
            // SAFETY: rows have sixteen words; the instructions exist here.
            let lines = unsafe {
                for (line, sums) in lines.iter_mut().zip(sums) {
                    *line = _mm512_loadu_ps(sums.as_ptr().cast());
                }
                transpose16(lines)
            };
            visit((2 * step + half) * TILE_ROWS, lines);
        }
    }
}

/// Writes the results of one tile of queries. A sum of -0 counts as 0, because joining a part
/// that holds nothing for the query would have made it one.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn write_out(task: &AttendTile<'_>, sums: (&[Sums], usize), states: &[State; TILE_ROWS]) {
    let (dim, group) = (task.sizes.head_dim, task.sizes.group());
    let rows = sums.1 * TILE_ROWS..task.queries.len() * group;
    for_lines(sums, dim, |at, lines| {
        for ((row, line), state) in rows.clone().zip(lines).zip(states) {
            let heads = task.heads_of(task.queries.row(row / group));
            let at = heads.start + row % group * dim + at;
            let sum = _mm512_add_ps(line, _mm512_setzero_ps());
            // SAFETY: this task alone writes these heads of these rows.
            let out = unsafe { task.out.part(at..at + TILE_ROWS) };
            store(out, _mm512_div_ps(sum, _mm512_set1_ps(state.total)));
        }
    });
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut [f32], line: __m512) {
    assert!(to.len() == TILE_ROWS);
    // SAFETY: sixteen elements are writable.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), line) }
}

/// Multiplies by one or two right operands.
///
/// # Safety
/// As [`Tiles::multiply_two`].
unsafe fn multiply(
    tiles: &mut Tiles,
    left: Left,
    mut right: impl Iterator<Item = Right>,
    steps: usize,
) {
    // SAFETY: the same contract.
    unsafe {
        match (right.next(), right.next()) {
            (Some(first), Some(second)) => {
                tiles.multiply_two::<Bf16>(left, first, second, steps);
            }
            (Some(first), None) => {
                tiles.multiply_one::<Bf16>(left, first, steps);
            }
            (None, _) => {}
        }
    }
}

fn right(start: *const u8) -> Right {
    Right { start, row_stride: ROW_BYTES }
}

/// Chunks of the KV tile at `start` with positions that are seen.
fn chunks(seen: &Range<usize>, start: usize) -> Range<usize> {
    let first = seen.start.saturating_sub(start) / CHUNK;
    let end = seen.end.saturating_sub(start).div_ceil(CHUNK).min(CHUNKS);
    first.min(end)..end
}
