//! How the bytes of a weight matrix are laid out while computing.
//!
//! One layout per file. A checkpoint scheme (`weights`) or an online quantization produces a
//! [`PackedMatrix`]; `ops` multiplies by it. Knows nothing of files or models.
//!
//! What is multiplied as integers (and, where the machine has tiles, bf16) lies in blocks of
//! sixteen rows, see [`blocks`]; the other layouts are row-major, a row's codes padded to
//! [`ROW_ALIGN`] elements. Scales lie apart, one per [`ScaleGrid`] cell.

pub mod blocks;
pub mod dense;
pub mod fp8;
pub mod int4;
pub mod int8;
pub mod q8;

use blocks::BLOCK_ROWS;

use crate::tensor::{DType, Element, Tensor};

/// Elements to which rows of codes are padded: one row of a tile, one cache line of bytes.
pub const ROW_ALIGN: usize = 64;

/// The layouts that the kernels understand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Row-major elements of the data tensor's own dtype (f32, bf16 or f16).
    Dense,
    /// bf16 in blocks.
    DenseBlocks,
    /// Bytes in blocks with a scale per row; activations are quantized per token.
    Int8,
    /// Bytes in blocks with a scale per group of a row; activations are quantized per group.
    Q8,
    /// Four bits in folded blocks with a scale, and perhaps a zero point, per group of a row;
    /// activations are quantized per group.
    Int4,
    /// Row-major bytes with a scale per row; activations keep their precision.
    W8A16,
    /// Row-major FP8 E4M3 with a scale per block of rows and columns; activations keep their
    /// precision.
    Fp8,
}

impl Format {
    /// Whether sixteen rows lie together.
    pub fn is_in_blocks(self) -> bool {
        !matches!(self, Format::Dense | Format::W8A16 | Format::Fp8)
    }

    /// Whether groups of activations have scales of their own.
    pub fn quantizes_groups(self) -> bool {
        matches!(self, Format::Q8 | Format::Int4)
    }
}

/// Which elements share a scale: blocks of `rows` × `cols`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleGrid {
    /// Rows of a block.
    pub rows: usize,
    /// Columns of a block; a multiple of 32, or at least a whole row.
    pub cols: usize,
}

impl ScaleGrid {
    /// One scale per row.
    pub fn per_row(num_cols: usize) -> ScaleGrid {
        ScaleGrid { rows: 1, cols: num_cols.next_multiple_of(ROW_ALIGN) }
    }

    /// One scale per `cols` elements of a row.
    pub fn groups(cols: usize) -> ScaleGrid {
        ScaleGrid { rows: 1, cols }
    }

    /// Shape of the scales of a row-major `[num_rows, num_cols]` matrix: a row per row of cells.
    pub fn shape(self, num_rows: usize, num_cols: usize) -> [usize; 2] {
        [num_rows.div_ceil(self.rows), num_cols.div_ceil(self.cols)]
    }

    /// Shape of the scales of a matrix in blocks: those of a block's rows lie together, group by
    /// group, up to the end of the padded rows.
    pub fn blocks_shape(self, num_rows: usize, num_cols: usize) -> [usize; 3] {
        let groups = num_cols.next_multiple_of(ROW_ALIGN).div_ceil(self.cols);
        [num_rows.div_ceil(BLOCK_ROWS), groups, BLOCK_ROWS]
    }
}

/// A weight matrix `[num_rows, num_cols]` = `[out_features, in_features]`, ready for `ops::matmul`.
#[derive(Debug)]
pub struct PackedMatrix {
    /// How `data` is laid out.
    pub format: Format,
    /// Output features.
    pub num_rows: usize,
    /// Input features, the axis that is summed over.
    pub num_cols: usize,
    /// Elements or codes.
    pub data: Tensor,
    /// Scales and zero points of a quantized layout.
    pub quantized: Option<Quantized>,
}

/// What a quantized layout has beside its codes.
#[derive(Debug)]
pub struct Quantized {
    /// Which elements share a scale.
    pub grid: ScaleGrid,
    /// `grid.shape(…)`, or `grid.blocks_shape(…)` of blocks: f32, or f16 where groups are small.
    pub scales: Tensor,
    /// Zero points of the same shape, bytes from 0 to 15 (int4).
    pub zero_points: Option<Tensor>,
}

impl PackedMatrix {
    /// Size of the packed bytes.
    pub fn size_bytes(&self) -> usize {
        let extra = self.quantized.as_ref().map_or(0, |quantized| {
            quantized.scales.size_bytes()
                + quantized.zero_points.as_ref().map_or(0, Tensor::size_bytes)
        });
        self.data.size_bytes() + extra
    }

    /// Bytes of the elements or codes of a row, without what blocks are padded with.
    pub fn row_bytes(&self) -> usize {
        let width = self.num_cols.next_multiple_of(ROW_ALIGN);
        match self.format {
            Format::Dense => self.num_cols * self.data.dtype().size_bytes(),
            Format::DenseBlocks => 2 * width,
            Format::Int4 => width / 2,
            Format::Int8 | Format::Q8 | Format::W8A16 | Format::Fp8 => width,
        }
    }

    /// One row as f32: what the codes stand for, rounded once.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.num_cols];
        self.read_row(row, &mut out);
        out
    }

    /// As [`PackedMatrix::row`], into `to`.
    pub fn read_row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.num_rows, "row {row} of {}", self.num_rows);
        let (bytes, row_bytes) = (self.data.bytes(), self.row_bytes());
        let block_bytes = BLOCK_ROWS * row_bytes;
        match self.format {
            Format::Dense => dense::read_row(self, row, to),
            Format::DenseBlocks => {
                let block = &bytes[row / BLOCK_ROWS * block_bytes..][..block_bytes];
                for (col, to) in to.iter_mut().enumerate() {
                    let at = blocks::position(row % BLOCK_ROWS, 2 * col);
                    *to = half::bf16::from_le_bytes([block[at], block[at + 1]]).to_f32();
                }
            }
            Format::Int8 | Format::Q8 | Format::Int4 => {
                self.scaled(row, to, |col| self.code(row, col) as f32);
            }
            Format::W8A16 => {
                let codes = &bytes[row * row_bytes..][..row_bytes];
                self.scaled(row, to, |col| f32::from(codes[col] as i8));
            }
            Format::Fp8 => {
                let codes = &bytes[row * row_bytes..][..row_bytes];
                self.scaled(row, to, |col| fp8::decode(codes[col]));
            }
        }
    }

    /// The code of an element of a matrix of integers in blocks, less its zero point.
    pub fn code(&self, row: usize, col: usize) -> i32 {
        let block_bytes = BLOCK_ROWS * self.row_bytes();
        let block = &self.data.bytes()[row / BLOCK_ROWS * block_bytes..][..block_bytes];
        if self.format == Format::Int4 {
            let code = blocks::unfolded(block, row % BLOCK_ROWS, col);
            return i32::from(code) - i32::from(self.zero_point(row, col));
        }
        assert!(matches!(self.format, Format::Int8 | Format::Q8), "integers in blocks");
        i32::from(block[blocks::position(row % BLOCK_ROWS, col)] as i8)
    }

    fn scaled(&self, row: usize, to: &mut [f32], value: impl Fn(usize) -> f32) {
        for (col, to) in to.iter_mut().enumerate() {
            *to = value(col) * self.scale(row, col);
        }
    }

    /// The scale of an element; panics for a dense matrix.
    pub fn scale(&self, row: usize, col: usize) -> f32 {
        let (quantized, cell) = self.cell(row, col);
        match quantized.scales.dtype() {
            DType::F16 => quantized.scales.as_slice::<half::f16>()[cell].to_f32(),
            _ => quantized.scales.as_slice::<f32>()[cell],
        }
    }

    /// The code that stands for 0 in an element's group (int4).
    pub fn zero_point(&self, row: usize, col: usize) -> u8 {
        let (quantized, cell) = self.cell(row, col);
        let zero_points = quantized.zero_points.as_ref();
        zero_points.map_or(int4::MIDDLE, |zeros| zeros.as_slice::<u8>()[cell])
    }

    /// Index of an element's scale.
    fn cell(&self, row: usize, col: usize) -> (&Quantized, usize) {
        let quantized = self.quantized.as_ref().expect("a quantized matrix has scales");
        let groups = quantized.scales.shape().sizes()[1];
        let ScaleGrid { rows, cols } = quantized.grid;
        let cell = if self.format.is_in_blocks() {
            (row / BLOCK_ROWS * groups + col / cols) * BLOCK_ROWS + row % BLOCK_ROWS
        } else {
            row / rows * groups + col / cols
        };
        (quantized, cell)
    }
}

/// How rows become codes: what an online quantization of any layout needs.
pub trait RowQuantizer: Sync {
    /// Type of the scales.
    type Scale: Element + Default + Send;

    /// The layout that comes out.
    fn format(&self) -> Format;

    /// Which elements of a matrix with `num_cols` columns share a scale; rows do not.
    fn grid(&self, num_cols: usize) -> ScaleGrid;

    /// Quantizes one row to a byte per element, the row's padding included. Inlined always, so
    /// that it is compiled for the machine's vectors.
    fn quantize_row(&self, values: &[f32], codes: &mut [u8], scales: &mut [Self::Scale]);
}

/// Sizes of a quantized matrix and its blocks, or its rows where they do not lie in blocks.
struct Packing {
    /// Rows that lie together.
    rows: usize,
    /// Codes of a padded row before they are packed.
    width: usize,
    /// Bytes of the packed codes of `rows` rows.
    bytes: usize,
    /// Scales of a row.
    groups: usize,
}

impl Packing {
    fn of(format: Format, grid: ScaleGrid, num_cols: usize) -> Packing {
        let rows = if format.is_in_blocks() { BLOCK_ROWS } else { 1 };
        let width = num_cols.next_multiple_of(ROW_ALIGN);
        let bytes = rows * width / if format == Format::Int4 { 2 } else { 1 };
        Packing { rows, width, bytes, groups: width.div_ceil(grid.cols) }
    }
}

/// Bytes of codes and scales of a quantized matrix of this shape.
pub fn quantized_bytes<Q: RowQuantizer>(quantizer: &Q, [rows, cols]: [usize; 2]) -> usize {
    let packing = Packing::of(quantizer.format(), quantizer.grid(cols), cols);
    let scales_bytes = packing.rows * packing.groups * size_of::<Q::Scale>();
    rows.div_ceil(packing.rows) * (packing.bytes + scales_bytes)
}

/// Quantizes a matrix on `threads` threads; `read(row, to)` fills `to` with a row's elements.
pub fn quantize<Q: RowQuantizer>(
    quantizer: &Q,
    [num_rows, num_cols]: [usize; 2],
    threads: usize,
    read: impl Fn(usize, &mut [f32]) + Sync,
) -> PackedMatrix {
    let (format, grid) = (quantizer.format(), quantizer.grid(num_cols));
    let packing = Packing::of(format, grid, num_cols);
    let Packing { rows, bytes, groups, .. } = packing;
    let num_blocks = num_rows.div_ceil(rows);
    let mut data = Tensor::zeros_on_large_pages(DType::U8, [num_blocks, bytes]);
    let mut scales = match rows {
        1 => Tensor::zeros(Q::Scale::DTYPE, [num_blocks, groups]),
        _ => Tensor::zeros(Q::Scale::DTYPE, [num_blocks, groups, rows]),
    };
    let sizes = [bytes, rows * groups];
    let to = (data.as_mut_slice::<u8>(), scales.as_mut_slice::<Q::Scale>());
    for_parts(to.0, to.1, sizes, threads, |first, data, scales| {
        let mut scratch = BlockScratch::new(&packing, num_cols);
        let blocks = data.chunks_exact_mut(bytes).zip(scales.chunks_exact_mut(sizes[1]));
        for (block, (data, scales)) in blocks.enumerate() {
            let first_row = (first + block) * rows;
            scratch.quantize(quantizer, first_row..num_rows.min(first_row + rows), &read);
            scratch.store(format, data, scales);
        }
    });
    let quantized = Some(Quantized { grid, scales, zero_points: None });
    PackedMatrix { format, num_rows, num_cols, data, quantized }
}

/// A block's rows before they are packed.
struct BlockScratch<S> {
    /// The row that is being quantized.
    wide: Vec<f32>,
    /// `[rows, width]`.
    codes: Vec<u8>,
    /// `[rows, groups]`.
    scales: Vec<S>,
    interleaved: Vec<u8>,
    width: usize,
    groups: usize,
}

impl<S: Element + Default> BlockScratch<S> {
    fn new(packing: &Packing, num_cols: usize) -> BlockScratch<S> {
        let &Packing { rows, width, groups, .. } = packing;
        BlockScratch {
            wide: vec![0.0; num_cols],
            codes: vec![0; rows * width],
            scales: vec![S::default(); rows * groups],
            interleaved: vec![0; rows * width],
            width,
            groups,
        }
    }

    /// Fills codes and scales, row by row; those of rows that are missing become 0.
    fn quantize<Q: RowQuantizer<Scale = S>>(
        &mut self,
        quantizer: &Q,
        rows: std::ops::Range<usize>,
        read: impl Fn(usize, &mut [f32]),
    ) {
        self.codes[rows.len() * self.width..].fill(0);
        self.scales[rows.len() * self.groups..].fill(S::default());
        let codes = self.codes.chunks_exact_mut(self.width);
        for (row, (codes, scales)) in rows.zip(codes.zip(self.scales.chunks_exact_mut(self.groups)))
        {
            read(row, &mut self.wide);
            quantize_row(quantizer, &self.wide, codes, scales);
        }
    }

    fn store(&mut self, format: Format, data: &mut [u8], scales: &mut [S]) {
        if !format.is_in_blocks() {
            data.copy_from_slice(&self.codes);
            scales.copy_from_slice(&self.scales);
            return;
        }
        if format == Format::Int4 {
            blocks::interleave(&self.codes, &mut self.interleaved);
            blocks::fold(&self.interleaved, data);
        } else {
            blocks::interleave(&self.codes, data);
        }
        let groups = self.groups;
        for (i, scale) in scales.iter_mut().enumerate() {
            *scale = self.scales[i % BLOCK_ROWS * groups + i / BLOCK_ROWS];
        }
    }
}

/// [`RowQuantizer::quantize_row`] on the widest vectors that the compiler knows here; they change
/// no bit, because sums of floats are written in lanes.
fn quantize_row<Q: RowQuantizer>(
    quantizer: &Q,
    values: &[f32],
    codes: &mut [u8],
    scales: &mut [Q::Scale],
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the instructions exist.
        return unsafe { quantize_row_avx2(quantizer, values, codes, scales) };
    }
    quantizer.quantize_row(values, codes, scales);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_row_avx2<Q: RowQuantizer>(
    quantizer: &Q,
    values: &[f32],
    codes: &mut [u8],
    scales: &mut [Q::Scale],
) {
    quantizer.quantize_row(values, codes, scales);
}

/// Cuts two slices into the same number of parts, `sizes` elements of each per item, and calls
/// `work(first item, part, part)` for them on up to `threads` threads.
fn for_parts<A: Send, B: Send>(
    a: &mut [A],
    b: &mut [B],
    sizes: [usize; 2],
    threads: usize,
    work: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    let per_thread = (a.len() / sizes[0]).div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let (mut a, mut b, mut first) = (a, b, 0);
        while !a.is_empty() {
            let (part_a, rest_a) = a.split_at_mut(a.len().min(per_thread * sizes[0]));
            let (part_b, rest_b) = b.split_at_mut(b.len().min(per_thread * sizes[1]));
            let (work, from) = (&work, first);
            if rest_a.is_empty() {
                work(from, part_a, part_b);
            } else {
                scope.spawn(move || work(from, part_a, part_b));
            }
            (a, b, first) = (rest_a, rest_b, first + per_thread);
        }
    });
}

/// What adding leaves of a number below 2²² in magnitude is the nearest integer, ties to even, in
/// the lowest bits of the sum. The compiler vectorises it on every machine.
const ROUNDER: f32 = 12_582_912.0; // 1.5 · 2²³

/// The nearest integer, ties to even.
#[inline(always)]
fn round(x: f32) -> f32 {
    (x + ROUNDER) - ROUNDER
}

/// The nearest integer, ties to even, as a byte of two's complement.
#[inline(always)]
pub(crate) fn round_to_byte(x: f32) -> u8 {
    (x + ROUNDER).to_bits() as u8
}

/// The sum of lanes, halves added to halves.
#[inline(always)]
fn sum_lanes(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

#[inline(always)]
fn largest_magnitude(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (whole, rest) = values.as_chunks::<16>();
    // Lanes, so that the compiler may use vectors.
    let mut largest = [0.0; 16];
    for lanes in whole {
        for (largest, value) in largest.iter_mut().zip(lanes) {
            *largest = larger(*largest, value.abs());
        }
    }
    let rest = rest.iter().fold(0.0, |a, value| larger(a, value.abs()));
    largest.into_iter().fold(rest, larger)
}
