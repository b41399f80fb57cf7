//! `out = x · weightᵀ` on AMX for weights in blocks: bf16, and INT8 with a scale per row.
//!
//! Lines of activations are the left operand, blocks of weights the right one where they lie, and
//! a row of an accumulator is sixteen output columns of one row. Two tiles of rows and two blocks
//! share a pass: a pair of blocks, or a block of the gate and the same of what it multiplies.
//!
//! Few rows: weights go from memory to tiles, once. Many rows: the summed axis is cut into slices,
//! so that a pair's weights stay in the first-level cache and the slice of all rows in the
//! second-level one; accumulators wait in memory between slices, which changes no sum.

use std::marker::PhantomData;
use std::ops::Range;

use super::amx::{Amx, Left, ROW_BYTES, Right, TILE_BYTES, TILE_LEN, TileElement, Tiles};
use super::lines::{Lines, TILE_ROWS};
use super::share::Scratch;
use super::tile_write::{Finish, write_gated, write_lines};
use super::weight_blocks::{BlockOutput, Blocks};

/// Up to this many rows, weights are read once.
pub const FEW_ROWS: usize = 2 * TILE_ROWS;
/// Steps of a slice: its two blocks and a pair of tiles of rows (16 KiB each) share the first-level
/// cache, where sixteen steps push each other out.
const SLICE_STEPS: usize = 8;
/// Pairs of tiles of rows whose slice (16 KiB each) and accumulators (4 KiB per pair of blocks)
/// stay in half of the second-level cache.
const TILE_PAIRS: usize = 8;

/// Four accumulators: rows × first block, next rows × first block, the same for the second.
pub type Sums = [[u32; TILE_LEN]; 4];

/// Weights of both blocks of a pass that are asked for ahead of their use.
type Ahead = [*const u8; 2];

/// A matrix and what becomes of its sums.
#[derive(Clone, Copy)]
pub struct Half<'a, F> {
    /// Weights.
    pub blocks: Blocks<'a>,
    /// What becomes of sums.
    pub finish: F,
}

/// A product, or the gated product of two.
#[derive(Clone, Copy)]
pub struct BlockTask<'a, E, F> {
    /// The machine's tiles.
    pub amx: Amx,
    /// Activations.
    pub x: Lines<'a>,
    /// The matrix, or the gate.
    pub main: Half<'a, F>,
    /// What the activated gate is multiplied by.
    pub up: Option<Half<'a, F>>,
    /// Where results go.
    pub out: BlockOutput<'a>,
    /// What tiles hold.
    pub element: PhantomData<E>,
}

impl<E: TileElement, F: Finish> BlockTask<'_, E, F> {
    /// Computes some blocks of output columns for all rows.
    pub fn run_blocks(&self, blocks: Range<usize>, scratch: &mut Scratch) {
        let mut tiles = Tiles::open(self.amx);
        if self.x.num_rows <= FEW_ROWS {
            return self.stream(&mut tiles, blocks, scratch);
        }
        let num_pairs = self.x.num_tiles().div_ceil(2);
        for first in (0..num_pairs).step_by(TILE_PAIRS) {
            let pairs = first..num_pairs.min(first + TILE_PAIRS);
            self.reuse(&mut tiles, pairs, blocks.clone(), scratch);
        }
    }

    /// Blocks of one pass: of one matrix, or the same of both.
    pub fn blocks_per_pass(&self) -> usize {
        if self.up.is_some() { 1 } else { 2 }
    }

    /// The right operands of a pass, from `step` on; the second is missing at an odd end.
    fn rights(&self, blocks: &Range<usize>, step: usize) -> (Right, Option<Right>) {
        let right = |block: *const u8| Right {
            start: block.wrapping_add(step * TILE_BYTES),
            row_stride: ROW_BYTES,
        };
        let first = self.main.blocks.block(blocks.start);
        let second = match &self.up {
            Some(up) => Some(up.blocks.block(blocks.start)),
            None => (blocks.len() > 1).then(|| self.main.blocks.block(blocks.start + 1)),
        };
        (right(first), second.map(right))
    }

    /// The left operand: a pair of tiles of rows, from `step` on. A tile that is missing is its
    /// neighbour.
    pub fn left(&self, pair: usize, step: usize) -> Left {
        let tile = |tile: usize| {
            let row = tile.min(self.x.num_tiles() - 1) * TILE_ROWS;
            self.x.line(row, step).cast::<u8>()
        };
        let (upper, lower) = (tile(2 * pair), tile(2 * pair + 1));
        Left {
            upper,
            lower,
            row_stride: ROW_BYTES,
            step: self.x.rows_per_tile() * ROW_BYTES,
            next_upper: upper,
            next_lower: lower,
        }
    }

    /// What a pass multiplies by a pair of tiles of rows, from `step` on.
    fn operands(&self, blocks: &Range<usize>, pair: usize, step: usize) -> Operands {
        let (first, second) = self.rights(blocks, step);
        let is_alone = self.x.num_tiles() == 1;
        Operands { left: self.left(pair, step), first, second, is_alone }
    }

    /// Few rows.
    fn stream(&self, tiles: &mut Tiles, blocks: Range<usize>, scratch: &mut Scratch) {
        let sums = sums_of(scratch.take_words(4 * TILE_LEN));
        let ahead_bytes = self.blocks_per_pass() * self.main.blocks.block_bytes;
        for pass in self.passes(&blocks) {
            tiles.clear();
            let ahead = self.weights(&pass, 0).map(|start| start.wrapping_add(ahead_bytes));
            let mut operands = self.operands(&pass, 0, 0);
            // SAFETY: blocks have all steps, and rows have room to be read as whole tiles.
            unsafe { operands.multiply::<E>(tiles, self.x.steps, Some(ahead)) }
            tiles.store(&mut sums[0]);
            self.write_pass(pass, sums);
        }
    }

    /// Where the weights of a pass begin, from `step` on: of both blocks, or twice of the one.
    fn weights(&self, blocks: &Range<usize>, step: usize) -> Ahead {
        let (first, second) = self.rights(blocks, step);
        [first.start, second.unwrap_or(first).start]
    }

    /// The weights that are needed after those of `pass` and `steps`, if this task needs any.
    fn next_weights(
        &self,
        blocks: &Range<usize>,
        pass: &Range<usize>,
        steps: &Range<usize>,
    ) -> Option<Ahead> {
        let pass_of = |start: usize| start..blocks.end.min(start + self.blocks_per_pass());
        if pass.end < blocks.end {
            Some(self.weights(&pass_of(pass.end), steps.start))
        } else {
            (steps.end < self.x.steps).then(|| self.weights(&pass_of(blocks.start), steps.end))
        }
    }

    /// Writes the sums of few rows.
    pub fn write_pass(&self, pass: Range<usize>, sums: &[Sums]) {
        self.write(&mut Finished::new(0, 0, pass), sums, 2 * TILE_ROWS);
    }

    /// The blocks of every pass.
    pub fn passes(&self, blocks: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<E, F> {
        let (end, len) = (blocks.end, self.blocks_per_pass());
        blocks.clone().step_by(len).map(move |block| block..end.min(block + len))
    }

    /// Many rows: some pairs of tiles of them.
    fn reuse(
        &self,
        tiles: &mut Tiles,
        pairs: Range<usize>,
        blocks: Range<usize>,
        scratch: &mut Scratch,
    ) {
        let num_slices = self.x.steps.div_ceil(SLICE_STEPS);
        let slice_steps = self.x.steps.div_ceil(num_slices);
        let num_passes = blocks.len().div_ceil(self.blocks_per_pass());
        // Between slices all accumulators are kept, else the last ones until they are written.
        let kept = if num_slices > 1 { num_passes * pairs.len() } else { 2 };
        let sums = sums_of(scratch.take_words(kept * 4 * TILE_LEN));
        let mut finished: Option<Finished> = None;
        for first_step in (0..self.x.steps).step_by(slice_steps) {
            let steps = first_step..self.x.steps.min(first_step + slice_steps);
            for (i, pass) in self.passes(&blocks).enumerate() {
                let next = self.next_weights(&blocks, &pass, &steps);
                for pair in pairs.clone() {
                    let slot = (i * pairs.len() + pair - pairs.start) % kept;
                    if first_step == 0 {
                        tiles.clear();
                    } else {
                        tiles.load(&sums[slot]);
                    }
                    let mut operands = self.operands(&pass, pair, first_step);
                    let parts =
                        Parts { steps: steps.clone(), i: pair - pairs.start, len: pairs.len() };
                    for (part, is_ahead) in parts.iter() {
                        let skipped = (part.start - steps.start) * TILE_BYTES;
                        let ahead = next.filter(|_| is_ahead);
                        let ahead = ahead.map(|next| next.map(|start| start.wrapping_add(skipped)));
                        // SAFETY: blocks have all steps, and rows have room to be read as whole
                        // tiles.
                        unsafe { operands.multiply::<E>(tiles, part.len(), ahead) }
                        if let Some(finished) = &mut finished {
                            self.write(finished, sums, 2 * TILE_ROWS / Parts::MOST);
                        }
                    }
                    if let Some(finished) = &mut finished {
                        self.write(finished, sums, 2 * TILE_ROWS);
                    }
                    tiles.store(&mut sums[slot]);
                    if steps.end == self.x.steps {
                        finished = Some(Finished::new(slot, pair, pass.clone()));
                    }
                }
            }
        }
        if let Some(mut finished) = finished {
            self.write(&mut finished, sums, 2 * TILE_ROWS);
        }
    }

    /// Writes the next `num_rows` rows of finished sums.
    fn write(&self, finished: &mut Finished, sums: &[Sums], num_rows: usize) {
        let rows = finished.next_row..(2 * TILE_ROWS).min(finished.next_row + num_rows);
        finished.next_row = rows.end;
        // SAFETY: tiles are open, so the machine has AVX-512.
        unsafe { self.write_rows(finished, &sums[finished.slot], rows) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn write_rows(&self, finished: &Finished, sums: &Sums, rows: Range<usize>) {
        let first_row = 2 * finished.pair * TILE_ROWS;
        let end = rows.end.min(self.x.num_rows.saturating_sub(first_row));
        let mut start = rows.start;
        while start < end {
            // Rows of one tile.
            let lines = start..end.min((start / TILE_ROWS + 1) * TILE_ROWS);
            start = lines.end;
            let row = first_row + lines.start;
            let of = |finish: &F, half: usize, block: usize| {
                let sums = &sums[2 * half + lines.start / TILE_ROWS];
                (finish.lines(row, block), &sums[lines.start % TILE_ROWS * TILE_ROWS..])
            };
            let rows = row..row + lines.len();
            let block = finished.blocks.start;
            let first = of(&self.main.finish, 0, block);
            let simd = self.amx.vectors();
            // SAFETY: the instructions exist here; this task alone writes these blocks.
            unsafe {
                if let Some(up) = &self.up {
                    let up = of(&up.finish, 1, block);
                    write_gated(simd, &self.out, (rows, block), first, up);
                    continue;
                }
                write_lines(simd, &self.out, (rows.clone(), block), first);
                if finished.blocks.len() > 1 {
                    let second = of(&self.main.finish, 1, block + 1);
                    write_lines(simd, &self.out, (rows, block + 1), second);
                }
            }
        }
    }
}

/// What is multiplied next: a pair of tiles of rows by one block of weights or by two.
struct Operands {
    left: Left,
    first: Right,
    second: Option<Right>,
    /// There is one tile of rows.
    is_alone: bool,
}

impl Operands {
    /// Adds the products of as many steps, and goes on behind them. With `ahead`, as many steps of
    /// these weights are asked for meanwhile.
    ///
    /// # Safety
    /// There must be so many steps.
    #[inline(always)]
    unsafe fn multiply<E: TileElement>(
        &mut self,
        tiles: &mut Tiles,
        steps: usize,
        ahead: Option<Ahead>,
    ) {
        let (mut left, first) = (self.left, self.first);
        if let Some([first, second]) = ahead {
            left.next_upper = first;
            left.next_lower = second;
        }
        // SAFETY: the same contract.
        unsafe {
            match (self.second, ahead) {
                (Some(second), None) => tiles.multiply_two::<E>(left, first, second, steps),
                (Some(second), Some(_)) if self.is_alone => {
                    tiles.stream_upper::<E>(left, first, second, steps);
                }
                (Some(second), Some(_)) => tiles.stream_two::<E>(left, first, second, steps),
                (None, None) => tiles.multiply_one::<E>(left, first, steps),
                (None, Some(_)) => tiles.stream_one::<E>(left, first, steps),
            }
        }
        let skip = |start: &mut *const u8, bytes: usize| *start = start.wrapping_add(steps * bytes);
        skip(&mut self.left.upper, self.left.step);
        skip(&mut self.left.lower, self.left.step);
        skip(&mut self.first.start, TILE_BYTES);
        if let Some(second) = &mut self.second {
            skip(&mut second.start, TILE_BYTES);
        }
    }
}

/// Sums of a pair of tiles of rows that are being written while the next are computed: tiles
/// and vectors work side by side.
struct Finished {
    slot: usize,
    pair: usize,
    blocks: Range<usize>,
    next_row: usize,
}

impl Finished {
    fn new(slot: usize, pair: usize, blocks: Range<usize>) -> Finished {
        Finished { slot, pair, blocks, next_row: 0 }
    }
}

/// The steps of a slice for pair `i` of `len`, in parts. Each part of the next pass's weights is
/// asked for beside the same part of one pair: memory needs the time of all pairs to bring them.
struct Parts {
    steps: Range<usize>,
    i: usize,
    len: usize,
}

impl Parts {
    /// Most parts of a slice: enough to write finished rows between them, and no more.
    const MOST: usize = 2;

    fn iter(self) -> impl Iterator<Item = (Range<usize>, bool)> {
        let Parts { steps, i, len } = self;
        let part_steps = steps.len().div_ceil(Parts::MOST);
        let num_parts = steps.len().div_ceil(part_steps);
        steps.clone().step_by(part_steps).enumerate().map(move |(part, start)| {
            (start..steps.end.min(start + part_steps), part * len / num_parts == i)
        })
    }
}

/// Words as accumulators.
pub fn sums_of(words: &mut [u32]) -> &mut [Sums] {
    words.as_chunks_mut().0.as_chunks_mut().0
}
