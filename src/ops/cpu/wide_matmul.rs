//! `out = x · weightᵀ` for blocks whose words are widened, on vectors: activations keep their
//! precision, or that of bf16.
//!
//! Sixteen output columns are the lanes. An accumulator runs over a slice of [`SLICE`] elements
//! in ascending order; slices are scaled and added up in ascending order, in every regime.
//!
//! Few rows: words go from memory to registers, and every line is read once. Many rows: a slice
//! of all columns of a pass is widened into the first-level cache, and all rows pass over it.

use std::marker::PhantomData;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::avx512_bf16::{Avx512Bf16, PairKernel};
use super::lines::{LINE_BYTES, Lines};
use super::share::Scratch;
use super::simd::{Kernel, Simd, load, store};
use super::weight_blocks::{BlockOutput, Blocks, SliceScales};
use super::wide_simd::{FloatWords, Floats, Products, SLICE, STREAMED_ROWS, Words};
use crate::formats::PackedMatrix;
use crate::formats::blocks::{BLOCK_ROWS, WORD_BYTES};

/// Vectors of columns of a pass: two chains of sums per row hide the latency of a product beside
/// the time that widening takes.
const VECTORS: usize = 2;
/// Most rows that share the loads of widened words: twelve sums and what is multiplied fit
/// sixteen registers.
const ROWS_PER_PASS: usize = 6;
/// Rows whose sums, and a slice of whose activations, stay in the second-level cache.
const ROW_BLOCK: usize = 256;
/// Slices from what is read to what is asked for: two pages hide the latency of memory.
const SLICES_AHEAD: usize = 4;
/// Bytes of a unit.
const UNIT_BYTES: usize = 4;
/// Units of a line of activations.
const LINE_UNITS: usize = LINE_BYTES / UNIT_BYTES;

/// Rows of activations as units.
#[derive(Clone, Copy)]
pub enum WideRows<'a> {
    /// f32, row by row.
    Floats {
        /// All elements.
        x: &'a [f32],
        /// Elements of a row.
        k: usize,
    },
    /// bf16 in lines.
    Pairs(Lines<'a>),
}

impl WideRows<'_> {
    fn num_rows(&self) -> usize {
        match self {
            WideRows::Floats { x, k } => x.len() / k,
            WideRows::Pairs(lines) => lines.num_rows,
        }
    }

    /// Units of a row.
    fn units(&self) -> usize {
        match self {
            WideRows::Floats { k, .. } => *k,
            WideRows::Pairs(lines) => lines.steps * LINE_UNITS,
        }
    }

    /// The first sixteen units of a row.
    #[inline(always)]
    fn line(&self, row: usize) -> *const u8 {
        match self {
            WideRows::Floats { x, k } => x[row * k..(row + 1) * k].as_ptr().cast(),
            WideRows::Pairs(lines) => lines.line(row, 0).cast(),
        }
    }

    /// Bytes from sixteen units of a row to the next sixteen.
    fn step_bytes(&self) -> usize {
        match self {
            WideRows::Floats { .. } => LINE_BYTES,
            WideRows::Pairs(lines) => lines.rows_per_tile() * LINE_BYTES,
        }
    }
}

/// A matrix in blocks and its scales.
#[derive(Clone, Copy)]
pub struct WideWeights<'a> {
    blocks: Blocks<'a>,
    scales: Option<SliceScales<'a>>,
}

impl<'a> WideWeights<'a> {
    /// Those of a matrix in blocks.
    pub fn of(matrix: &'a PackedMatrix) -> WideWeights<'a> {
        let scales = matrix.quantized.as_ref().map(|_| SliceScales::of(matrix));
        WideWeights { blocks: Blocks::of(matrix), scales }
    }
}

/// A product, or the gated product of two.
pub struct WideTask<'a> {
    /// Activations, in the units of the machine's products.
    pub x: WideRows<'a>,
    /// The matrix, or the gate.
    pub main: WideWeights<'a>,
    /// What the activated gate is multiplied by.
    pub up: Option<WideWeights<'a>>,
    /// Where results go.
    pub out: BlockOutput<'a>,
}

/// Some blocks of a task on words of type `W`.
pub struct WideBlocks<'a, W> {
    /// The task.
    pub task: &'a WideTask<'a>,
    /// Which blocks; no other task has them.
    pub blocks: Range<usize>,
    /// Room for sums and widened words.
    pub scratch: &'a mut Scratch,
    /// What the words hold.
    pub words: PhantomData<W>,
}

impl<W: FloatWords> Kernel for WideBlocks<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        multiply_blocks::<Floats<S>, W>(Floats(simd), self);
    }
}

#[cfg(target_arch = "x86_64")]
impl<W: Words<Avx512Bf16>> PairKernel for WideBlocks<'_, W> {
    #[inline(always)]
    fn run(self, products: Avx512Bf16) {
        multiply_blocks::<Avx512Bf16, W>(products, self);
    }
}

#[inline(always)]
fn multiply_blocks<P: Products, W: Words<P>>(products: P, job: WideBlocks<'_, W>) {
    let WideBlocks { task, blocks, scratch, .. } = job;
    let lanes = P::Sums::LANES;
    let per_pass = VECTORS * lanes / BLOCK_ROWS;
    let widened = VECTORS * lanes * SLICE / P::UNIT;
    let sums = ROW_BLOCK.min(task.x.num_rows()) * VECTORS * lanes;
    let (widened, sums) = scratch.take(widened + 2 * sums).split_at_mut(widened);
    let widened = widened.as_mut_ptr().cast();
    for first in (0..task.x.num_rows()).step_by(ROW_BLOCK) {
        let rows = first..task.x.num_rows().min(first + ROW_BLOCK);
        for block in blocks.clone().step_by(per_pass) {
            let rows = rows.clone();
            if block + per_pass <= blocks.end {
                let pass = Pass::<P, W, VECTORS>::new(products, task.x, rows, block, widened);
                pass.run(task, sums);
            } else {
                let pass = Pass::<P, W, 1>::new(products, task.x, rows, block, widened);
                pass.run(task, sums);
            }
        }
    }
}

/// `V` vectors of columns from `block` on, for some rows.
struct Pass<'a, P, W, const V: usize> {
    products: P,
    x: WideRows<'a>,
    rows: Range<usize>,
    block: usize,
    /// Room for a slice of widened words.
    widened: *mut u8,
    words: PhantomData<W>,
}

/// A slice of the words of a pass.
struct Slice<P: Products, const V: usize> {
    /// The first word of every vector.
    words: [*const u8; V],
    /// What is asked for meanwhile.
    ahead: [*const u8; V],
    scales: [<P::Sums as Simd>::V; V],
    /// Units of it that exist, and the lines of activations before it.
    units: usize,
    first_line: usize,
}

impl<'a, P: Products, W: Words<P>, const V: usize> Pass<'a, P, W, V> {
    const SLICE_UNITS: usize = SLICE / P::UNIT;
    const SLICE_BYTES: usize = Self::SLICE_UNITS / W::UNITS * LINE_BYTES;

    #[inline(always)]
    fn new(
        products: P,
        x: WideRows<'a>,
        rows: Range<usize>,
        block: usize,
        widened: *mut u8,
    ) -> Pass<'a, P, W, V> {
        Pass { products, x, rows, block, widened, words: PhantomData }
    }

    #[inline(always)]
    fn run(&self, task: &WideTask<'_>, sums: &mut [f32]) {
        let width = V * P::Sums::LANES;
        let (main, up) = sums.split_at_mut(self.rows.len() * width);
        // One call: the kernel is inlined here.
        for (weights, sums) in [(Some(&task.main), &mut *main), (task.up.as_ref(), &mut *up)] {
            if let Some(weights) = weights {
                self.multiply(weights, sums);
            }
        }
        for at in (0..width).step_by(BLOCK_ROWS) {
            let columns = task.out.columns(self.block + at / BLOCK_ROWS);
            for (i, row) in self.rows.clone().enumerate() {
                let from = i * width + at;
                let main = main[from..].first_chunk().expect("a row has whole blocks");
                let up = up[from..].first_chunk().filter(|_| task.up.is_some());
                // SAFETY: this task alone has the blocks.
                unsafe { columns.write(self.products.sums(), row, main, up) }
            }
        }
    }

    /// Fills `sums [rows, V · LANES]`.
    #[inline(always)]
    fn multiply(&self, weights: &WideWeights<'_>, sums: &mut [f32]) {
        let (num_rows, width) = (self.rows.len(), V * P::Sums::LANES);
        let sums = &mut sums[..num_rows * width];
        sums.fill(0.0);
        for slice in 0..self.x.units().div_ceil(Self::SLICE_UNITS) {
            let slice = self.slice(weights, slice);
            // Rows may end within a word; units, which are counted below, lead to the same sums.
            if num_rows <= W::MOST_STREAMED_ROWS && slice.units.is_multiple_of(W::UNITS) {
                let rows_per_pass = num_rows.div_ceil(num_rows.div_ceil(STREAMED_ROWS));
                for first in (0..num_rows).step_by(rows_per_pass) {
                    let rows = first..num_rows.min(first + rows_per_pass);
                    // SAFETY: blocks have all words of the slice.
                    unsafe { self.stream(&slice, rows, &mut sums[first * width..]) }
                }
                continue;
            }
            // SAFETY: as above; there is room for a slice.
            unsafe { self.widen(&slice) }
            let rows_per_pass = num_rows.div_ceil(num_rows.div_ceil(ROWS_PER_PASS));
            for first in (0..num_rows).step_by(rows_per_pass) {
                let rows = first..num_rows.min(first + rows_per_pass);
                let sums = &mut sums[first * width..];
                // SAFETY: the slice was just widened.
                unsafe { self.reuse(&slice, rows, sums) }
            }
        }
    }

    #[inline(always)]
    fn slice(&self, weights: &WideWeights<'_>, slice: usize) -> Slice<P, V> {
        let (simd, lanes) = (self.products.sums(), P::Sums::LANES);
        let block_bytes = weights.blocks.block_bytes;
        let (at, ahead) = (slice * Self::SLICE_BYTES, (slice + SLICES_AHEAD) * Self::SLICE_BYTES);
        // Beyond a block follow those of the next pass.
        let next_pass = (V * lanes).div_ceil(BLOCK_ROWS) * block_bytes - block_bytes;
        let ahead = if ahead < block_bytes { ahead } else { ahead + next_pass };
        let mut found = Slice {
            words: [std::ptr::null(); V],
            ahead: [std::ptr::null(); V],
            scales: [simd.splat(W::SCALE); V],
            units: Self::SLICE_UNITS.min(self.x.units() - slice * Self::SLICE_UNITS),
            first_line: slice * Self::SLICE_UNITS / LINE_UNITS,
        };
        for v in 0..V {
            let (block, lane) = (self.block + v * lanes / BLOCK_ROWS, v * lanes % BLOCK_ROWS);
            let start = weights.blocks.block(block).wrapping_add(lane * WORD_BYTES);
            found.words[v] = start.wrapping_add(at);
            found.ahead[v] = start.wrapping_add(ahead);
            if let Some(scales) = &weights.scales {
                let scales = load(simd, scales.of_element(block, slice * SLICE), lane);
                found.scales[v] = simd.mul(scales, found.scales[v]);
            }
        }
        found
    }

    /// Few rows, or some of them.
    ///
    /// # Safety
    /// The words of the slice must be readable.
    #[inline(always)]
    unsafe fn stream(&self, slice: &Slice<P, V>, rows: Range<usize>, sums: &mut [f32]) {
        // SAFETY: the same contract.
        unsafe {
            match rows.len() {
                1 => self.stream_rows::<1>(slice, rows.start, sums),
                2 => self.stream_rows::<2>(slice, rows.start, sums),
                3 => self.stream_rows::<3>(slice, rows.start, sums),
                4 => self.stream_rows::<4>(slice, rows.start, sums),
                rows => unreachable!("{rows} rows are not streamed at once"),
            }
        }
    }

    /// # Safety
    /// The words of the slice must be readable.
    #[inline(always)]
    unsafe fn stream_rows<const R: usize>(
        &self,
        slice: &Slice<P, V>,
        first: usize,
        sums: &mut [f32],
    ) {
        let (simd, step_bytes) = (self.products.sums(), self.x.step_bytes());
        let x = self.lines::<R>(first, slice);
        let mut acc = [[simd.splat(0.0); V]; R];
        for word in 0..slice.units / W::UNITS {
            let unit = word * W::UNITS;
            let at = unit / LINE_UNITS * step_bytes + unit % LINE_UNITS * UNIT_BYTES;
            for v in 0..V {
                simd.prefetch(slice.ahead[v].wrapping_add(word * LINE_BYTES));
                // SAFETY: the same contract; rows have all units of the slice.
                unsafe {
                    let wide = W::widen(self.products, slice.words[v].add(word * LINE_BYTES));
                    for (i, &units) in wide.iter().enumerate().take(W::UNITS) {
                        for (x, acc) in x.iter().zip(&mut acc) {
                            let x = x.add(at + i * UNIT_BYTES);
                            acc[v] = self.products.add_products(acc[v], units, x);
                        }
                    }
                }
            }
        }
        self.add(slice, &acc, sums);
    }

    /// The lines of `R` rows at the start of a slice.
    #[inline(always)]
    fn lines<const R: usize>(&self, first: usize, slice: &Slice<P, V>) -> [*const u8; R] {
        let mut lines = [std::ptr::null(); R];
        for (i, line) in lines.iter_mut().enumerate() {
            let row = self.x.line(self.rows.start + first + i);
            *line = row.wrapping_add(slice.first_line * self.x.step_bytes());
        }
        lines
    }

    /// Widens a slice: unit by unit, all vectors.
    ///
    /// # Safety
    /// The words of the slice must be readable, and there must be room for their units.
    #[inline(always)]
    unsafe fn widen(&self, slice: &Slice<P, V>) {
        let (simd, vector) = (self.products.sums(), P::Sums::LANES * UNIT_BYTES);
        for word in 0..slice.units.div_ceil(W::UNITS) {
            for v in 0..V {
                simd.prefetch(slice.ahead[v].wrapping_add(word * LINE_BYTES));
                // SAFETY: the same contract.
                unsafe {
                    let wide = W::widen(self.products, slice.words[v].add(word * LINE_BYTES));
                    for (i, &units) in wide.iter().enumerate().take(W::UNITS) {
                        let at = ((word * W::UNITS + i) * V + v) * vector;
                        self.products.store(self.widened.add(at), units);
                    }
                }
            }
        }
    }

    /// Many rows: a few of them.
    ///
    /// # Safety
    /// The slice must be widened.
    #[inline(always)]
    unsafe fn reuse(&self, slice: &Slice<P, V>, rows: Range<usize>, sums: &mut [f32]) {
        // SAFETY: the same contract.
        unsafe {
            match rows.len() {
                1 => self.reuse_rows::<1>(slice, rows.start, sums),
                2 => self.reuse_rows::<2>(slice, rows.start, sums),
                3 => self.reuse_rows::<3>(slice, rows.start, sums),
                4 => self.reuse_rows::<4>(slice, rows.start, sums),
                5 => self.reuse_rows::<5>(slice, rows.start, sums),
                6 => self.reuse_rows::<6>(slice, rows.start, sums),
                rows => unreachable!("{rows} rows do not share registers"),
            }
        }
    }

    /// # Safety
    /// The slice must be widened.
    #[inline(always)]
    unsafe fn reuse_rows<const R: usize>(
        &self,
        slice: &Slice<P, V>,
        first: usize,
        sums: &mut [f32],
    ) {
        let (simd, vector) = (self.products.sums(), P::Sums::LANES * UNIT_BYTES);
        let (x, step_bytes) = (self.lines::<R>(first, slice), self.x.step_bytes());
        let mut acc = [[simd.splat(0.0); V]; R];
        // One loop: of two, compilers keep two copies of the sums.
        for unit in 0..slice.units {
            let at = unit / LINE_UNITS * step_bytes + unit % LINE_UNITS * UNIT_BYTES;
            // SAFETY: the same contract; rows have all units of the slice.
            unsafe {
                let from = self.widened.add(unit * V * vector);
                let mut wide = [self.products.load(from); V];
                for (v, wide) in wide.iter_mut().enumerate().skip(1) {
                    *wide = self.products.load(from.add(v * vector));
                }
                for (x, acc) in x.iter().zip(&mut acc) {
                    for (acc, &wide) in acc.iter_mut().zip(&wide) {
                        *acc = self.products.add_products(*acc, wide, x.add(at));
                    }
                }
            }
        }
        self.add(slice, &acc, sums);
    }

    /// Scales the sums of a slice and adds them to those of all slices before it.
    #[inline(always)]
    fn add<const R: usize>(
        &self,
        slice: &Slice<P, V>,
        acc: &[[<P::Sums as Simd>::V; V]; R],
        sums: &mut [f32],
    ) {
        let (simd, lanes) = (self.products.sums(), P::Sums::LANES);
        for (sums, acc) in sums.chunks_exact_mut(V * lanes).zip(acc) {
            for (v, &acc) in acc.iter().enumerate() {
                let sum = simd.mul_add(acc, slice.scales[v], load(simd, sums, v * lanes));
                store(simd, sums, v * lanes, sum);
            }
        }
    }
}
