//! `out = x · weightᵀ` for row-major weights, on vectors of f32.
//!
//! Every output element is one dot product with one fixed order of operations: lane `l` of an
//! accumulator sums the products at `k ≡ l (mod LANES)` in ascending order, then the lanes are
//! added in the order of [`Simd::sum4`]. Tiles, blocks and threads only change *when* an
//! element is computed, never how, so a row's result does not depend on its batch.
//!
//! Threads take panels of [`PANEL`] output columns. Up to `TILE_ROWS` rows a panel is read
//! once, widened in registers, and the bound is memory. With more rows the panel is widened
//! once into scratch, block by block of `k`, and reused from cache by all rows.

use std::ops::Range;

use super::isa::Isa;
use super::share::{Parts, Scratch};
use super::simd::{Float, Kernel, MAX_LANES, Simd, load, store};
use crate::formats::PackedMatrix;

/// Output columns per panel.
pub const PANEL: usize = 32;
/// Columns of a register tile; its rows are `Simd::TILE_ROWS`.
const TILE_COLS: usize = 4;
/// Most rows of a register tile on any instruction set.
const MAX_TILE_ROWS: usize = 6;
/// Up to this many tiles of rows, widening weights in registers costs less than storing them.
const FEW_TILES: usize = 3;
/// Elements of `k` per block: a tile's rows and columns of it fit the first-level cache.
const K_BLOCK: usize = 1024;
/// Rows whose accumulators are kept between blocks of `k`, in the second-level cache.
const ROW_BLOCK: usize = 96;

/// Rows of floats.
#[derive(Clone, Copy)]
pub struct DenseRows<'a, E> {
    /// The elements of all rows.
    elements: &'a [E],
    /// Elements from a row to the next.
    stride: usize,
}

impl<'a, E: Float> DenseRows<'a, E> {
    /// The rows of a dense matrix; panics on another element type, or when elements are missing.
    pub fn of(matrix: &'a PackedMatrix) -> DenseRows<'a, E> {
        let (elements, stride) = (matrix.data.as_slice(), matrix.num_cols);
        assert!(elements.len() >= matrix.num_rows * stride, "rows of elements are whole");
        DenseRows { elements, stride }
    }

    /// Rows that follow each other.
    pub fn new(elements: &'a [E], stride: usize) -> DenseRows<'a, E> {
        DenseRows { elements, stride }
    }

    /// Elements `at..at + S::LANES` of a row.
    ///
    /// # Safety
    /// The row must have all of them.
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, simd: S, row: usize, at: usize) -> S::V {
        // SAFETY: the same contract.
        unsafe { E::load_lanes(simd, self.elements.as_ptr().add(row * self.stride + at)) }
    }

    /// The elements of a row of `len` from `at` on, fewer than a vector, and zeros.
    #[inline(always)]
    fn tail<S: Simd>(&self, simd: S, row: usize, at: usize, len: usize) -> S::V {
        load(simd, &self.elements[row * self.stride..row * self.stride + len], at)
    }
}

/// The operands, with shapes `x [num_rows, k]`, `weight [num_cols, k]`, `out [num_rows, num_cols]`.
#[derive(Clone, Copy)]
pub struct Operands<'a, E> {
    /// Activations.
    pub x: &'a [f32],
    /// Weights.
    pub weight: DenseRows<'a, E>,
    /// Length of the summed axis.
    pub k: usize,
    /// Output columns.
    pub num_cols: usize,
    /// Output; tasks write disjoint columns.
    pub out: &'a Parts<'a, f32>,
}

impl<E> Operands<'_, E> {
    fn num_rows(&self) -> usize {
        self.x.len() / self.k
    }
}

/// Computes the output columns `cols` for all rows; `bias`, one per output column, is added.
pub fn multiply_columns<E: Float>(
    isa: Isa,
    o: Operands<'_, E>,
    cols: Range<usize>,
    bias: Option<&[f32]>,
    scratch: &mut Scratch,
) {
    let few_rows = FEW_TILES * isa.run(TileRows);
    for start in cols.clone().step_by(PANEL) {
        let panel = start..cols.end.min(start + PANEL);
        let bias = bias.map_or(&[0.0; PANEL][..panel.len()], |bias| &bias[panel.clone()]);
        if o.num_rows() <= few_rows {
            isa.run(StreamPanel { o, panel, bias });
        } else {
            multiply_panel(isa, o, panel, bias, scratch);
        }
    }
}

/// Many rows: weights are widened into scratch, block by block of `k`, and reused by all tiles.
fn multiply_panel<E: Float>(
    isa: Isa,
    o: Operands<'_, E>,
    panel: Range<usize>,
    bias: &[f32],
    scratch: &mut Scratch,
) {
    let stride = o.k.min(K_BLOCK).next_multiple_of(MAX_LANES);
    let scratch = scratch.take(PANEL * stride + ROW_BLOCK * PANEL * MAX_LANES);
    let (wide, accumulators) = scratch.split_at_mut(PANEL * stride);
    for first_row in (0..o.num_rows()).step_by(ROW_BLOCK) {
        let rows = first_row..o.num_rows().min(first_row + ROW_BLOCK);
        for from in (0..o.k).step_by(stride) {
            let ks = from..o.k.min(from + stride);
            isa.run(Widen { o, panel: panel.clone(), ks: ks.clone(), wide, stride });
            // What is read next from memory: the next block of k, or the next panel.
            let (row, at) = if ks.end < o.k { (panel.start, ks.end) } else { (panel.end, 0) };
            isa.run(MultiplyBlock {
                x: o.x,
                k: o.k,
                wide,
                stride,
                accumulators,
                out: o.out,
                place: Place { rows: rows.clone(), cols: panel.clone(), num_cols: o.num_cols },
                ks,
                bias,
                ahead: Ahead::of(&o.weight, row, at),
            });
        }
    }
}

/// The rows of a register tile.
struct TileRows;

impl Kernel for TileRows {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        S::TILE_ROWS
    }
}

/// Up to [`FEW_TILES`] tiles of rows: weights go from memory to registers, and the first tile
/// leaves them in the first-level cache for the second.
struct StreamPanel<'a, E> {
    o: Operands<'a, E>,
    panel: Range<usize>,
    bias: &'a [f32],
}

impl<E: Float> Kernel for StreamPanel<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let StreamPanel { o, panel, bias } = self;
        let num_rows = o.num_rows();
        let tile_rows = num_rows.div_ceil(num_rows.div_ceil(S::TILE_ROWS));
        let mut accumulators = [0.0; MAX_TILE_ROWS * TILE_COLS * MAX_LANES];
        for col in panel.clone().step_by(TILE_COLS) {
            let cols = col..panel.end.min(col + TILE_COLS);
            for row in (0..num_rows).step_by(tile_rows) {
                let rows = row..num_rows.min(row + tile_rows);
                let tile = Tile {
                    x: &o.x[row * o.k..rows.end * o.k],
                    x_stride: o.k,
                    w: o.weight,
                    w_row: col,
                    len: o.k,
                    sums: &mut accumulators,
                    first: true,
                    last: true,
                    ahead: Ahead::of(&o.weight, cols.end, 0).unless(row > 0),
                };
                let sums = dispatch_tile(simd, tile, rows.len(), cols.len());
                let place = Place { rows, cols: cols.clone(), num_cols: o.num_cols };
                write_tile(&sums, o.out, place, &bias[col - panel.start..]);
            }
        }
    }
}

/// Copies `weight[panel, ks]` to `wide` as f32, rows padded with zeros to whole vectors.
struct Widen<'a, E> {
    o: Operands<'a, E>,
    panel: Range<usize>,
    ks: Range<usize>,
    wide: &'a mut [f32],
    stride: usize,
}

impl<E: Float> Kernel for Widen<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Widen { o, panel, ks, wide, stride } = self;
        for (wide, col) in wide.chunks_exact_mut(stride).zip(panel) {
            let whole = ks.len() - ks.len() % S::LANES;
            for at in (0..whole).step_by(S::LANES) {
                // SAFETY: the row has all elements of `ks`, which starts at a multiple of lanes.
                store(simd, wide, at, unsafe { o.weight.lanes(simd, col, ks.start + at) });
            }
            if whole < ks.len() {
                let last = o.weight.tail(simd, col, ks.start + whole, ks.end);
                store(simd, &mut wide[..ks.len()], whole, last);
                wide[ks.len()..].fill(0.0);
            }
        }
    }
}

/// Which part of the output.
#[derive(Clone)]
struct Place {
    rows: Range<usize>,
    cols: Range<usize>,
    /// Columns of the whole output.
    num_cols: usize,
}

/// Adds one block of `k` to the accumulators of some rows; the last block writes the output.
struct MultiplyBlock<'a> {
    x: &'a [f32],
    k: usize,
    wide: &'a [f32],
    stride: usize,
    accumulators: &'a mut [f32],
    out: &'a Parts<'a, f32>,
    place: Place,
    ks: Range<usize>,
    bias: &'a [f32],
    ahead: Ahead,
}

impl Kernel for MultiplyBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Place { rows: all_rows, cols: panel, num_cols } = self.place;
        let tile_rows = all_rows.len().div_ceil(all_rows.len().div_ceil(S::TILE_ROWS));
        let (first, last) = (self.ks.start == 0, self.ks.end == self.k);
        for row in all_rows.clone().step_by(tile_rows) {
            let rows = row..all_rows.end.min(row + tile_rows);
            let x = row * self.k + self.ks.start..(rows.end - 1) * self.k + self.ks.end;
            for col in panel.clone().step_by(TILE_COLS) {
                let cols = col..panel.end.min(col + TILE_COLS);
                let at = col - panel.start;
                let slot = ((row - all_rows.start) * PANEL + at * rows.len()) * MAX_LANES;
                let slot_len = rows.len() * cols.len() * MAX_LANES;
                let tile = Tile {
                    x: &self.x[x.clone()],
                    x_stride: self.k,
                    w: DenseRows { elements: self.wide, stride: self.stride },
                    w_row: at,
                    len: self.ks.len(),
                    sums: &mut self.accumulators[slot..slot + slot_len],
                    first,
                    last,
                    ahead: self.ahead.rows_from(at).unless(row > all_rows.start),
                };
                let sums = dispatch_tile(simd, tile, rows.len(), cols.len());
                if last {
                    let place = Place { rows: rows.clone(), cols, num_cols };
                    write_tile(&sums, self.out, place, &self.bias[at..]);
                }
            }
        }
    }
}

/// Results of a tile, `[row][column]`.
type Sums = [[f32; TILE_COLS]; MAX_TILE_ROWS];

/// A register tile: some rows of x times up to four rows of weights, over `len` elements.
struct Tile<'a, E> {
    x: &'a [f32],
    x_stride: usize,
    w: DenseRows<'a, E>,
    /// The first row of weights.
    w_row: usize,
    len: usize,
    /// Accumulators, one vector per output element, rows outermost.
    sums: &'a mut [f32],
    /// This is the first block of k: accumulators start at 0, else from `sums`.
    first: bool,
    /// This is the last block of k: the lanes of the accumulators are added.
    last: bool,
    /// Weights to ask for meanwhile.
    ahead: Ahead,
}

/// Weights that will be read from memory soon. Rows are too short for the hardware to see
/// ahead, so a tile asks for as many elements as it multiplies, row by row.
#[derive(Clone, Copy)]
struct Ahead {
    start: *const u8,
    row_bytes: usize,
    element_bytes: usize,
}

impl Ahead {
    /// Rows from `row` on, from element `at` on; nothing is read, so they may not exist.
    #[inline(always)]
    fn of<E>(weight: &DenseRows<'_, E>, row: usize, at: usize) -> Ahead {
        Ahead {
            start: weight.elements.as_ptr().wrapping_add(row * weight.stride + at).cast(),
            row_bytes: weight.stride * size_of::<E>(),
            element_bytes: size_of::<E>(),
        }
    }

    #[inline(always)]
    fn rows_from(self, row: usize) -> Ahead {
        Ahead { start: self.start.wrapping_add(row * self.row_bytes), ..self }
    }

    /// Asks for one and the same line when `enough` was asked for before: that keeps one
    /// version of the hot loop, and other lines in the cache.
    #[inline(always)]
    fn unless(self, enough: bool) -> Ahead {
        if enough { Ahead { row_bytes: 0, element_bytes: 0, ..self } } else { self }
    }
}

/// Calls the tile compiled for this number of rows; columns that do not fill a tile go one
/// element at a time.
#[inline(always)]
fn dispatch_tile<S: Simd, E: Float>(
    simd: S,
    mut tile: Tile<'_, E>,
    rows: usize,
    cols: usize,
) -> Sums {
    if cols < TILE_COLS {
        return multiply_edge(simd, &mut tile, rows, cols);
    }
    match rows {
        1 => multiply_tile::<S, E, 1, TILE_COLS>(simd, &mut tile),
        2 if S::TILE_ROWS >= 2 => multiply_tile::<S, E, 2, TILE_COLS>(simd, &mut tile),
        3 if S::TILE_ROWS >= 3 => multiply_tile::<S, E, 3, TILE_COLS>(simd, &mut tile),
        4 if S::TILE_ROWS >= 4 => multiply_tile::<S, E, 4, TILE_COLS>(simd, &mut tile),
        5 if S::TILE_ROWS >= 5 => multiply_tile::<S, E, 5, TILE_COLS>(simd, &mut tile),
        6 if S::TILE_ROWS >= 6 => multiply_tile::<S, E, 6, TILE_COLS>(simd, &mut tile),
        _ => unreachable!("a tile has 1 to {} rows", S::TILE_ROWS),
    }
}

/// The last columns of the output, where they do not fill a tile.
#[inline(always)]
fn multiply_edge<S: Simd, E: Float>(
    simd: S,
    tile: &mut Tile<'_, E>,
    rows: usize,
    cols: usize,
) -> Sums {
    let mut results = [[0.0; TILE_COLS]; MAX_TILE_ROWS];
    for (r, results) in results.iter_mut().enumerate().take(rows) {
        for (c, result) in results.iter_mut().enumerate().take(cols) {
            let slot = (r * cols + c) * S::LANES;
            let mut element = Tile {
                x: &tile.x[r * tile.x_stride..],
                w_row: tile.w_row + c,
                sums: &mut tile.sums[slot..slot + S::LANES],
                ..*tile
            };
            *result = multiply_tile::<S, E, 1, 1>(simd, &mut element)[0][0];
        }
    }
    results
}

/// `R` rows by `C` columns.
#[inline(always)]
fn multiply_tile<S: Simd, E: Float, const R: usize, const C: usize>(
    simd: S,
    tile: &mut Tile<'_, E>,
) -> Sums {
    whole_vectors::<S, E, R, C>(simd, tile);
    if !tile.len.is_multiple_of(S::LANES) {
        tail::<S, E, R, C>(simd, tile);
    }
    let mut results = [[0.0; TILE_COLS]; MAX_TILE_ROWS];
    if tile.last {
        for (r, results) in results.iter_mut().enumerate().take(R) {
            let mut four = [simd.splat(0.0); TILE_COLS];
            for (c, four) in four.iter_mut().enumerate().take(C) {
                *four = load(simd, tile.sums, (r * C + c) * S::LANES);
            }
            *results = simd.sum4(four);
        }
    }
    results
}

/// The hot loop. Accumulators live in registers only here: the compiler keeps an array in
/// registers when nothing but fully unrolled loops touches it.
#[inline(always)]
fn whole_vectors<S: Simd, E: Float, const R: usize, const C: usize>(
    simd: S,
    tile: &mut Tile<'_, E>,
) {
    let Tile { x_stride, w, w_row, len, ahead, .. } = *tile;
    assert!(tile.x.len() >= (R - 1) * x_stride + len);
    assert!(tile.sums.len() >= R * C * S::LANES);
    let (x, sums) = (tile.x.as_ptr(), tile.sums.as_mut_ptr());
    let mut acc = [[simd.splat(0.0); C]; R];
    if !tile.first {
        for (r, acc) in acc.iter_mut().enumerate() {
            for (c, acc) in acc.iter_mut().enumerate() {
                // SAFETY: within `sums`, checked above.
                *acc = unsafe { simd.load_f32(sums.add((r * C + c) * S::LANES)) };
            }
        }
    }
    for k in (0..len - len % S::LANES).step_by(S::LANES) {
        let mut wide = [simd.splat(0.0); C];
        for (c, wide) in wide.iter_mut().enumerate() {
            let at = c * ahead.row_bytes + k * ahead.element_bytes;
            simd.prefetch(ahead.start.wrapping_add(at));
            // SAFETY: whoever made the tile vouches for `C` rows of `len` elements.
            *wide = unsafe { w.lanes(simd, w_row + c, k) };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: `r * x_stride + k + LANES` is within `x`, checked above.
            let x = unsafe { simd.load_f32(x.add(r * x_stride + k)) };
            for (acc, &wide) in acc.iter_mut().zip(&wide) {
                *acc = simd.mul_add(x, wide, *acc);
            }
        }
    }
    for (r, acc) in acc.iter().enumerate() {
        for (c, acc) in acc.iter().enumerate() {
            // SAFETY: within `sums`, checked above.
            unsafe { simd.store_f32(sums.add((r * C + c) * S::LANES), *acc) };
        }
    }
}

/// The last, partial vector of k; lanes beyond it multiply zeros.
#[inline(always)]
fn tail<S: Simd, E: Float, const R: usize, const C: usize>(simd: S, tile: &mut Tile<'_, E>) {
    let Tile { x_stride, w, w_row, len, .. } = *tile;
    let at = len - len % S::LANES;
    for r in 0..R {
        let x = load(simd, &tile.x[r * x_stride..r * x_stride + len], at);
        for c in 0..C {
            let wide = w.tail(simd, w_row + c, at, len);
            let slot = (r * C + c) * S::LANES;
            let sum = simd.mul_add(x, wide, load(simd, tile.sums, slot));
            store(simd, tile.sums, slot, sum);
        }
    }
}

/// Writes `sums + bias` to the output.
#[inline(always)]
fn write_tile(sums: &Sums, out: &Parts<'_, f32>, place: Place, bias: &[f32]) {
    let Place { rows, cols, num_cols } = place;
    for (row, sums) in rows.zip(sums) {
        // SAFETY: this task alone writes these columns.
        let out = unsafe { out.part(row * num_cols + cols.start..row * num_cols + cols.end) };
        for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
            *out = sum + bias;
        }
    }
}
