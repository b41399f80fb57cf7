//! `out = x · weightᵀ` for row-major weights, straight from the checkpoint's bytes.
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

use super::share::{Parts, Scratch};
use super::simd::{Float, Kernel, MAX_LANES, Simd, load, store};

/// Output columns per panel.
pub const PANEL: usize = 32;
/// Columns of a register tile; its rows are `Simd::TILE_ROWS`.
const TILE_COLS: usize = 4;
/// Elements of `k` per block: a tile's rows and columns of it fit the first-level cache.
const K_BLOCK: usize = 1024;
/// Rows whose accumulators are kept between blocks of `k`, in the second-level cache.
const ROW_BLOCK: usize = 96;

/// The operands, with shapes `x [num_rows, k]`, `weight [num_cols, k]`, `out [num_rows, num_cols]`.
pub struct Operands<'a, E> {
    /// Activations.
    pub x: &'a [f32],
    /// Weights.
    pub weight: &'a [E],
    /// Length of the summed axis.
    pub k: usize,
    /// Output columns.
    pub num_cols: usize,
    /// Output; tasks write disjoint columns.
    pub out: &'a Parts<'a, f32>,
}

impl<E> Clone for Operands<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Operands<'_, E> {}

impl<E> Operands<'_, E> {
    fn num_rows(&self) -> usize {
        self.x.len() / self.k
    }
}

/// Computes a range of output columns for all rows.
pub struct Columns<'a, E> {
    /// The operands.
    pub operands: Operands<'a, E>,
    /// Which output columns.
    pub cols: Range<usize>,
    /// Added to each of these columns.
    pub bias: &'a [f32],
    /// This thread's scratch.
    pub scratch: &'a mut Scratch,
}

impl<E: Float> Kernel for Columns<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Columns { operands, cols, bias, scratch } = self;
        for start in cols.clone().step_by(PANEL) {
            let panel = start..cols.end.min(start + PANEL);
            let bias = &bias[panel.start - cols.start..panel.end - cols.start];
            if operands.num_rows() <= S::TILE_ROWS {
                few_rows(simd, operands, panel, bias);
            } else {
                many_rows(simd, operands, panel, bias, scratch);
            }
        }
    }
}

/// One tile of rows: weights go from memory to registers.
#[inline(always)]
fn few_rows<S: Simd, E: Float>(simd: S, o: Operands<'_, E>, panel: Range<usize>, bias: &[f32]) {
    let num_rows = o.num_rows();
    let mut col = panel.start;
    while col < panel.end {
        let width = if panel.end - col >= TILE_COLS { TILE_COLS } else { 1 };
        let tile = Tile {
            x: o.x,
            x_stride: o.k,
            w: &o.weight[col * o.k..(col + width) * o.k],
            w_stride: o.k,
            len: o.k,
            carry: None,
            last: true,
        };
        let sums = dispatch_tile::<S, E, true>(simd, tile, num_rows, width);
        write_tile(&sums, o.out, 0..num_rows, (o.num_cols, col, width), &bias[col - panel.start..]);
        col += width;
    }
}

/// Many tiles of rows: weights are widened into scratch and reused by all of them.
#[inline(always)]
fn many_rows<S: Simd, E: Float>(
    simd: S,
    o: Operands<'_, E>,
    panel: Range<usize>,
    bias: &[f32],
    scratch: &mut Scratch,
) {
    let block_len = o.k.min(K_BLOCK).next_multiple_of(MAX_LANES);
    let scratch = scratch.take(PANEL * block_len + ROW_BLOCK * PANEL * MAX_LANES);
    let (wide, carries) = scratch.split_at_mut(PANEL * block_len);
    let num_rows = o.num_rows();
    for first_row in (0..num_rows).step_by(ROW_BLOCK) {
        let block_rows = first_row..num_rows.min(first_row + ROW_BLOCK);
        for from in (0..o.k).step_by(block_len) {
            let ks = from..o.k.min(from + block_len);
            widen_panel(simd, o, panel.clone(), ks.clone(), (wide, block_len));
            let block = Block { panel: panel.clone(), rows: block_rows.clone(), ks, block_len };
            multiply_block(simd, o, &block, (wide, carries), bias);
        }
    }
}

/// Which part of the product [`multiply_block`] computes.
struct Block {
    panel: Range<usize>,
    rows: Range<usize>,
    ks: Range<usize>,
    block_len: usize,
}

/// Copies `weight[panel, ks]` to `wide` as f32, rows padded with zeros to whole vectors.
#[inline(always)]
fn widen_panel<S: Simd, E: Float>(
    simd: S,
    o: Operands<'_, E>,
    panel: Range<usize>,
    ks: Range<usize>,
    (wide, stride): (&mut [f32], usize),
) {
    for (wide, col) in wide.chunks_exact_mut(stride).zip(panel) {
        let row = &o.weight[col * o.k + ks.start..col * o.k + ks.end];
        for at in (0..row.len()).step_by(S::LANES) {
            store(simd, wide, at, load(simd, row, at));
        }
    }
}

/// Adds one block of `k` to all tiles of the block; the last one writes the output.
#[inline(always)]
fn multiply_block<S: Simd, E: Float>(
    simd: S,
    o: Operands<'_, E>,
    block: &Block,
    (wide, carries): (&[f32], &mut [f32]),
    bias: &[f32],
) {
    let num_rows = block.rows.len();
    let tile_rows = num_rows.div_ceil(num_rows.div_ceil(S::TILE_ROWS));
    let (first, last) = (block.ks.start == 0, block.ks.end == o.k);
    for row in block.rows.clone().step_by(tile_rows) {
        let rows = row..block.rows.end.min(row + tile_rows);
        let x = &o.x[row * o.k + block.ks.start..(rows.end - 1) * o.k + block.ks.end];
        let mut col = block.panel.start;
        while col < block.panel.end {
            let width = if block.panel.end - col >= TILE_COLS { TILE_COLS } else { 1 };
            let in_panel = col - block.panel.start;
            let slot = ((row - block.rows.start) * PANEL + in_panel * rows.len()) * MAX_LANES;
            let carry = &mut carries[slot..slot + rows.len() * width * MAX_LANES];
            let tile = Tile {
                x,
                x_stride: o.k,
                w: &wide[in_panel * block.block_len..(in_panel + width) * block.block_len],
                w_stride: block.block_len,
                len: block.ks.len(),
                carry: (!(first && last)).then_some(Carry { first, sums: carry }),
                last,
            };
            let sums = dispatch_tile::<S, f32, false>(simd, tile, rows.len(), width);
            if last {
                let place = (o.num_cols, col, width);
                write_tile(&sums, o.out, rows.clone(), place, &bias[in_panel..]);
            }
            col += width;
        }
    }
}

/// Results of a tile, `[row][column]`.
type Sums = [[f32; TILE_COLS]; 6];

/// A register tile: some rows of x times up to four rows of weights, over `len` elements.
struct Tile<'a, E> {
    x: &'a [f32],
    x_stride: usize,
    w: &'a [E],
    w_stride: usize,
    len: usize,
    /// Accumulators between blocks of `k`; `None` when there is one block.
    carry: Option<Carry<'a>>,
    /// This is the last block: reduce the accumulators.
    last: bool,
}

/// Accumulators that wait for the next block of `k`.
struct Carry<'a> {
    first: bool,
    sums: &'a mut [f32],
}

/// Calls the tile compiled for this number of rows and columns.
#[inline(always)]
fn dispatch_tile<S: Simd, E: Float, const STREAM: bool>(
    simd: S,
    tile: Tile<'_, E>,
    rows: usize,
    cols: usize,
) -> Sums {
    if cols == TILE_COLS {
        dispatch_rows::<S, E, TILE_COLS, STREAM>(simd, tile, rows)
    } else {
        dispatch_rows::<S, E, 1, STREAM>(simd, tile, rows)
    }
}

#[inline(always)]
fn dispatch_rows<S: Simd, E: Float, const C: usize, const STREAM: bool>(
    simd: S,
    tile: Tile<'_, E>,
    rows: usize,
) -> Sums {
    match rows {
        1 => multiply_tile::<S, E, 1, C, STREAM>(simd, tile),
        2 if S::TILE_ROWS >= 2 => multiply_tile::<S, E, 2, C, STREAM>(simd, tile),
        3 if S::TILE_ROWS >= 3 => multiply_tile::<S, E, 3, C, STREAM>(simd, tile),
        4 if S::TILE_ROWS >= 4 => multiply_tile::<S, E, 4, C, STREAM>(simd, tile),
        5 if S::TILE_ROWS >= 5 => multiply_tile::<S, E, 5, C, STREAM>(simd, tile),
        6 if S::TILE_ROWS >= 6 => multiply_tile::<S, E, 6, C, STREAM>(simd, tile),
        _ => unreachable!("a tile has 1 to {} rows", S::TILE_ROWS),
    }
}

/// `R` rows by `C` columns. `STREAM` says that weights come from memory: the tile after this
/// one is then asked for in advance, because rows are too short for the hardware to see ahead.
#[inline(always)]
fn multiply_tile<S: Simd, E: Float, const R: usize, const C: usize, const STREAM: bool>(
    simd: S,
    tile: Tile<'_, E>,
) -> Sums {
    let Tile { x, x_stride, w, w_stride, len, carry, last } = tile;
    assert!(x.len() >= (R - 1) * x_stride + len && w.len() >= (C - 1) * w_stride + len);
    let mut acc = [[simd.splat(0.0); C]; R];
    if let Some(carry) = &carry {
        load_carry(simd, carry, &mut acc);
    }
    let whole = len - len % S::LANES;
    for k in (0..whole).step_by(S::LANES) {
        let mut wide = [simd.splat(0.0); C];
        for (c, wide) in wide.iter_mut().enumerate() {
            // SAFETY: `c * w_stride + k + LANES` is within `w`, checked above.
            let at = unsafe { w.as_ptr().add(c * w_stride + k) };
            if STREAM && (k * size_of::<E>()).is_multiple_of(64) {
                simd.prefetch(at.wrapping_add(C * w_stride));
            }
            // SAFETY: as above.
            *wide = unsafe { E::load_lanes(simd, at) };
        }
        for (r, acc) in acc.iter_mut().enumerate() {
            // SAFETY: `r * x_stride + k + LANES` is within `x`, checked above.
            let x = unsafe { simd.load_f32(x.as_ptr().add(r * x_stride + k)) };
            for (acc, &wide) in acc.iter_mut().zip(&wide) {
                *acc = simd.mul_add(x, wide, *acc);
            }
        }
    }
    if whole < len {
        for (r, acc) in acc.iter_mut().enumerate() {
            let x = load(simd, &x[r * x_stride..r * x_stride + len], whole);
            for (c, acc) in acc.iter_mut().enumerate() {
                let wide = load(simd, &w[c * w_stride..c * w_stride + len], whole);
                *acc = simd.mul_add(x, wide, *acc);
            }
        }
    }
    let mut sums = [[0.0; TILE_COLS]; 6];
    if last {
        reduce(simd, &acc, &mut sums);
    } else if let Some(carry) = carry {
        store_carry(simd, carry.sums, &acc);
    }
    sums
}

#[inline(always)]
fn reduce<S: Simd, const R: usize, const C: usize>(simd: S, acc: &[[S::V; C]; R], sums: &mut Sums) {
    for (sums, acc) in sums.iter_mut().zip(acc) {
        let mut four = [simd.splat(0.0); TILE_COLS];
        four[..C].copy_from_slice(acc);
        *sums = simd.sum4(four);
    }
}

#[inline(always)]
fn load_carry<S: Simd, const R: usize, const C: usize>(
    simd: S,
    carry: &Carry<'_>,
    acc: &mut [[S::V; C]; R],
) {
    if carry.first {
        return;
    }
    for (i, acc) in acc.as_flattened_mut().iter_mut().enumerate() {
        *acc = load(simd, carry.sums, i * S::LANES);
    }
}

#[inline(always)]
fn store_carry<S: Simd, const R: usize, const C: usize>(
    simd: S,
    sums: &mut [f32],
    acc: &[[S::V; C]; R],
) {
    for (i, acc) in acc.as_flattened().iter().enumerate() {
        store(simd, sums, i * S::LANES, *acc);
    }
}

/// Writes `sums + bias` to `out[rows, col..col + width]`.
#[inline(always)]
fn write_tile(
    sums: &Sums,
    out: &Parts<'_, f32>,
    rows: Range<usize>,
    (num_cols, col, width): (usize, usize, usize),
    bias: &[f32],
) {
    for (row, sums) in rows.zip(sums) {
        let at = row * num_cols + col;
        // SAFETY: this task alone writes these columns.
        let out = unsafe { out.part(at..at + width) };
        for ((out, sum), bias) in out.iter_mut().zip(sums).zip(bias) {
            *out = sum + bias;
        }
    }
}
