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
use super::tile_products::{Ahead, Left};
use super::tile_write::{Finish, TileResults};
use super::weight_blocks::{BlockOutput, Blocks};

/// Bytes of rows that stay in the second-level cache (2 MiB on every machine with tiles) beside
/// the weights of two passes and what neighbours on the same core leave there.
const ROWS_BYTES: usize = 5 << 18;

/// Rows that are written at a time while tiles multiply: few enough to run beside the products of
/// two steps. Divides a tile's.
const WRITTEN_ROWS: usize = 4;

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

impl<'a, E: TileElement, F: Finish> BlockTask<'a, E, F> {
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
            let next = next.map(|block| self.weights_of(&(block..end.min(block + pass.len()))));
            self.run_pass(&mut tiles, &pass, pairs.clone(), next, &mut work);
        }
        self.write_rest(&mut work);
    }

    /// Blocks of one pass: of one matrix, or the same of both.
    pub fn blocks_per_pass(&self) -> usize {
        if self.up.is_some() { 1 } else { 2 }
    }

    /// The left operand: a pair of tiles of rows, from `step` on. A tile that is missing is its
    /// neighbour.
    pub fn left(&self, pair: usize, step: usize) -> Left {
        let tile = |tile: usize| {
            let row = tile.min(self.x.num_tiles() - 1) * TILE_ROWS;
            self.x.line(row, step).cast::<u8>()
        };
        let (upper, lower) = (tile(2 * pair), tile(2 * pair + 1));
        Left { upper, lower, step: self.x.rows_per_tile() * ROW_BYTES }
    }

    /// Where the weights of some blocks begin: of the first two, or twice of the only one.
    fn weights_of(&self, blocks: &Range<usize>) -> [*const u8; 2] {
        let first = self.main.blocks.block(blocks.start);
        let second = match &self.up {
            Some(up) => up.blocks.block(blocks.start),
            None if blocks.len() > 1 => self.main.blocks.block(blocks.start + 1),
            None => first,
        };
        [first, second]
    }

    /// Writes the sums of few rows.
    pub fn write_pass(&self, pass: Range<usize>, sums: &mut [Sums]) {
        let num_rows = self.x.num_rows;
        let finished = Some(Finished { slot: 0, pair: 0, pass, num_rows, next_row: 0 });
        self.write_rest(&mut Work { finished, next_slot: 1, sums });
    }

    /// The blocks of every pass.
    pub fn passes(
        &self,
        blocks: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<'a, E, F> {
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
        let spread = Spread::over(pairs.len());
        let kind = self.kind(pass, pairs.len());
        for pair in pairs.clone() {
            tiles.clear();
            let ahead = spread.of_pair(pair - pairs.start, self.x.steps, next);
            let operands =
                Operands { left: self.left(pair, 0), rights: self.weights_of(pass), ahead };
            match (kind, operands.ahead.lines) {
                (Kind::ManyPairs, 0) => self.run_steps::<ManyPairs, 0>(tiles, operands, work),
                (Kind::ManyPairs, 1) => self.run_steps::<ManyPairs, 1>(tiles, operands, work),
                (Kind::ManyPairs, 2) => self.run_steps::<ManyPairs, 2>(tiles, operands, work),
                (Kind::ManyPairs, 4) => self.run_steps::<ManyPairs, 4>(tiles, operands, work),
                (Kind::ManyPairs, 8) => self.run_steps::<ManyPairs, 8>(tiles, operands, work),
                (Kind::ManyPairs, _) => self.run_steps::<ManyPairs, 16>(tiles, operands, work),
                (Kind::OnePair, 0) => self.run_steps::<OnePair, 0>(tiles, operands, work),
                (Kind::OnePair, _) => self.run_steps::<OnePair, 32>(tiles, operands, work),
                (Kind::OneTile, 0) => self.run_steps::<OneTile, 0>(tiles, operands, work),
                (Kind::OneTile, _) => self.run_steps::<OneTile, 32>(tiles, operands, work),
                (Kind::OneBlock, _) => self.run_steps::<OneBlock, 0>(tiles, operands, work),
            }
            self.write_rest(work);
            let slot = work.next_slot;
            tiles.store(&mut work.sums[slot]);
            let num_rows = (self.x.num_rows - 2 * pair * TILE_ROWS).min(2 * TILE_ROWS);
            work.finished =
                Some(Finished { slot, pair, pass: pass.clone(), num_rows, next_row: 0 });
            work.next_slot = 1 - slot;
        }
    }

    /// All steps of a pair of tiles of rows, and between them some rows of what was finished
    /// before: tiles and vectors work side by side.
    fn run_steps<K: Step, const LINES: usize>(
        &self,
        tiles: &mut Tiles,
        mut operands: Operands,
        work: &mut Work<'_>,
    ) {
        let (steps, mut due) = (self.x.steps, 0);
        for _ in 0..steps {
            // SAFETY: blocks have all steps, and rows have room to be read as whole tiles.
            unsafe { operands.step::<E, K, LINES>(tiles) }
            due += 2 * TILE_ROWS;
            while due >= WRITTEN_ROWS * steps {
                due -= WRITTEN_ROWS * steps;
                // SAFETY: the token proves that the instructions exist.
                unsafe { self.write_next(work) }
            }
        }
    }

    fn kind(&self, pass: &Range<usize>, num_pairs: usize) -> Kind {
        match num_pairs {
            _ if self.up.is_none() && pass.len() == 1 => Kind::OneBlock,
            _ if self.x.num_tiles() == 1 => Kind::OneTile,
            1 => Kind::OnePair,
            _ => Kind::ManyPairs,
        }
    }

    /// Writes the next rows of what is finished, if any are left.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    fn write_next(&self, work: &mut Work<'_>) {
        let Some(finished) = &mut work.finished else { return };
        let start = finished.next_row;
        let end = finished.num_rows.min(start + WRITTEN_ROWS);
        if start >= end {
            return;
        }
        finished.next_row = end;
        let (half, first) = (start / TILE_ROWS, start % TILE_ROWS);
        let sums = &work.sums[finished.slot];
        let lines = [&sums[half], &sums[half + 2]].map(|sums| sums.as_ptr());
        let first_row = (2 * finished.pair + half) * TILE_ROWS;
        let rows = first_row..self.x.num_rows.min(first_row + TILE_ROWS);
        let results = self.results(rows, &finished.pass);
        // SAFETY: the instructions exist here; accumulators have sixteen lines; this task alone
        // writes these blocks.
        unsafe { results.write(self.amx.vectors(), lines, first..first + (end - start)) }
    }

    /// Writes all that is left of it.
    fn write_rest(&self, work: &mut Work<'_>) {
        while work.finished.as_ref().is_some_and(|finished| finished.next_row < finished.num_rows) {
            // SAFETY: the token proves that the instructions exist.
            unsafe { self.write_next(work) }
        }
    }

    /// What becomes of rows that share a tile.
    #[inline(always)]
    fn results(&self, rows: Range<usize>, pass: &Range<usize>) -> TileResults<'a, F::Lines> {
        let (row, block) = (rows.start, pass.start);
        let first = self.main.finish.lines(row, block);
        match &self.up {
            Some(up) => {
                let up = up.finish.lines(row, block);
                TileResults::gated(&self.out, rows, block, [first, up])
            }
            None => {
                let second = (pass.len() > 1).then(|| self.main.finish.lines(row, block + 1));
                TileResults::of_blocks(&self.out, rows, block, (first, second))
            }
        }
    }
}

/// What there is of two tiles of rows and two blocks, and where rows are best read from.
#[derive(Clone, Copy)]
enum Kind {
    OneBlock,
    OneTile,
    OnePair,
    ManyPairs,
}

/// A step of a kind.
trait Step {
    /// Adds the products, and asks for `LINES` lines ahead.
    ///
    /// # Safety
    /// The step must exist.
    unsafe fn multiply<E: TileElement, const LINES: usize>(tiles: &mut Tiles, of: &mut Operands);
}

/// One block of weights.
struct OneBlock;
/// One tile of rows.
struct OneTile;
/// All rows are one pair of tiles: the first-level cache keeps what it can of them.
struct OnePair;
/// Other rows follow: the first-level cache keeps the weights for them.
struct ManyPairs;

impl Step for OneBlock {
    #[inline(always)]
    unsafe fn multiply<E: TileElement, const LINES: usize>(tiles: &mut Tiles, of: &mut Operands) {
        // SAFETY: the same contract.
        unsafe { tiles.step_by_one::<E, LINES>(&of.left, of.rights[0], &mut of.ahead) }
    }
}

impl Step for OneTile {
    #[inline(always)]
    unsafe fn multiply<E: TileElement, const LINES: usize>(tiles: &mut Tiles, of: &mut Operands) {
        // SAFETY: the same contract.
        unsafe { tiles.step_of_upper::<E, LINES>(&of.left, of.rights, &mut of.ahead) }
    }
}

impl Step for OnePair {
    #[inline(always)]
    unsafe fn multiply<E: TileElement, const LINES: usize>(tiles: &mut Tiles, of: &mut Operands) {
        // SAFETY: the same contract.
        unsafe { tiles.step_by_two::<E, false, LINES>(&of.left, of.rights, &mut of.ahead) }
    }
}

impl Step for ManyPairs {
    #[inline(always)]
    unsafe fn multiply<E: TileElement, const LINES: usize>(tiles: &mut Tiles, of: &mut Operands) {
        // SAFETY: the same contract.
        unsafe { tiles.step_by_two::<E, true, LINES>(&of.left, of.rights, &mut of.ahead) }
    }
}

/// What is multiplied next: a pair of tiles of rows by one block of weights or by two.
struct Operands {
    left: Left,
    /// Twice the same when there is one.
    rights: [*const u8; 2],
    ahead: Ahead,
}

impl Operands {
    /// Adds the products of a step, and goes on behind it.
    ///
    /// # Safety
    /// The step must exist.
    #[inline(always)]
    unsafe fn step<E: TileElement, K: Step, const LINES: usize>(&mut self, tiles: &mut Tiles) {
        // SAFETY: the same contract.
        unsafe { K::multiply::<E, LINES>(tiles, self) }
        let skip = |start: &mut *const u8, bytes: usize| *start = start.wrapping_add(bytes);
        skip(&mut self.left.upper, self.left.step);
        skip(&mut self.left.lower, self.left.step);
        skip(&mut self.rights[0], TILE_BYTES);
        skip(&mut self.rights[1], TILE_BYTES);
    }
}

/// How a pass's requests for the next weights are spread over its pairs of tiles of rows: memory
/// needs the time of all pairs to bring them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spread {
    /// Pairs beside which weights are asked for, from the first on: a power of two.
    pairs: usize,
    /// Lines that a step asks for.
    lines: usize,
}

impl Spread {
    fn over(num_pairs: usize) -> Spread {
        let pairs = (1 << num_pairs.ilog2()).min(Ahead::MOST);
        Spread { pairs, lines: Ahead::MOST / pairs }
    }

    /// What is asked for beside pair `i`.
    fn of_pair(self, i: usize, steps: usize, next: Option<[*const u8; 2]>) -> Ahead {
        let Some([first, second]) = next.filter(|_| i < self.pairs) else { return Ahead::NOTHING };
        let after = |start: *const u8, lines: usize| start.wrapping_add(lines * LINE_BYTES);
        if self.lines == 1 {
            // First all of the one, then all of the other.
            let half = self.pairs / 2;
            let start = if i < half { first } else { second };
            return Ahead { first: after(start, i % half * steps), second, lines: 1 };
        }
        let skipped = i * steps * self.lines / 2;
        Ahead { first: after(first, skipped), second: after(second, skipped), lines: self.lines }
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

/// Sums of a pair of tiles of rows that are being written while the next are computed.
struct Finished {
    slot: usize,
    pair: usize,
    /// Blocks.
    pass: Range<usize>,
    num_rows: usize,
    next_row: usize,
}

/// Words as accumulators.
pub fn sums_of(words: &mut [u32]) -> &mut [Sums] {
    words.as_chunks_mut().0.as_chunks_mut().0
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn every_line_of_the_next_weights_is_asked_for_once() {
        const STEPS: usize = 14;
        let starts = [1 << 20, 2 << 20];
        for num_pairs in 1..40 {
            let spread = Spread::over(num_pairs);
            let mut asked = HashMap::new();
            for pair in 0..num_pairs {
                let next = Some(starts.map(|start| start as *const u8));
                let ahead = spread.of_pair(pair, STEPS, next);
                let [of_first, of_second] = match ahead.lines {
                    1 => [1, 0],
                    lines => [lines / 2; 2],
                };
                for (from, lines) in [(ahead.first, of_first), (ahead.second, of_second)] {
                    for line in 0..STEPS * lines {
                        *asked.entry(from as usize + line * LINE_BYTES).or_insert(0) += 1;
                    }
                }
            }
            let is_wanted = |start: usize| {
                (0..STEPS * TILE_ROWS).all(|i| asked.get(&(start + i * LINE_BYTES)) == Some(&1))
            };
            assert!(starts.into_iter().all(is_wanted), "{num_pairs} pairs");
            assert_eq!(asked.len(), 2 * STEPS * TILE_ROWS, "{num_pairs} pairs");
            assert_eq!(spread.of_pair(0, STEPS, None).lines, 0);
        }
    }
}
