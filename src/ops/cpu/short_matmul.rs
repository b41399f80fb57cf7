//! `out = x · weightᵀ` for codes in blocks and many rows, on AVX2 without VNNI.
//!
//! Products of bytes come in sums of two, of sixteen bits, from unsigned by signed bytes: for
//! signed weights, every product costs a change of signs and two more steps to a sum of 32 bits
//! (`byte_vectors`). With many rows it pays to prepare a slice of the weights in the first-level
//! cache for all of them. Bytes are widened to sixteen bits, whose products come in sums of two of
//! 32 bits. Four-bit codes, less their zero points, are so small that the sums of a group of 32 fit
//! sixteen bits; what activations gain when they are made unsigned is taken off at the start, and
//! that sums wrap around meanwhile does no harm.
//!
//! Sums of integers are exact, and floats are added in the order of `byte_matmul`: a row's results
//! are the same in both.

use std::arch::x86_64::*;
use std::ops::Range;

use super::avx2::Avx2;
use super::byte_matmul::{ByteScales, ByteTask, ByteWeights};
use super::byte_simd::{ByteSimd, Int4Codes, Mxfp4Codes};
use super::lines::{CodedLines, LINE_BYTES};
use super::share::Scratch;
use super::short_codes::{
    Bytes, Codes, Folded, GroupedBytes, LINES, Part, SLICE_STEPS, Slice, load, store,
};
use super::weight_blocks::GroupCodes;
use crate::formats::blocks::{BLOCK_ROWS, WORD_BYTES};

/// Up to this many rows, preparing weights takes longer than it saves.
pub const FEW_ROWS: usize = 8;
/// Most rows of a pass: twelve sums, two vectors of weights, one of activations and one of
/// products are all registers.
const PASS_ROWS: usize = 6;
/// Rows whose activations of a slice (128 KiB) stay in the second-level cache while blocks pass.
const ROW_BLOCK: usize = 128;
/// Blocks whose sums of these rows (64 KiB) stay there too: they share what it takes to prepare
/// activations.
const BLOCKS: usize = 8;
/// Steps that the first rows multiply at a time: whole groups.
const PART_STEPS: usize = 2;

/// Computes some blocks of a task for all rows.
pub fn multiply(avx2: Avx2, task: &ByteTask<'_>, blocks: Range<usize>, scratch: &mut Scratch) {
    // SAFETY: the token proves that the instructions exist.
    unsafe { enter(avx2, task, blocks, scratch) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn enter(avx2: Avx2, task: &ByteTask<'_>, blocks: Range<usize>, scratch: &mut Scratch) {
    match task.main.scales {
        ByteScales::Rows(_) => run::<Bytes>(avx2, task, blocks, scratch),
        ByteScales::Groups(scales) => match scales.codes {
            GroupCodes::Bytes => run::<GroupedBytes>(avx2, task, blocks, scratch),
            GroupCodes::Int4 => run::<Folded<Int4Codes>>(avx2, task, blocks, scratch),
            GroupCodes::Mxfp4 => run::<Folded<Mxfp4Codes>>(avx2, task, blocks, scratch),
        },
    }
}

#[inline(always)]
fn run<C: Codes>(avx2: Avx2, task: &ByteTask<'_>, blocks: Range<usize>, scratch: &mut Scratch) {
    let x = task.x;
    let halves = if task.up.is_some() { 2 } else { 1 };
    let per_group = BLOCKS / halves;
    let group_lines = match task.main.scales {
        ByteScales::Groups(scales) => scales.size / WORD_BYTES,
        ByteScales::Rows(_) => x.lines.steps * LINES,
    };
    let weight_words = Slice::weight_bytes::<C>() / 4;
    let x_words = ROW_BLOCK * Slice::x_bytes::<C>() / 4;
    let words = scratch.take_words(weight_words + x_words + BLOCKS * ROW_BLOCK * BLOCK_ROWS);
    let (weights, rest) = words.split_at_mut(weight_words);
    let (rows_x, sums) = rest.split_at_mut(x_words);
    let (weights, rows_x) = (weights.as_mut_ptr().cast::<u8>(), rows_x.as_mut_ptr().cast::<u8>());
    for first_row in (0..x.lines.num_rows).step_by(ROW_BLOCK) {
        let rows = first_row..x.lines.num_rows.min(first_row + ROW_BLOCK);
        let half_words = rows.len() * BLOCK_ROWS;
        for first in blocks.clone().step_by(per_group) {
            let group = first..blocks.end.min(first + per_group);
            let sums = &mut sums[..group.len() * halves * half_words];
            sums.fill(0);
            for from in (0..x.lines.steps).step_by(SLICE_STEPS) {
                let steps = from..x.lines.steps.min(from + SLICE_STEPS);
                let slice = Slice { x, first_row, steps, group_lines, rows: rows_x, weights };
                prepare_rows::<C>(avx2, &slice, rows.clone(), rows_x);
                let mut sums = sums.as_mut_ptr().cast::<u8>();
                let halves = Halves { task, halves, group: group.clone(), end: blocks.end };
                for i in 0..halves.len() {
                    let half = halves.half(i);
                    prepare_block::<C>(avx2, &slice, half, weights);
                    let next = halves.after::<C>(i, &slice);
                    multiply_rows::<C>(avx2, &slice, half, rows.clone(), (sums, next));
                    sums = sums.wrapping_add(4 * half_words);
                }
            }
            let mut sums = sums.chunks_exact(half_words);
            for block in group {
                let main = sums.next().expect("every block has sums");
                let up = task.up.as_ref().map(|up| (up, sums.next().expect("so has its factor")));
                write(avx2, task, block, rows.clone(), main, up);
            }
        }
    }
}

/// The blocks of a group and what they are multiplied by, in turn.
struct Halves<'a> {
    task: &'a ByteTask<'a>,
    /// Matrices: two where products are gated.
    halves: usize,
    group: Range<usize>,
    /// The block behind the last group.
    end: usize,
}

impl<'a> Halves<'a> {
    fn len(&self) -> usize {
        self.group.len() * self.halves
    }

    #[inline(always)]
    fn half(&self, i: usize) -> (&'a ByteWeights<'a>, usize) {
        let block = self.group.start + i / self.halves;
        match &self.task.up {
            Some(up) if i % self.halves == 1 => (up, block),
            _ => (&self.task.main, block),
        }
    }

    /// Codes that are prepared after half `i`: the next of this slice, the first of the next slice,
    /// or the first of the next group.
    #[inline(always)]
    fn after<C: Codes>(&self, i: usize, slice: &Slice<'_>) -> *const u8 {
        let (steps, first) = (&slice.steps, self.group.start);
        let (next, step) = if i + 1 < self.len() {
            (self.half(i + 1), steps.start)
        } else if steps.end < slice.x.lines.steps {
            ((&self.task.main, first), steps.end)
        } else {
            ((&self.task.main, self.group.end.min(self.end - 1)), 0)
        };
        next.0.blocks.block(next.1).wrapping_add(step * C::STEP_BYTES)
    }
}

#[inline(always)]
fn prepare_rows<C: Codes>(avx2: Avx2, slice: &Slice<'_>, rows: Range<usize>, to: *mut u8) {
    for (i, row) in rows.enumerate() {
        let to = to.wrapping_add(i * Slice::x_bytes::<C>());
        for (j, step) in slice.steps.clone().enumerate() {
            let line = slice.x.lines.line(row, step);
            // SAFETY: the line exists, and there is room for all steps of all rows.
            unsafe { C::prepare_x(avx2, line, to.add(j * LINE_BYTES * C::BYTES)) }
        }
        if C::HAS_GROUPS {
            let scales = to.wrapping_add(Slice::codes_bytes::<C>()).cast::<f32>();
            for (j, group) in slice.groups().enumerate() {
                // SAFETY: there is room for a scale of every group of a slice.
                unsafe { scales.add(j).write(slice.x.scale(row, group)) }
            }
        }
    }
}

#[inline(always)]
fn prepare_block<C: Codes>(
    avx2: Avx2,
    slice: &Slice<'_>,
    (weights, block): (&ByteWeights<'_>, usize),
    to: *mut u8,
) {
    assert_eq!(weights.blocks.block_bytes, slice.x.lines.steps * C::STEP_BYTES);
    let part = Part { weights, block, first: slice.steps.start };
    for i in 0..slice.steps.len() {
        // SAFETY: a block has all steps, and there is room for those of a slice.
        unsafe { C::prepare(avx2, &part, i, to) }
    }
}

/// Adds the products of a slice of a block with all rows to their sums. The first rows pass over it
/// in parts, beside which the codes that are prepared next are asked for.
#[inline(always)]
fn multiply_rows<C: Codes>(
    avx2: Avx2,
    slice: &Slice<'_>,
    weights: (&ByteWeights<'_>, usize),
    rows: Range<usize>,
    (sums, next): (*mut u8, *const u8),
) {
    let per_pass = rows.len().div_ceil(rows.len().div_ceil(PASS_ROWS));
    let all = slice.steps.len();
    for row in rows.clone().step_by(per_pass) {
        let sums = sums.wrapping_add((row - rows.start) * 4 * BLOCK_ROWS);
        let is_first = row == rows.start;
        let steps_per_part = if is_first { PART_STEPS } else { SLICE_STEPS };
        for first in (0..all).step_by(steps_per_part) {
            let steps = first..all.min(first + steps_per_part);
            if is_first {
                let asked = steps.start * C::STEP_BYTES..steps.end * C::STEP_BYTES;
                asked.step_by(LINE_BYTES).for_each(|at| prefetch(next.wrapping_add(at)));
            }
            let lines = steps.start * LINES..steps.end * LINES;
            // SAFETY: both are prepared; every row has sums.
            unsafe {
                match per_pass.min(rows.end - row) {
                    1 => add_products::<C, 1>(avx2, slice, weights, (row, lines), sums),
                    2 => add_products::<C, 2>(avx2, slice, weights, (row, lines), sums),
                    3 => add_products::<C, 3>(avx2, slice, weights, (row, lines), sums),
                    4 => add_products::<C, 4>(avx2, slice, weights, (row, lines), sums),
                    5 => add_products::<C, 5>(avx2, slice, weights, (row, lines), sums),
                    6 => add_products::<C, 6>(avx2, slice, weights, (row, lines), sums),
                    rows => unreachable!("{rows} rows do not share registers"),
                }
            }
        }
    }
}

/// Asks the second-level cache for the line at an address, which may be anything.
#[inline(always)]
fn prefetch(address: *const u8) {
    // SAFETY: a prefetch never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
}

/// Adds the products of some lines of a slice of a block, in whole groups unless they are its last,
/// with `R` rows to their sums.
///
/// # Safety
/// The slice must be prepared, and the rows have sixteen sums each.
#[inline(always)]
unsafe fn add_products<C: Codes, const R: usize>(
    avx2: Avx2,
    slice: &Slice<'_>,
    (weights, block): (&ByteWeights<'_>, usize),
    (row, lines): (usize, Range<usize>),
    to: *mut u8,
) {
    let ByteScales::Groups(scales) = weights.scales else {
        // SAFETY: the same contract.
        unsafe {
            let sums = C::sums::<R>(avx2, slice, row, lines);
            for (i, &sums) in sums.iter().enumerate() {
                let to = to.add(i * 4 * BLOCK_ROWS);
                store(to, avx2.add_ints(load(to), sums));
            }
        }
        return;
    };
    let x_scales = slice.row::<C>(row).wrapping_add(Slice::codes_bytes::<C>());
    let first_group = slice.groups().start;
    for first in lines.clone().step_by(slice.group_lines) {
        let j = first / slice.group_lines;
        let scales = scales.scales(block, first_group + j).load(avx2);
        // SAFETY: the same contract; every row has scales for all groups of the slice.
        unsafe {
            let lines = first..lines.end.min(first + slice.group_lines);
            let sums = C::sums::<R>(avx2, slice, row, lines);
            for (i, &sums) in sums.iter().enumerate() {
                let x_scale = x_scales.add(i * Slice::x_bytes::<C>()).cast::<f32>().add(j).read();
                let to = to.add(i * 4 * BLOCK_ROWS);
                let [low, high] = load(to);
                let acc = [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)];
                let [low, high] = avx2.add_scaled(acc, sums, x_scale, scales);
                store(to, [_mm256_castps_si256(low), _mm256_castps_si256(high)]);
            }
        }
    }
}

/// Writes the sums of a block, and of what it is multiplied by.
#[inline(always)]
fn write(
    avx2: Avx2,
    task: &ByteTask<'_>,
    block: usize,
    rows: Range<usize>,
    main: &[u32],
    up: Option<(&ByteWeights<'_>, &[u32])>,
) {
    let columns = task.out.columns(block);
    for (i, row) in rows.enumerate() {
        let at = i * BLOCK_ROWS;
        let main = result(avx2, task.x, row, (&task.main, block), &main[at..]);
        // In a closure, which is not always inlined, every intrinsic would be a call.
        #[allow(clippy::manual_map)]
        let up = match up {
            Some((up, sums)) => Some(result(avx2, task.x, row, (up, block), &sums[at..])),
            None => None,
        };
        // SAFETY: this task alone has the block.
        unsafe { columns.write(avx2, row, &main, up.as_ref()) }
    }
}

/// What a row's sums stand for.
#[inline(always)]
fn result(
    avx2: Avx2,
    x: CodedLines<'_>,
    row: usize,
    (weights, block): (&ByteWeights<'_>, usize),
    sums: &[u32],
) -> [f32; BLOCK_ROWS] {
    let sums: &[u32; BLOCK_ROWS] = sums.first_chunk().expect("a row has sixteen sums");
    match weights.scales {
        ByteScales::Rows(scales) => {
            // SAFETY: there are sixteen, and a block has sixteen scales.
            let scaled = unsafe {
                let sums = load(sums.as_ptr().cast());
                avx2.scaled(sums, x.scale(row, 0), scales.block(block).as_ptr())
            };
            avx2.lanes(scaled)
        }
        ByteScales::Groups(_) => sums.map(f32::from_bits),
    }
}

#[cfg(test)]
mod tests {
    use super::super::byte_matmul::ByteBlocks;
    use super::super::lines::{AsCodes, FillLines, LineBuffers};
    use super::super::scalar::Scalar;
    use super::super::simd::Kernel;
    use super::super::weight_blocks::{BlockOutput, Place, Rows};
    use super::*;
    use crate::formats::{PackedMatrix, RowQuantizer, int4, int8, mxfp4, q8, quantize};
    use crate::ops::args::Activation;

    /// `num_rows × k` numbers: waves, of which every third row is one number, as large as its sign
    /// allows, so that all its codes are the largest ones.
    fn values(num_rows: usize, k: usize) -> Vec<f32> {
        let value = |i: usize| match i / k % 3 {
            0 => 1.0 - (i / k % 2) as f32 * 2.0,
            _ => (i as f32 * 0.37).sin(),
        };
        (0..num_rows * k).map(value).collect()
    }

    /// A matrix and another.
    fn pair<Q: RowQuantizer>(quantizer: &Q, num_cols: usize, k: usize) -> [PackedMatrix; 2] {
        let values = values(2 * num_cols, k);
        [0, num_cols].map(|first| {
            quantize(quantizer, [num_cols, k], 1, |row, to| {
                to.copy_from_slice(&values[(first + row) * k..][..k]);
            })
        })
    }

    /// A product, or the gated product of two: in one pass, or row by row as few rows are computed.
    fn product(avx2: Avx2, is_few: bool, num_rows: usize, matrices: &[PackedMatrix]) -> Vec<f32> {
        let main = &matrices[0];
        let (k, num_cols) = (main.num_cols, main.num_rows);
        let group = match ByteWeights::of(main).scales {
            ByteScales::Groups(scales) => scales.size,
            ByteScales::Rows(_) => usize::MAX,
        };
        let x = &values(num_rows, k)[..];
        let mut buffers = LineBuffers::default();
        let mut filling = buffers.for_codes(num_rows, k, group);
        let to = &filling.parts();
        FillLines { x, k, rows: 0..num_rows, to, form: AsCodes }.run(Scalar);
        let mut out = vec![f32::NAN; num_rows * num_cols];
        let task = ByteTask {
            x: filling.codes(),
            main: ByteWeights::of(main),
            up: matrices.get(1).map(ByteWeights::of),
            out: BlockOutput {
                place: Place::Rows(Rows::cached(&mut out)),
                num_cols,
                bias: None,
                up_bias: None,
                activation: Activation::Silu,
            },
        };
        let blocks = 0..num_cols.div_ceil(BLOCK_ROWS);
        if is_few {
            avx2.run_bytes_without_vnni(ByteBlocks { task: &task, blocks });
        } else {
            multiply(avx2, &task, blocks, &mut Scratch::default());
        }
        out
    }

    #[test]
    fn many_rows_have_the_sums_of_few() {
        let Some(avx2) = Avx2::detect() else { return };
        // Slices, row blocks, groups of blocks and passes, whole and in part.
        for (num_rows, num_cols, k) in
            [(1, 16, 64), (5, 40, 600), (131, 150, 130), (16, 17, 1100), (9, 33, 32)]
        {
            for (name, matrices) in [
                ("int8", pair(&int8::PerRow, num_cols, k)),
                ("q8_0", pair(&q8::Q8_0, num_cols, k)),
                ("int4 32", pair(&int4::Symmetric(32), num_cols, k)),
                ("int4 128", pair(&int4::Symmetric(128), num_cols, k)),
                ("int4 32, zero points", pair(&int4::Grouped(32), num_cols, k)),
                ("int4 64, zero points", pair(&int4::Grouped(64), num_cols, k)),
                ("mxfp4", pair(&mxfp4::Mxfp4, num_cols, k)),
            ] {
                for matrices in [&matrices[..1], &matrices] {
                    let [many, few] =
                        [false, true].map(|is_few| product(avx2, is_few, num_rows, matrices));
                    let what = format!("{num_rows} × {num_cols} × {k} {name}");
                    assert!(few.iter().all(|x| x.is_finite()), "{what}");
                    assert!(many == few, "{what}, {} matrices", matrices.len());
                }
            }
        }
    }
}
