//! Activations in lines of 64 bytes, prepared once per operation: what products with blocks of
//! weights read.
//!
//! Sixteen rows make a tile. A tile holds, for every step of the summed axis, one line of each
//! row: 64 codes or 32 bf16. A single tile of fewer rows holds just those; tiles beyond the first
//! always have sixteen, the missing ones with any content.

use std::ops::Range;

use half::bf16;

use super::share::{Parts, Scratch};
use super::simd::{Kernel, Simd, largest_magnitude, load};
use crate::formats::ROW_ALIGN;
use crate::formats::int8::{MAX_CODE, inverse_scale};

/// Rows of a tile.
pub const TILE_ROWS: usize = 16;
/// Bytes of a line.
pub const LINE_BYTES: usize = 64;

/// Prepared rows.
#[derive(Clone, Copy)]
pub struct Lines<'a> {
    bytes: &'a [i8],
    /// Rows of activations.
    pub num_rows: usize,
    /// Lines of a row.
    pub steps: usize,
}

impl<'a> Lines<'a> {
    /// Bytes of the lines of rows, with room to read a short tile as a whole one.
    pub fn num_bytes(num_rows: usize, steps: usize) -> usize {
        (num_rows.next_multiple_of(TILE_ROWS) * steps + TILE_ROWS) * LINE_BYTES
    }

    /// Rows that tiles hold.
    pub fn rows_per_tile(&self) -> usize {
        self.num_rows.min(TILE_ROWS)
    }

    /// Number of tiles.
    pub fn num_tiles(&self) -> usize {
        self.num_rows.div_ceil(TILE_ROWS)
    }

    /// The line of a row at a step.
    pub fn line(&self, row: usize, step: usize) -> *const i8 {
        assert!(row < self.num_rows && step < self.steps);
        self.bytes[line_index(self.num_rows, self.steps, row, step) * LINE_BYTES..].as_ptr()
    }
}

/// Index of a row's line.
fn line_index(num_rows: usize, steps: usize, row: usize, step: usize) -> usize {
    let tile = row / TILE_ROWS;
    (tile * steps + step) * num_rows.min(TILE_ROWS) + row % TILE_ROWS
}

/// Rows of codes, and what their sums are multiplied by.
#[derive(Clone, Copy)]
pub struct CodedLines<'a> {
    /// The codes.
    pub lines: Lines<'a>,
    /// `[tiles, groups, 16]`.
    scales: &'a [f32],
    /// Sums of the codes, in the same order.
    sums: &'a [i32],
    /// Groups of a row.
    pub groups: usize,
}

impl<'a> CodedLines<'a> {
    fn cell(&self, row: usize, group: usize) -> usize {
        (row / TILE_ROWS * self.groups + group) * TILE_ROWS + row % TILE_ROWS
    }

    /// Scale of a group of a row.
    #[inline(always)]
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales[self.cell(row, group)]
    }

    /// Sum of the codes of a group of a row.
    #[inline(always)]
    pub fn sum(&self, row: usize, group: usize) -> i32 {
        self.sums[self.cell(row, group)]
    }

    /// Scales of a group of all rows of a tile; those of rows that do not exist are anything.
    #[inline(always)]
    pub fn tile_scales(&self, tile: usize, group: usize) -> &'a [f32; TILE_ROWS] {
        let at = self.cell(tile * TILE_ROWS, group);
        self.scales[at..].first_chunk().expect("tiles have sixteen scales per group")
    }
}

/// Memory for prepared rows.
#[derive(Default)]
pub struct LineBuffers {
    lines: Scratch,
    scales: Scratch,
    sums: Scratch,
}

/// Words of scales (and as many of sums) that rows of groups of at least 32 elements need.
fn num_cells(num_rows: usize, width: usize) -> usize {
    num_rows.next_multiple_of(TILE_ROWS) * (width.next_multiple_of(ROW_ALIGN) / 32)
}

impl LineBuffers {
    /// Words of all buffers for rows of this number and width, in bf16 or bytes.
    pub fn words(num_rows: usize, width: usize) -> [usize; 2] {
        let steps = width.next_multiple_of(ROW_ALIGN) / 32;
        [Lines::num_bytes(num_rows, steps) / 4, num_cells(num_rows, width)]
    }

    /// Makes room without touching it.
    pub fn reserve(&mut self, num_rows: usize, width: usize) {
        let [lines, cells] = LineBuffers::words(num_rows, width);
        self.lines.reserve(lines);
        self.scales.reserve(cells);
        self.sums.reserve(cells);
    }

    /// Room for `x [num_rows, k]` in bf16.
    pub fn for_bf16(&mut self, num_rows: usize, k: usize) -> Filling<'_> {
        let steps = k.next_multiple_of(ROW_ALIGN) / 32;
        let bytes = self.lines.take_bytes(Lines::num_bytes(num_rows, steps));
        Filling { bytes, scales: &mut [], sums: &mut [], num_rows, steps, group: usize::MAX }
    }

    /// Room for `x [num_rows, k]` in bytes, `group` elements of a row sharing a scale.
    pub fn for_codes(&mut self, num_rows: usize, k: usize, group: usize) -> Filling<'_> {
        let width = k.next_multiple_of(ROW_ALIGN);
        let group = group.min(width);
        let bytes = self.lines.take_bytes(Lines::num_bytes(num_rows, width / LINE_BYTES));
        let cells = num_rows.next_multiple_of(TILE_ROWS) * width.div_ceil(group);
        Filling {
            bytes,
            scales: self.scales.take(cells),
            sums: self.sums.take_ints(cells),
            num_rows,
            steps: width / LINE_BYTES,
            group,
        }
    }
}

/// Rows that are being prepared.
pub struct Filling<'a> {
    bytes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
    num_rows: usize,
    steps: usize,
    /// Elements that share a scale.
    group: usize,
}

impl<'a> Filling<'a> {
    /// The parts that tasks fill, row by row.
    pub fn parts(&mut self) -> FillRows<'_> {
        FillRows {
            bytes: Parts::new(self.bytes),
            scales: Parts::new(self.scales),
            sums: Parts::new(self.sums),
            num_rows: self.num_rows,
            steps: self.steps,
            group: self.group,
        }
    }

    /// The lines, all filled.
    pub fn lines(self) -> Lines<'a> {
        Lines { bytes: self.bytes, num_rows: self.num_rows, steps: self.steps }
    }

    /// The lines of codes, all filled.
    pub fn codes(self) -> CodedLines<'a> {
        let groups = (self.steps * LINE_BYTES).div_ceil(self.group);
        let Filling { bytes, scales, sums, num_rows, steps, .. } = self;
        CodedLines { lines: Lines { bytes, num_rows, steps }, scales, sums, groups }
    }
}

/// Where rows go.
pub struct FillRows<'a> {
    bytes: Parts<'a, i8>,
    scales: Parts<'a, f32>,
    sums: Parts<'a, i32>,
    num_rows: usize,
    steps: usize,
    group: usize,
}

impl FillRows<'_> {
    fn line(&self, row: usize, step: usize) -> Range<usize> {
        let at = line_index(self.num_rows, self.steps, row, step) * LINE_BYTES;
        at..at + LINE_BYTES
    }

    /// Where sixteen bf16 of a row lie: half a line. Those of the next rows of its tile are whole
    /// lines apart; `rows` share a tile.
    #[inline(always)]
    pub fn half_lines(&self, rows: Range<usize>, half: usize) -> *mut bf16 {
        const HALF: usize = LINE_BYTES / 2;
        let at = self.line(rows.start, half / 2).start + half % 2 * HALF;
        self.bytes.start_of(at..at + (rows.len() - 1) * LINE_BYTES + HALF).cast()
    }

    /// Keeps what codes of a group of a row are multiplied by, and their sum.
    ///
    /// # Safety
    /// Tasks must have different rows.
    #[inline(always)]
    pub unsafe fn set_cell(&self, row: usize, group: usize, largest: f32, sum: i32) {
        let cell = (row / TILE_ROWS * self.groups() + group) * TILE_ROWS + row % TILE_ROWS;
        // SAFETY: the caller's contract: a cell belongs to one row.
        unsafe {
            self.scales.part(cell..cell + 1)[0] = largest / MAX_CODE;
            self.sums.part(cell..cell + 1)[0] = sum;
        }
    }

    /// Groups of a row.
    #[inline(always)]
    pub fn groups(&self) -> usize {
        (self.steps * LINE_BYTES).div_ceil(self.group)
    }

    /// Elements of a group.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The codes of a row at a step.
    ///
    /// # Safety
    /// Lines that are alive at the same time must be different.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub unsafe fn codes(&self, row: usize, step: usize) -> &mut [i8] {
        // SAFETY: the caller's contract.
        unsafe { self.bytes.part(self.line(row, step)) }
    }
}

/// A form of lines.
pub trait LineForm: Copy + Send + Sync {
    /// Prepares a row, which no other task has.
    fn fill_row<S: Simd>(self, simd: S, x: &[f32], row: usize, to: &FillRows<'_>);
}

/// bf16.
#[derive(Clone, Copy)]
pub struct AsBf16;

impl LineForm for AsBf16 {
    #[inline(always)]
    fn fill_row<S: Simd>(self, simd: S, x: &[f32], row: usize, to: &FillRows<'_>) {
        for step in 0..to.steps {
            // SAFETY: tasks have different rows, so different lines; a line is 32 bf16.
            unsafe {
                let line = to.bytes.part(to.line(row, step)).as_mut_ptr();
                for at in (0..32).step_by(S::LANES) {
                    let from = step * 32 + at;
                    let v = if from < x.len() { load(simd, x, from) } else { simd.splat(0.0) };
                    simd.store_bf16(line.add(2 * at).cast(), v);
                }
            }
        }
    }
}

/// Codes: the arithmetic of `formats::int8::quantize_row`, group by group.
#[derive(Clone, Copy)]
pub struct AsCodes;

impl LineForm for AsCodes {
    #[inline(always)]
    fn fill_row<S: Simd>(self, simd: S, x: &[f32], row: usize, to: &FillRows<'_>) {
        for group in 0..to.groups() {
            fill_group(simd, x, (row, group), to);
        }
    }
}

#[inline(always)]
fn fill_group<S: Simd>(simd: S, x: &[f32], (row, group): (usize, usize), to: &FillRows<'_>) {
    let k = x.len();
    let (start, end) = (group * to.group, (group + 1) * to.group);
    let largest = largest_magnitude(simd, &x[start.min(k)..end.min(k)]);
    let inverse = simd.splat(inverse_scale(largest));
    let mut sum = 0;
    let end = end.min(to.steps * LINE_BYTES);
    // Groups are whole lines or halves of one.
    let part = to.group.min(LINE_BYTES);
    for from in (start..end).step_by(part) {
        // SAFETY: tasks have different rows, so different lines.
        let line = unsafe { to.codes(row, from / LINE_BYTES) };
        let codes = &mut line[from % LINE_BYTES..][..part];
        for at in (0..part).step_by(S::LANES) {
            let at_k = from + at;
            let v = if at_k < k { load(simd, x, at_k) } else { simd.splat(0.0) };
            // SAFETY: `part` is a multiple of the lanes.
            unsafe { simd.store_i8(codes.as_mut_ptr().add(at), simd.mul(v, inverse)) }
        }
        sum += codes.iter().map(|&code| i32::from(code)).sum::<i32>();
    }
    // SAFETY: tasks have different rows.
    unsafe { to.set_cell(row, group, largest, sum) }
}

/// Prepares rows of `x [_, k]`.
pub struct FillLines<'a, F> {
    /// Activations.
    pub x: &'a [f32],
    /// Elements of a row.
    pub k: usize,
    /// Which rows; no other task has them.
    pub rows: Range<usize>,
    /// Where they go.
    pub to: &'a FillRows<'a>,
    /// As what.
    pub form: F,
}

impl<F: LineForm> Kernel for FillLines<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let FillLines { x, k, rows, to, form } = self;
        for row in rows {
            form.fill_row(simd, &x[row * k..(row + 1) * k], row, to);
        }
    }
}
