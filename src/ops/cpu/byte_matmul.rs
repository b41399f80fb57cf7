//! `out = x · weightᵀ` for codes in blocks, on vectors of bytes.
//!
//! Sums of integers are exact, so that neither order nor instructions can change them; what is
//! done to them in f32 has one order, which the tiles of `tile_groups` keep too. Every line of
//! weights is read once per [`ByteSimd::MAX_ROWS`] rows of activations: one row is bound by
//! memory, more find the block in a cache, and activations stay in one while blocks pass. Loops over
//! rows are loops, not closures: with sixteen rows a closure is no longer inlined, and without the
//! instructions of its caller every intrinsic is a call.

use std::ops::Range;

use super::byte_simd::{ByteKernel, ByteSimd, FoldedCodes, Int4Codes, Mxfp4Codes};
use super::lines::{CodedLines, LINE_BYTES, TILE_ROWS};
use super::weight_blocks::{BlockOutput, Blocks, GroupCodes, GroupScales, RowScales, ScaleLine};
use crate::formats::blocks::{BLOCK_ROWS, WORD_BYTES};
use crate::formats::{Format, PackedMatrix};

/// Bytes of activations that stay in the second-level cache while blocks pass.
const KEPT_BYTES: usize = 512 << 10;
/// Lines of weights that a line of activations is multiplied by.
const LINES_PER_STEP: usize = LINE_BYTES / WORD_BYTES;
/// The same for folded codes.
const FOLDED_PER_STEP: usize = LINES_PER_STEP / 2;

/// Codes and their scales.
#[derive(Clone, Copy)]
pub enum ByteScales<'a> {
    /// INT8.
    Rows(RowScales<'a>),
    /// INT4, Q8_0, MXFP4.
    Groups(GroupScales<'a>),
}

/// A matrix of codes in blocks.
#[derive(Clone, Copy)]
pub struct ByteWeights<'a> {
    /// The codes.
    pub blocks: Blocks<'a>,
    /// Their scales.
    pub scales: ByteScales<'a>,
}

impl<'a> ByteWeights<'a> {
    /// Those of a matrix of bytes or folded codes.
    pub fn of(matrix: &'a PackedMatrix) -> ByteWeights<'a> {
        let scales = match matrix.format {
            Format::Int8 => ByteScales::Rows(RowScales::of(matrix)),
            _ => ByteScales::Groups(GroupScales::of(matrix)),
        };
        ByteWeights { blocks: Blocks::of(matrix), scales }
    }
}

/// A product, or the gated product of two.
pub struct ByteTask<'a> {
    /// Activations, quantized as the weights demand.
    pub x: CodedLines<'a>,
    /// The matrix, or the gate.
    pub main: ByteWeights<'a>,
    /// What the activated gate is multiplied by.
    pub up: Option<ByteWeights<'a>>,
    /// Where results go.
    pub out: BlockOutput<'a>,
}

/// Some blocks of a task.
pub struct ByteBlocks<'a> {
    /// The task.
    pub task: &'a ByteTask<'a>,
    /// Which blocks; no other task has them.
    pub blocks: Range<usize>,
}

impl ByteKernel for ByteBlocks<'_> {
    #[inline(always)]
    fn run<S: ByteSimd>(self, simd: S) {
        let ByteBlocks { task, blocks } = self;
        let num_rows = task.x.lines.num_rows;
        let most_rows = match task.main.scales {
            ByteScales::Rows(_) => S::MAX_ROWS,
            ByteScales::Groups(_) => S::MAX_GROUP_ROWS,
        };
        let tile_bytes = task.x.lines.steps * TILE_ROWS * LINE_BYTES;
        let rows_kept = (KEPT_BYTES / tile_bytes).max(1) * TILE_ROWS;
        for first in (0..num_rows).step_by(rows_kept) {
            let rows = first..num_rows.min(first + rows_kept);
            for block in blocks.clone() {
                write_block(simd, task, block, rows.clone(), most_rows);
            }
        }
    }
}

/// Computes a block for some rows, in powers of two of them, largest first, so that the rows of a
/// pass lie in one tile.
#[inline(always)]
fn write_block<S: ByteSimd>(
    simd: S,
    task: &ByteTask<'_>,
    block: usize,
    rows: Range<usize>,
    most_rows: usize,
) {
    let mut row = rows.start;
    while row < rows.end {
        row += match most_rows.min(rows.end - row) {
            16.. => write_rows::<S, 16>(simd, task, block, row),
            8.. => write_rows::<S, 8>(simd, task, block, row),
            4.. => write_rows::<S, 4>(simd, task, block, row),
            2.. => write_rows::<S, 2>(simd, task, block, row),
            _ => write_rows::<S, 1>(simd, task, block, row),
        };
    }
}

/// Computes a block for `R` rows; returns their number.
#[inline(always)]
fn write_rows<S: ByteSimd, const R: usize>(
    simd: S,
    task: &ByteTask<'_>,
    block: usize,
    row: usize,
) -> usize {
    if R > S::MAX_ROWS {
        unreachable!("no pass has more rows than registers allow");
    }
    let pass = Pass::<R>::new(task.x, row);
    let main = pass.multiply(simd, task.main, block);
    let columns = task.out.columns(block);
    let Some(up) = task.up else {
        for (i, &main) in main.iter().enumerate() {
            // SAFETY: this task alone has the block.
            unsafe { columns.write(simd.base(), row + i, &simd.lanes(main), None) }
        }
        return R;
    };
    let up = pass.multiply(simd, up, block);
    for (i, (&main, &up)) in main.iter().zip(&up).enumerate() {
        let (main, up) = (simd.lanes(main), simd.lanes(up));
        // SAFETY: as above.
        unsafe { columns.write(simd.base(), row + i, &main, Some(&up)) }
    }
    R
}

/// `R` rows of activations of one tile.
struct Pass<'a, const R: usize> {
    x: CodedLines<'a>,
    row: usize,
    /// The first line of the first of them; those of the others follow.
    first: *const i8,
    /// Bytes from a line of a row to its next.
    step_bytes: usize,
}

impl<'a, const R: usize> Pass<'a, R> {
    #[inline(always)]
    fn new(x: CodedLines<'a>, row: usize) -> Pass<'a, R> {
        assert!(row % TILE_ROWS + R <= TILE_ROWS && row + R <= x.lines.num_rows);
        Pass {
            x,
            row,
            first: x.lines.line(row, 0),
            step_bytes: x.lines.rows_per_tile() * LINE_BYTES,
        }
    }

    /// Word `word` of the rows' lines at a step.
    #[inline(always)]
    fn words(&self, step: usize, word: usize) -> [*const i8; R] {
        let first = self.first.wrapping_add(step * self.step_bytes + word * WORD_BYTES);
        let mut words = [first; R];
        for (i, word) in words.iter_mut().enumerate() {
            *word = first.wrapping_add(i * LINE_BYTES);
        }
        words
    }

    #[inline(always)]
    fn multiply<S: ByteSimd>(
        &self,
        simd: S,
        weights: ByteWeights<'_>,
        block: usize,
    ) -> [S::Floats; R] {
        let codes = weights.blocks.block(block);
        let per_step = weights.blocks.block_bytes / self.x.lines.steps;
        // What is read below: all lines of the block, and as many words of every row.
        match weights.scales {
            ByteScales::Rows(scales) => {
                assert_eq!(per_step, LINES_PER_STEP * LINE_BYTES);
                self.multiply_rows(simd, codes, scales.block(block))
            }
            ByteScales::Groups(scales) if scales.codes == GroupCodes::Bytes => {
                assert_eq!(per_step, LINES_PER_STEP * LINE_BYTES);
                self.multiply_groups(simd, codes, scales, block)
            }
            ByteScales::Groups(scales) => {
                assert_eq!(per_step, FOLDED_PER_STEP * LINE_BYTES);
                if scales.codes == GroupCodes::Int4 {
                    self.multiply_folded::<S, Int4Codes>(simd, codes, scales, block)
                } else {
                    self.multiply_folded::<S, Mxfp4Codes>(simd, codes, scales, block)
                }
            }
        }
    }

    /// One scale per row of weights.
    #[inline(always)]
    fn multiply_rows<S: ByteSimd>(
        &self,
        simd: S,
        codes: *const u8,
        scales: &[f32; BLOCK_ROWS],
    ) -> [S::Floats; R] {
        let mut sums = self.without_offset(simd, 0);
        for step in 0..self.x.lines.steps {
            for word in 0..LINES_PER_STEP {
                let line = codes.wrapping_add((step * LINES_PER_STEP + word) * LINE_BYTES);
                // SAFETY: the block and the rows have all their steps.
                unsafe { simd.add_bytes(&mut sums, line, self.words(step, word)) }
            }
        }
        let mut out = [simd.no_floats(); R];
        for (i, (out, sums)) in out.iter_mut().zip(sums).enumerate() {
            // SAFETY: a block has sixteen scales.
            *out = unsafe { simd.scaled(sums, self.x.scale(self.row + i, 0), scales.as_ptr()) };
        }
        out
    }

    /// Sums of a group before anything is added: less what the codes' offset will add.
    #[inline(always)]
    fn without_offset<S: ByteSimd>(&self, simd: S, group: usize) -> [S::Ints; R] {
        let mut sums = [simd.ints(0); R];
        for (i, sums) in sums.iter_mut().enumerate() {
            *sums = simd.ints(-S::BYTES_OFFSET * self.x.sum(self.row + i, group));
        }
        sums
    }

    /// Bytes in groups of half a step.
    #[inline(always)]
    fn multiply_groups<S: ByteSimd>(
        &self,
        simd: S,
        codes: *const u8,
        scales: GroupScales<'_>,
        block: usize,
    ) -> [S::Floats; R] {
        let lines_per_group = scales.size / WORD_BYTES;
        let mut acc = [simd.no_floats(); R];
        for group in 0..scales.groups {
            let mut sums = self.without_offset(simd, group);
            let first = group * lines_per_group;
            let last = (first + lines_per_group).min(self.x.lines.steps * LINES_PER_STEP);
            for line in first..last {
                let words = self.words(line / LINES_PER_STEP, line % LINES_PER_STEP);
                // SAFETY: the block and the rows have all their steps.
                unsafe { simd.add_bytes(&mut sums, codes.wrapping_add(line * LINE_BYTES), words) }
            }
            self.add_group(simd, &mut acc, sums, group, scales.scales(block, group));
        }
        acc
    }

    /// Folded codes: either half of a step may be a group of its own.
    #[inline(always)]
    fn multiply_folded<S: ByteSimd, C: FoldedCodes>(
        &self,
        simd: S,
        codes: *const u8,
        scales: GroupScales<'_>,
        block: usize,
    ) -> [S::Floats; R] {
        let steps = self.x.lines.steps;
        let mut acc = [simd.no_floats(); R];
        let mut sums = [[simd.ints(0); 2]; R];
        for step in 0..steps {
            for word in 0..FOLDED_PER_STEP {
                let line = codes.wrapping_add((step * FOLDED_PER_STEP + word) * LINE_BYTES);
                // SAFETY: the block and the rows have all their steps.
                unsafe {
                    let words = self.words(step, word);
                    simd.add_folded::<C, R>(&mut sums, line, words, LINE_BYTES / 2);
                }
            }
            if scales.size < LINE_BYTES {
                for half in 0..2 {
                    let mut of_half = [simd.ints(0); R];
                    for (to, sums) in of_half.iter_mut().zip(sums) {
                        *to = sums[half];
                    }
                    let sums = of_half;
                    self.add_codes::<S, C>(simd, &mut acc, sums, 2 * step + half, (scales, block));
                }
            } else if ((step + 1) * LINE_BYTES).is_multiple_of(scales.size) || step + 1 == steps {
                let mut of_both = [simd.ints(0); R];
                for (to, [low, high]) in of_both.iter_mut().zip(sums) {
                    *to = simd.add_ints(low, high);
                }
                let sums = of_both;
                let group = step * LINE_BYTES / scales.size;
                self.add_codes::<S, C>(simd, &mut acc, sums, group, (scales, block));
            } else {
                continue;
            }
            sums = [[simd.ints(0); 2]; R];
        }
        acc
    }

    /// Adds sums of unsigned codes: zero points are taken off first.
    #[inline(always)]
    fn add_codes<S: ByteSimd, C: FoldedCodes>(
        &self,
        simd: S,
        acc: &mut [S::Floats; R],
        mut sums: [S::Ints; R],
        group: usize,
        (scales, block): (GroupScales<'_>, usize),
    ) {
        for (i, sums) in sums.iter_mut().enumerate() {
            let x_sum = self.x.sum(self.row + i, group);
            *sums = match scales.zeros(block, group) {
                // SAFETY: a group has sixteen zero points.
                Some(zeros) => unsafe { simd.sub_zeros(*sums, zeros.as_ptr(), x_sum) },
                None => simd.add_ints(*sums, simd.ints(-i32::from(C::MIDDLE) * x_sum)),
            };
        }
        self.add_group(simd, acc, sums, group, scales.scales(block, group));
    }

    #[inline(always)]
    fn add_group<S: ByteSimd>(
        &self,
        simd: S,
        acc: &mut [S::Floats; R],
        sums: [S::Ints; R],
        group: usize,
        scales: ScaleLine<'_>,
    ) {
        let scales = scales.load(simd);
        for (i, acc) in acc.iter_mut().enumerate() {
            let x_scale = self.x.scale(self.row + i, group);
            *acc = simd.add_scaled(*acc, sums[i], x_scale, scales);
        }
    }
}
