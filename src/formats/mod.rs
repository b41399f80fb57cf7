//! How the bytes of a weight matrix are laid out while computing.
//!
//! One layout per file. A checkpoint scheme (`weights`) or an online quantization produces a
//! [`PackedMatrix`]; `ops` multiplies by it. Knows nothing of files or models.
//!
//! Codes (and, where the machine multiplies it, bf16) lie in blocks of sixteen rows, see
//! [`blocks`]; what else is dense is row-major. Scales lie apart, one per [`ScaleGrid`] cell.

pub mod blocks;
pub mod dense;
pub mod fp8;
pub mod int4;
pub mod int8;
pub mod mxfp4;
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
    /// Four bits of floating point (E2M1) in folded blocks with a power of two per 32 of a row;
    /// activations are quantized per group.
    Mxfp4,
    /// Bytes in blocks with a scale per row; activations keep their precision.
    W8A16,
    /// FP8 E4M3 in blocks with a scale per row or per group of one; activations keep their
    /// precision.
    Fp8,
    /// FP8 E4M3 row-major with a scale per row, both sizes multiples of [`fp8::ROWS_UNIT`]: what
    /// FP8 tensor cores multiply by FP8 activations. Only GPUs have it.
    Fp8Rows,
}

impl Format {
    /// Whether sixteen rows lie together.
    pub fn is_in_blocks(self) -> bool {
        !matches!(self, Format::Dense | Format::Fp8Rows)
    }

    /// Whether groups of activations have scales of their own.
    pub fn quantizes_groups(self) -> bool {
        matches!(self, Format::Q8 | Format::Int4 | Format::Mxfp4)
    }

    /// Whether two lines of codes share the bytes of one.
    pub fn is_folded(self) -> bool {
        matches!(self, Format::Int4 | Format::Mxfp4)
    }
}

/// Which elements of a row share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleGrid {
    /// How many that follow each other; a multiple of 32, or at least a whole row.
    pub cols: usize,
}

impl ScaleGrid {
    /// One scale per row.
    pub fn per_row(num_cols: usize) -> ScaleGrid {
        ScaleGrid { cols: num_cols.next_multiple_of(ROW_ALIGN) }
    }

    /// One scale per `cols` elements of a row.
    pub fn groups(cols: usize) -> ScaleGrid {
        ScaleGrid { cols }
    }

    /// Shape of the scales of a matrix: those of a block's rows lie together, group by group, up
    /// to the end of the padded rows.
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
    /// `grid.blocks_shape(…)`: f32, or where groups are small f16 or the bytes of `mxfp4`.
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
            Format::Int4 | Format::Mxfp4 => width / 2,
            Format::Int8 | Format::Q8 | Format::W8A16 | Format::Fp8 => width,
            Format::Fp8Rows => self.num_cols,
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
        match self.format {
            Format::Dense => dense::read_row(self, row, to),
            Format::DenseBlocks => {
                let block = self.block(row);
                for (col, to) in to.iter_mut().enumerate() {
                    let at = blocks::position(row % BLOCK_ROWS, 2 * col);
                    *to = half::bf16::from_le_bytes([block[at], block[at + 1]]).to_f32();
                }
            }
            Format::Int4 | Format::Mxfp4 => {
                self.scaled(row, to, |col| self.code(row, col) as f32);
            }
            Format::Fp8 => self.scaled(row, to, of_bytes(self.block(row), row, fp8::decode)),
            Format::Fp8Rows => {
                let codes = &self.data.bytes()[row * self.num_cols..][..self.num_cols];
                self.scaled(row, to, |col| fp8::decode(codes[col]));
            }
            Format::Int8 | Format::Q8 | Format::W8A16 => {
                let value = |byte: u8| f32::from(byte as i8);
                self.scaled(row, to, of_bytes(self.block(row), row, value));
            }
        }
    }

    /// The code of an element of a matrix of integers, less its zero point; twice the number that
    /// a code of MXFP4 stands for.
    pub fn code(&self, row: usize, col: usize) -> i32 {
        match self.format {
            Format::Int4 => {
                let code = blocks::unfolded(self.block(row), row % BLOCK_ROWS, col);
                i32::from(code) - i32::from(self.zero_point(row, col))
            }
            Format::Mxfp4 => {
                mxfp4::doubled(blocks::unfolded(self.block(row), row % BLOCK_ROWS, col))
            }
            Format::Int8 | Format::Q8 | Format::W8A16 => i32::from(self.byte(row, col) as i8),
            other => panic!("{other:?} holds no integers"),
        }
    }

    /// The byte that codes an element.
    fn byte(&self, row: usize, col: usize) -> u8 {
        self.block(row)[blocks::position(row % BLOCK_ROWS, col)]
    }

    /// The block of a row.
    fn block(&self, row: usize) -> &[u8] {
        let block_bytes = BLOCK_ROWS * self.row_bytes();
        &self.data.bytes()[row / BLOCK_ROWS * block_bytes..][..block_bytes]
    }

    /// Values of the columns of a row, times the scales of their groups.
    fn scaled(&self, row: usize, to: &mut [f32], value: impl Fn(usize) -> f32) {
        let size = self.quantized.as_ref().expect("a quantized matrix has scales").grid.cols;
        for (group, to) in to.chunks_mut(size).enumerate() {
            let scale = self.scale(row, group * size);
            for (i, to) in to.iter_mut().enumerate() {
                *to = value(group * size + i) * scale;
            }
        }
    }

    /// What [`PackedMatrix::code`] is multiplied by; panics for a dense matrix.
    pub fn scale(&self, row: usize, col: usize) -> f32 {
        let (quantized, cell) = self.cell(row, col);
        match quantized.scales.dtype() {
            DType::F16 => quantized.scales.as_slice::<half::f16>()[cell].to_f32(),
            DType::U8 => mxfp4::half_scale(quantized.scales.as_slice()[cell]),
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
        let group = row / BLOCK_ROWS * groups + col / quantized.grid.cols;
        (quantized, group * BLOCK_ROWS + row % BLOCK_ROWS)
    }
}

/// The value of each byte of a row of a block.
fn of_bytes(block: &[u8], row: usize, value: impl Fn(u8) -> f32) -> impl Fn(usize) -> f32 {
    let row = row % BLOCK_ROWS;
    move |at| value(block[blocks::position(row, at)])
}

/// How rows become codes: what an online quantization of any layout needs.
pub trait RowQuantizer: Sync {
    /// Type of the scales.
    type Scale: Element + Default + Send;

    /// The layout that comes out.
    fn format(&self) -> Format;

    /// Which elements of a matrix with `num_cols` columns share a scale; rows do not.
    fn grid(&self, num_cols: usize) -> ScaleGrid;

    /// Whether every scale has a zero point beside it.
    fn has_zero_points(&self) -> bool {
        false
    }

    /// Quantizes one row to a byte per element, the row's padding included; `zeros` is empty
    /// without zero points. Inlined always, so that it is compiled for the machine's vectors.
    fn quantize_row(
        &self,
        values: &[f32],
        codes: &mut [u8],
        scales: &mut [Self::Scale],
        zeros: &mut [u8],
    );
}

/// Sizes of the blocks of a quantized matrix.
struct Packing {
    /// Codes of a padded row before they are packed.
    width: usize,
    /// Bytes of the packed codes of a block.
    bytes: usize,
    /// Scales of a row.
    groups: usize,
}

impl Packing {
    fn of(format: Format, grid: ScaleGrid, num_cols: usize) -> Packing {
        let width = num_cols.next_multiple_of(ROW_ALIGN);
        let bytes = BLOCK_ROWS * width / if format.is_folded() { 2 } else { 1 };
        Packing { width, bytes, groups: width.div_ceil(grid.cols) }
    }
}

/// Bytes of codes and scales of a quantized matrix of this shape.
pub fn quantized_bytes<Q: RowQuantizer>(quantizer: &Q, [rows, cols]: [usize; 2]) -> usize {
    let packing = Packing::of(quantizer.format(), quantizer.grid(cols), cols);
    let scale_bytes = size_of::<Q::Scale>() + usize::from(quantizer.has_zero_points());
    let scales_bytes = BLOCK_ROWS * packing.groups * scale_bytes;
    rows.div_ceil(BLOCK_ROWS) * (packing.bytes + scales_bytes)
}

/// Quantizes a matrix on `threads` threads; `read(row, to)` fills `to` with a row's elements.
pub fn quantize<Q: RowQuantizer>(
    quantizer: &Q,
    shape: [usize; 2],
    threads: usize,
    read: impl Fn(usize, &mut [f32]) + Sync,
) -> PackedMatrix {
    let layout = RowLayout {
        format: quantizer.format(),
        grid: quantizer.grid(shape[1]),
        has_zero_points: quantizer.has_zero_points(),
    };
    pack_rows(layout, shape, threads, || {
        let (mut wide, read) = (vec![0.0; shape[1]], &read);
        move |row: usize, parts: RowParts<'_, Q::Scale>| {
            quantize_row(quantizer, (row, read), &mut wide, parts);
        }
    })
}

/// How rows of codes become a matrix.
#[derive(Clone, Copy)]
struct RowLayout {
    format: Format,
    grid: ScaleGrid,
    has_zero_points: bool,
}

/// A row before it is packed.
struct RowParts<'a, S> {
    /// A byte per element, the padding included.
    codes: &'a mut [u8],
    /// One per group.
    scales: &'a mut [S],
    /// The same of zero points.
    zeros: &'a mut [u8],
}

/// Packs a matrix on `threads` threads, each of which fills rows with what `filler` gives it.
fn pack_rows<S: Element + Default + Send, F: FnMut(usize, RowParts<'_, S>)>(
    layout: RowLayout,
    [num_rows, num_cols]: [usize; 2],
    threads: usize,
    filler: impl Fn() -> F + Sync,
) -> PackedMatrix {
    let RowLayout { format, grid, has_zero_points } = layout;
    let packing = Packing::of(format, grid, num_cols);
    let Packing { bytes, groups, .. } = packing;
    let num_blocks = num_rows.div_ceil(BLOCK_ROWS);
    let mut data = Tensor::zeros_on_large_pages(DType::U8, [num_blocks, bytes]);
    let mut scales = Tensor::zeros(S::DTYPE, [num_blocks, groups, BLOCK_ROWS]);
    let mut zeros = Tensor::zeros(DType::U8, scales.shape());
    let num_zeros = if has_zero_points { BLOCK_ROWS * groups } else { 0 };
    let sizes = [bytes, BLOCK_ROWS * groups, num_zeros];
    let to = (data.as_mut_slice::<u8>(), scales.as_mut_slice::<S>(), zeros.as_mut_slice());
    for_parts(to, sizes, threads, |first, (data, scales, zeros)| {
        let (mut scratch, mut fill) = (BlockScratch::new(&packing), filler());
        let blocks = data.chunks_exact_mut(bytes).zip(scales.chunks_exact_mut(sizes[1]));
        for (block, (data, scales)) in blocks.enumerate() {
            let first_row = (first + block) * BLOCK_ROWS;
            scratch.fill(first_row..num_rows.min(first_row + BLOCK_ROWS), &mut fill);
            let zeros = &mut zeros[block * num_zeros..][..num_zeros];
            scratch.store(format, data, scales, zeros);
        }
    });
    let zero_points = has_zero_points.then_some(zeros);
    let quantized = Some(Quantized { grid, scales, zero_points });
    PackedMatrix { format, num_rows, num_cols, data, quantized }
}

/// A block's rows before they are packed.
struct BlockScratch<S> {
    /// `[16, width]`.
    codes: Vec<u8>,
    /// `[16, groups]`.
    scales: Vec<S>,
    /// The same of zero points.
    zeros: Vec<u8>,
    interleaved: Vec<u8>,
    width: usize,
    groups: usize,
}

impl<S: Element + Default> BlockScratch<S> {
    fn new(packing: &Packing) -> BlockScratch<S> {
        let &Packing { width, groups, .. } = packing;
        BlockScratch {
            codes: vec![0; BLOCK_ROWS * width],
            scales: vec![S::default(); BLOCK_ROWS * groups],
            zeros: vec![0; BLOCK_ROWS * groups],
            interleaved: vec![0; BLOCK_ROWS * width],
            width,
            groups,
        }
    }

    /// Fills codes, scales and zero points, row by row; scales of rows that are missing become 0.
    fn fill(
        &mut self,
        rows: std::ops::Range<usize>,
        fill: &mut impl FnMut(usize, RowParts<'_, S>),
    ) {
        self.codes[rows.len() * self.width..].fill(0);
        self.scales[rows.len() * self.groups..].fill(S::default());
        let codes = self.codes.chunks_exact_mut(self.width);
        let scales = self.scales.chunks_exact_mut(self.groups);
        let zeros = self.zeros.chunks_exact_mut(self.groups);
        for (row, (codes, (scales, zeros))) in rows.zip(codes.zip(scales.zip(zeros))) {
            fill(row, RowParts { codes, scales, zeros });
        }
    }

    fn store(&mut self, format: Format, data: &mut [u8], scales: &mut [S], zeros: &mut [u8]) {
        if format.is_folded() {
            blocks::interleave(&self.codes, &mut self.interleaved);
            blocks::fold(&self.interleaved, data);
        } else {
            blocks::interleave(&self.codes, data);
        }
        let groups = self.groups;
        for (i, scale) in scales.iter_mut().enumerate() {
            *scale = self.scales[i % BLOCK_ROWS * groups + i / BLOCK_ROWS];
        }
        for (i, zero) in zeros.iter_mut().enumerate() {
            *zero = self.zeros[i % BLOCK_ROWS * groups + i / BLOCK_ROWS];
        }
    }
}

/// Reads a row and quantizes it on the widest vectors that the compiler knows here; they change
/// no bit, because sums of floats are written in lanes.
fn quantize_row<Q: RowQuantizer, R: Fn(usize, &mut [f32])>(
    quantizer: &Q,
    row: (usize, &R),
    wide: &mut [f32],
    parts: RowParts<'_, Q::Scale>,
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
    {
        // SAFETY: the instructions exist.
        return unsafe { quantize_row_avx512(quantizer, row, wide, parts) };
    }
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the instructions exist.
        return unsafe { quantize_row_avx2(quantizer, row, wide, parts) };
    }
    quantize_row_anywhere(quantizer, row, wide, parts);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn quantize_row_avx512<Q: RowQuantizer, R: Fn(usize, &mut [f32])>(
    quantizer: &Q,
    row: (usize, &R),
    wide: &mut [f32],
    parts: RowParts<'_, Q::Scale>,
) {
    quantize_row_anywhere(quantizer, row, wide, parts);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_row_avx2<Q: RowQuantizer, R: Fn(usize, &mut [f32])>(
    quantizer: &Q,
    row: (usize, &R),
    wide: &mut [f32],
    parts: RowParts<'_, Q::Scale>,
) {
    quantize_row_anywhere(quantizer, row, wide, parts);
}

#[inline(always)]
fn quantize_row_anywhere<Q: RowQuantizer, R: Fn(usize, &mut [f32])>(
    quantizer: &Q,
    (row, read): (usize, &R),
    wide: &mut [f32],
    RowParts { codes, scales, zeros }: RowParts<'_, Q::Scale>,
) {
    read(row, wide);
    quantizer.quantize_row(wide, codes, scales, zeros);
}

/// Cuts three slices into the same number of parts, `sizes` elements of each per item, and calls
/// `work(first item, parts)` for them on up to `threads` threads.
fn for_parts<A: Send, B: Send, C: Send>(
    (a, b, c): (&mut [A], &mut [B], &mut [C]),
    sizes: [usize; 3],
    threads: usize,
    work: impl Fn(usize, (&mut [A], &mut [B], &mut [C])) + Sync,
) {
    let per_thread = (a.len() / sizes[0]).div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let (mut a, mut b, mut c, mut first) = (a, b, c, 0);
        while !a.is_empty() {
            let (part_a, rest_a) = a.split_at_mut(a.len().min(per_thread * sizes[0]));
            let (part_b, rest_b) = b.split_at_mut(b.len().min(per_thread * sizes[1]));
            let (part_c, rest_c) = c.split_at_mut(c.len().min(per_thread * sizes[2]));
            let (work, from, parts) = (&work, first, (part_a, part_b, part_c));
            if rest_a.is_empty() {
                work(from, parts);
            } else {
                scope.spawn(move || work(from, parts));
            }
            (a, b, c, first) = (rest_a, rest_b, rest_c, first + per_thread);
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
