//! Leads columns of sixteen queries past one KV tile on AMX tiles.
//!
//! A stage is one chunk of keys of one column. While vectors turn its scores into weights, tiles
//! multiply the scores of the next stage, and the weights of the column before with the values; a
//! few rows of the one follow a few products of the other. Weights of a column wait until it is
//! through the KV tile, so that its sums are loaded and stored once. None of this is visible in a
//! result: a query meets the chunks that it sees in ascending order, whoever else is here.

use std::arch::x86_64::*;
use std::ops::Range;

use super::amx::{TILE_LEN, TILE_ROWS, Tiles};
use super::tile_cache::{CHUNKS, KV_TILE};
use super::tile_softmax::{
    CHUNK, Column, Raw, Scores, Weights, rescale, rescale_turned, rescale_weights, turn, weigh,
};
use super::tile_sums::{Queries, SUM_TILES, Sides, SixteenKeys};

/// What sums of products begin from that get their bias later.
static ZEROS: [f32; TILE_ROWS] = [0.0; TILE_ROWS];

/// Keys and values that all columns are led past.
pub struct KvTile<'a> {
    /// Position of the first of them, a multiple of [`KV_TILE`].
    pub start: usize,
    /// Left operands: upper and lower keys of a chunk.
    pub keys: &'a [[SixteenKeys; 2]; CHUNKS],
    /// What the scores of keys are multiplied by.
    pub scales: Option<&'a [f32; KV_TILE]>,
    /// `[head_dim / 16, CHUNKS]` operands, as `sides` says.
    pub values: &'a [[u32; TILE_LEN]],
    /// How they are multiplied.
    pub sides: Sides,
}

/// What columns read and write, beside their state.
pub struct Room<'a> {
    /// `[columns, head_dim / 32]` right operands.
    pub queries: &'a [u32],
    /// `[columns, head_dim / 16]` accumulators, with rows as the KV tile's `sides` say.
    pub sums: &'a mut [[u32; TILE_LEN]],
    /// Of the stage in work, and of the next one.
    pub scores: &'a mut [Scores; 2],
    /// Of the column in work, and of the one before.
    pub weights: &'a mut [[Weights; CHUNKS]; 2],
}

/// One chunk of keys of one column.
#[derive(Clone, Copy)]
pub struct Stage {
    column: usize,
    chunk: usize,
    /// Chunks that the column sees here.
    chunks: (usize, usize),
    /// How many columns came before.
    turn: usize,
}

impl Stage {
    fn is_first(&self) -> bool {
        self.chunk == self.chunks.0
    }

    /// Chunks of the column from this one on.
    fn remaining(&self) -> usize {
        self.chunks.1 - self.chunk
    }
}

/// Fills `stages` with what columns see of the KV tile at `start`, column by column.
pub fn plan(columns: &[Column], start: usize, stages: &mut Vec<Stage>) {
    stages.clear();
    let mut turn = 0;
    for (column, queries) in columns.iter().enumerate() {
        let seen = chunks(&queries.seen(), start);
        let chunks = (seen.start, seen.end);
        turn += usize::from(!seen.is_empty());
        stages.extend(seen.map(|chunk| Stage { column, chunk, chunks, turn }));
    }
}

/// Chunks of the KV tile at `start` with positions that are seen.
pub fn chunks(seen: &Range<usize>, start: usize) -> Range<usize> {
    let first = seen.start.saturating_sub(start) / CHUNK;
    let end = seen.end.saturating_sub(start).div_ceil(CHUNK).min(CHUNKS);
    first.min(end)..end
}

/// A column whose weights wait to be multiplied with the values: for each [`SUM_TILES`] of its
/// sums, chunk by chunk.
struct Waiting {
    stage: Stage,
    /// Products that are done, a chunk for some tiles of sums each.
    done: usize,
    all: usize,
}

impl Waiting {
    fn new(stage: Stage, sum_tiles: usize) -> Waiting {
        let all = (stage.chunks.1 - stage.chunks.0) * sum_tiles.div_ceil(SUM_TILES);
        Waiting { stage, done: 0, all }
    }

    /// The first tile of sums that comes next, and the chunk.
    fn next(&self) -> (usize, usize) {
        let chunks = self.stage.chunks.1 - self.stage.chunks.0;
        (self.done / chunks * SUM_TILES, self.stage.chunks.0 + self.done % chunks)
    }
}

/// All columns, and what they are led past.
pub struct Pipeline<'a> {
    /// Their state.
    pub columns: &'a mut [Column],
    /// Their memory.
    pub room: Room<'a>,
    /// The keys and values.
    pub kv: KvTile<'a>,
    /// Steps of 32 elements of the head.
    pub steps: usize,
    /// Scores are parts of this, and limited to it.
    pub cap: Option<f32>,
    /// What the scores of both stages began from.
    pub biases: [[f32; TILE_ROWS]; 2],
}

impl Pipeline<'_> {
    /// Leads the columns past what `stages` say.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    pub fn run(&mut self, tiles: &mut Tiles, stages: &[Stage]) {
        let mut waiting = None;
        if let Some(first) = stages.first() {
            self.begin(tiles, 0, first);
            self.score(tiles, 0, first, 0);
            self.score(tiles, 0, first, 1);
        }
        for (i, stage) in stages.iter().enumerate() {
            self.work(tiles, i % 2, (stage, stages.get(i + 1)), &mut waiting);
            if stage.remaining() == 1 {
                if self.kv.sides == Sides::WeightsByValues {
                    let weights = &mut self.room.weights[stage.turn % 2];
                    for weights in &mut weights[stage.chunks.0..stage.chunks.1] {
                        turn(weights);
                    }
                }
                waiting = Some(Waiting::new(*stage, 2 * self.steps));
            }
        }
        if let Some(waiting) = &mut waiting {
            self.catch_up(tiles, waiting, 0);
        }
    }

    /// Turns the scores of a stage into weights, while tiles multiply for others.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn work(
        &mut self,
        tiles: &mut Tiles,
        slot: usize,
        (stage, next): (&Stage, Option<&Stage>),
        waiting: &mut Option<Waiting>,
    ) {
        self.prepare(slot, stage);
        let mut sums = _mm512_setzero_ps();
        if let Some(next) = next {
            self.begin(tiles, 1 - slot, next);
            self.score(tiles, 1 - slot, next, 0);
        }
        sums = self.weigh(slot, stage, 0..4, sums);
        if let Some(next) = next {
            self.score(tiles, 1 - slot, next, 1);
        }
        sums = self.weigh(slot, stage, 4..8, sums);
        match waiting {
            Some(waiting) if waiting.done < waiting.all => {
                let left = waiting.all - waiting.done;
                let keep = left - left.div_ceil(stage.remaining());
                self.add_upper(tiles, waiting);
                sums = self.weigh(slot, stage, 8..12, sums);
                self.add_lower(tiles, waiting);
                sums = self.weigh(slot, stage, 12..16, sums);
                self.catch_up(tiles, waiting, keep);
            }
            _ => sums = self.weigh(slot, stage, 8..16, sums),
        }
        if let Err(lanes) = self.columns[stage.column].add_to_totals(sums) {
            self.weigh_again(slot, stage, lanes);
        }
    }

    /// Makes scores of a stage what can be weighed.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
    fn prepare(&mut self, slot: usize, stage: &Stage) {
        let at = stage.chunk * CHUNK;
        let scales = self.kv.scales.map(|scales| &scales.as_chunks().0[stage.chunk]);
        let raw = match (scales, self.cap) {
            (None, None) => Raw::Biased(&self.biases[slot]),
            (scales, cap) => Raw::Plain { scales, cap },
        };
        let scores = &mut self.room.scores[slot];
        self.columns[stage.column].prepare(self.kv.start + at, scores, raw);
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn weigh(&mut self, slot: usize, stage: &Stage, pairs: Range<usize>, sums: __m512) -> __m512 {
        let weights = &mut self.room.weights[stage.turn % 2][stage.chunk];
        weigh(&self.room.scores[slot], pairs, weights, sums)
    }

    /// Weighs a stage again whose weights were too large in some lanes.
    #[cold]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    fn weigh_again(&mut self, slot: usize, stage: &Stage, lanes: __mmask16) {
        let column = &mut self.columns[stage.column];
        let factors = column.raise(&mut self.room.scores[slot], lanes);
        for weights in &mut self.room.weights[stage.turn % 2][stage.chunks.0..stage.chunk] {
            rescale_weights(weights, &factors);
        }
        if column.has_sums {
            let sum_tiles = 2 * self.steps;
            let sums = &mut self.room.sums[stage.column * sum_tiles..][..sum_tiles];
            match self.kv.sides {
                Sides::ValuesByWeights => {
                    rescale(sums.as_flattened_mut().as_chunks_mut().0, &factors);
                }
                Sides::WeightsByValues => rescale_turned(sums, &factors),
            }
        }
        let sums = self.weigh(slot, stage, 0..TILE_ROWS, _mm512_setzero_ps());
        self.columns[stage.column].add(sums);
    }

    /// What the scores of a stage begin from. A copy would have to leave the store buffer before
    /// a tile could read it.
    #[inline(always)]
    fn bias(&self, stage: &Stage) -> &[f32; TILE_ROWS] {
        match (self.kv.scales, self.cap) {
            (None, None) => self.columns[stage.column].bias(),
            _ => &ZEROS,
        }
    }

    /// Remembers what the scores of a stage begin from, and loads the queries of its column.
    #[inline(always)]
    fn begin(&mut self, tiles: &mut Tiles, slot: usize, stage: &Stage) {
        self.biases[slot] = *self.bias(stage);
        if stage.is_first() {
            // SAFETY: a column has all its steps.
            unsafe { tiles.hold_queries(self.queries(stage)) }
        }
    }

    /// Multiplies half of a stage's keys with its queries.
    #[inline(always)]
    fn score(&mut self, tiles: &mut Tiles, slot: usize, stage: &Stage, half: usize) {
        let keys = self.kv.keys[stage.chunk][half];
        let queries = self.queries(stage);
        let to = self.room.scores[slot].as_chunks_mut::<TILE_ROWS>().0[half].as_mut_ptr();
        // SAFETY: sixteen keys of the head's elements are readable, and the queries are held.
        unsafe { tiles.score(self.bias(stage), keys, queries, to) }
    }

    #[inline(always)]
    fn queries(&self, stage: &Stage) -> Queries {
        let words = self.steps * TILE_LEN;
        let queries = &self.room.queries[stage.column * words..][..words];
        Queries { start: queries.as_ptr().cast(), steps: self.steps }
    }

    /// Multiplies what waits, but for `keep` products.
    #[inline(always)]
    fn catch_up(&mut self, tiles: &mut Tiles, waiting: &mut Waiting, keep: usize) {
        while waiting.all - waiting.done > keep {
            self.add_upper(tiles, waiting);
            self.add_lower(tiles, waiting);
        }
    }

    /// The first half of what waits next.
    #[inline(always)]
    fn add_upper(&mut self, tiles: &mut Tiles, waiting: &Waiting) {
        let (Stage { column, chunks, turn, .. }, (tile, chunk)) = (waiting.stage, waiting.next());
        let sum_tiles = 2 * self.steps;
        let sums = self.room.sums[column * sum_tiles..][tile..sum_tiles].as_ptr();
        let values = self.kv.values[tile * CHUNKS + chunk..].as_ptr();
        let weights = self.room.weights[turn % 2][chunk].as_ptr();
        // SAFETY: sums come in pairs of tiles; values have a tile for each of them and chunk.
        unsafe {
            match (chunk == chunks.0, self.columns[column].has_sums) {
                (true, true) => tiles.load_sums(sums, sum_tiles - tile >= SUM_TILES),
                (true, false) => tiles.clear(),
                (false, _) => {}
            }
            tiles.add_weighted(self.kv.sides, values, CHUNKS, weights);
        }
    }

    /// The other half.
    #[inline(always)]
    fn add_lower(&mut self, tiles: &mut Tiles, waiting: &mut Waiting) {
        let (Stage { column, chunks, .. }, (tile, chunk)) = (waiting.stage, waiting.next());
        let sum_tiles = 2 * self.steps;
        let sums = self.room.sums[column * sum_tiles..][tile..sum_tiles].as_mut_ptr();
        let all = sum_tiles - tile >= SUM_TILES;
        // SAFETY: see `add_upper`.
        unsafe {
            if all {
                let values = self.kv.values[(tile + 2) * CHUNKS + chunk..].as_ptr();
                tiles.add_weighted_lower(self.kv.sides, values, CHUNKS);
            }
            if chunk + 1 == chunks.1 {
                tiles.store_sums(sums, all);
            }
        }
        waiting.done += 1;
        if waiting.done == waiting.all {
            self.columns[column].has_sums = true;
        }
    }
}
