//! `out = x · weightᵀ` on AMX for weights in blocks: bf16, and INT8 with a scale per row.
//!
//! Lines of activations are the left operand, blocks of weights the right one where they lie, and
//! a row of an accumulator is sixteen output columns of one row. Two tiles of rows and two blocks
//! share a pass: a pair of blocks, or a block of the gate and the same of what it multiplies.
//!
//! A pass takes two blocks through a group of rows and all of the summed axis, so that sums never
//! leave the tiles before they are whole. The next pass's weights come from memory meanwhile; the
//! second-level cache holds the group, and a thread takes all its blocks through one group before
//! it goes on to the next: weights are read once per group, rows once.

use std::marker::PhantomData;
use std::ops::Range;

use super::amx::{Amx, ROW_BYTES, TILE_BYTES, TILE_LEN, TileElement, Tiles};
use super::lines::{LINE_BYTES, Lines, TILE_ROWS};
use super::share::Scratch;
use super::tile_products::{Ahead, Left, Right};
use super::tile_write::{Finish, write_gated, write_lines};
use super::weight_blocks::{BlockOutput, Blocks};

/// Bytes of rows that stay in the second-level cache (2 MiB on every machine with tiles) beside
/// the weights of two passes and what neighbours on the same core leave there.
const ROWS_BYTES: usize = 5 << 18;
/// Parts of a pass through a pair of tiles of rows, between which finished rows are written:
/// tiles and vectors work side by side.
const PARTS: usize = 2;

/// Four accumulators: rows × first block, next rows × first block, the same for the second.
pub type Sums = [[u32; TILE_LEN]; 4];

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
        for group in 0..self.num_row_groups() {
            let again = (group + 1 < self.num_row_groups()).then_some(blocks.start);
            self.run_pairs(self.row_group(group), blocks.clone(), again, scratch);
        }
    }

    /// Computes some blocks of output columns for a group of rows, and asks for the weights of the
    /// blocks behind them: a thread's tasks follow each other.
    pub fn run_group(&self, group: usize, blocks: Range<usize>, scratch: &mut Scratch) {
        let behind = if blocks.end < self.main.blocks.end() {
            Some(blocks.end)
        } else {
            (group + 1 < self.num_row_groups()).then_some(0)
        };
        self.run_pairs(self.row_group(group), blocks, behind, scratch);
    }

    /// Groups of rows, of which the second-level cache holds one at a time.
    pub fn num_row_groups(&self) -> usize {
        let most = (ROWS_BYTES / (2 * self.x.steps * TILE_BYTES)).max(1);
        self.num_pairs().div_ceil(most).max(1)
    }

    fn num_pairs(&self) -> usize {
        self.x.num_tiles().div_ceil(2)
    }

    /// The pairs of tiles of rows of a group.
    fn row_group(&self, group: usize) -> Range<usize> {
        let num_pairs = self.num_pairs();
        let len = num_pairs.div_ceil(self.num_row_groups());
        (group * len).min(num_pairs)..((group + 1) * len).min(num_pairs)
    }

    /// Takes blocks through some pairs of tiles of rows. `behind` is the block that comes next.
    fn run_pairs(
        &self,
        pairs: Range<usize>,
        blocks: Range<usize>,
        behind: Option<usize>,
        scratch: &mut Scratch,
    ) {
        if pairs.is_empty() {
            return;
        }
        let mut tiles = Tiles::open(self.amx);
        let sums = sums_of(scratch.take_words(2 * 4 * TILE_LEN));
        let mut work = Work { finished: None, next_slot: 0, sums };
        let end = self.main.blocks.end();
        for pass in self.passes(&blocks) {
            let next = if pass.end < blocks.end { Some(pass.end) } else { behind };
            let next = next.map(|block| self.weights_of(block..end.min(block + pass.len())));
            self.run_pass(&mut tiles, &pass, pairs.clone(), next, &mut work);
        }
        self.write_finished(&mut work, 2 * TILE_ROWS);
    }

    /// Blocks of one pass: of one matrix, or the same of both.
    pub fn blocks_per_pass(&self) -> usize {
        if self.up.is_some() { 1 } else { 2 }
    }

    /// The right operands of a pass; the second is missing at an odd end.
    fn rights(&self, blocks: &Range<usize>) -> (Right, Option<Right>) {
        let right = |start: *const u8| Right { start, row_stride: ROW_BYTES };
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
        Left { upper, lower, row_stride: ROW_BYTES, step: self.x.rows_per_tile() * ROW_BYTES }
    }

    /// What a pass multiplies by a pair of tiles of rows.
    fn operands(&self, blocks: &Range<usize>, pair: usize) -> Operands {
        let (first, second) = self.rights(blocks);
        let is_alone = self.x.num_tiles() == 1;
        Operands { left: self.left(pair, 0), first, second, is_alone }
    }

    /// Where the weights of some blocks begin: of the first two, or twice of the only one.
    fn weights_of(&self, blocks: Range<usize>) -> [*const u8; 2] {
        let (first, second) = self.rights(&blocks);
        [first.start, second.unwrap_or(first).start]
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

    /// Multiplies the blocks of a pass by some pairs of tiles of rows, asks for the next weights,
    /// and writes what was finished before.
    fn run_pass(
        &self,
        tiles: &mut Tiles,
        pass: &Range<usize>,
        pairs: Range<usize>,
        next: Option<[*const u8; 2]>,
        work: &mut Work<'_>,
    ) {
        let part_steps = self.x.steps.div_ceil(PARTS);
        let spread = Spread::over(pairs.len());
        for pair in pairs.clone() {
            tiles.clear();
            let mut operands = self.operands(pass, pair);
            let mut ahead = spread.of_pair(pair - pairs.start, self.x.steps, next);
            for first_step in (0..self.x.steps).step_by(part_steps) {
                let steps = part_steps.min(self.x.steps - first_step);
                // SAFETY: blocks have all steps, and rows have room to be read as whole tiles.
                unsafe { operands.multiply::<E>(tiles, steps, &mut ahead) }
                self.write_finished(work, 2 * TILE_ROWS / PARTS);
            }
            self.write_finished(work, 2 * TILE_ROWS);
            let slot = work.next_slot;
            tiles.store(&mut work.sums[slot]);
            work.finished = Some(Finished::new(slot, pair, pass.clone()));
            work.next_slot = 1 - slot;
        }
    }

    /// Writes the next rows of what is finished, if anything is.
    fn write_finished(&self, work: &mut Work<'_>, num_rows: usize) {
        if let Some(finished) = &mut work.finished {
            self.write(finished, work.sums, num_rows);
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
    /// Adds the products of as many steps, and goes on behind them, with what is asked for too.
    ///
    /// # Safety
    /// There must be so many steps.
    #[inline(always)]
    unsafe fn multiply<E: TileElement>(
        &mut self,
        tiles: &mut Tiles,
        steps: usize,
        ahead: &mut Ahead,
    ) {
        let (left, first) = (self.left, self.first);
        // SAFETY: the same contract.
        unsafe {
            match self.second {
                Some(second) if self.is_alone => {
                    tiles.multiply_upper::<E>(left, first, second, steps, *ahead);
                }
                Some(second) => tiles.multiply_two::<E>(left, first, second, steps, *ahead),
                None => tiles.multiply_one::<E>(left, first, steps, *ahead),
            }
        }
        let skip = |start: &mut *const u8, bytes: usize| *start = start.wrapping_add(steps * bytes);
        skip(&mut self.left.upper, self.left.step);
        skip(&mut self.left.lower, self.left.step);
        skip(&mut self.first.start, TILE_BYTES);
        if let Some(second) = &mut self.second {
            skip(&mut second.start, TILE_BYTES);
        }
        skip(&mut ahead.first, ahead.lines * LINE_BYTES);
        skip(&mut ahead.second, ahead.lines * LINE_BYTES);
    }
}

/// How a pass's requests for the next weights are spread over its pairs of tiles of rows: memory
/// needs the time of all pairs to bring them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spread {
    /// Pairs beside which weights are asked for, from the first on.
    pairs: usize,
    /// Lines of each block that a step asks for.
    lines: usize,
}

impl Spread {
    fn over(num_pairs: usize) -> Spread {
        let pairs = (1 << num_pairs.ilog2()).min(Ahead::MOST / Ahead::LEAST);
        Spread { pairs, lines: Ahead::MOST / pairs }
    }

    /// What is asked for beside pair `i`.
    fn of_pair(self, i: usize, steps: usize, next: Option<[*const u8; 2]>) -> Ahead {
        match next {
            Some(next) if i < self.pairs => {
                let skipped = i * steps * self.lines * LINE_BYTES;
                let [first, second] = next.map(|start| start.wrapping_add(skipped));
                Ahead { first, second, lines: self.lines }
            }
            _ => Ahead::NOTHING,
        }
    }
}

/// Sums on their way to where they are written.
struct Work<'a> {
    finished: Option<Finished>,
    /// Where the next are stored.
    next_slot: usize,
    /// Those that are being written, and those that come next.
    sums: &'a mut [Sums],
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

/// Words as accumulators.
pub fn sums_of(words: &mut [u32]) -> &mut [Sums] {
    words.as_chunks_mut().0.as_chunks_mut().0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_next_weights_is_asked_for_once() {
        const STEPS: usize = 14;
        let starts = [1 << 20, 2 << 20];
        for num_pairs in 1..40 {
            let spread = Spread::over(num_pairs);
            let mut asked = [vec![0; STEPS * Ahead::MOST], vec![0; STEPS * Ahead::MOST]];
            for pair in 0..num_pairs {
                let next = Some(starts.map(|start| start as *const u8));
                let ahead = spread.of_pair(pair, STEPS, next);
                for (asked, (from, start)) in
                    asked.iter_mut().zip([ahead.first, ahead.second].iter().zip(starts))
                {
                    let first = (*from as usize).saturating_sub(start) / LINE_BYTES;
                    for line in 0..STEPS * ahead.lines {
                        asked[first + line] += 1;
                    }
                }
            }
            assert!(asked.iter().flatten().all(|&times| times == 1), "{num_pairs} pairs");
            assert_eq!(spread.of_pair(0, STEPS, None).lines, 0);
        }
    }
}
