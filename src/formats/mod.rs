//! How the bytes of a weight matrix are laid out while computing.
//!
//! One layout per file. A checkpoint scheme (`weights`) or an online quantization produces a
//! [`PackedMatrix`]; `ops` multiplies by it. Knows nothing of files or models.
//!
//! Quantized layouts are row-major: a row's codes follow each other and are padded to
//! [`ROW_ALIGN`] elements of value 0 or of no consequence; scales lie apart, one per
//! [`ScaleGrid`] cell. Every stored row can therefore be read on its own, where it is.

pub mod dense;
pub mod fp8;
pub mod int4;
pub mod int8;
pub mod q8;

use crate::tensor::{DType, Element, Tensor};

/// Elements to which rows of codes are padded: one row of a tile, one cache line of bytes.
pub const ROW_ALIGN: usize = 64;

/// The layouts that the kernels understand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Row-major elements of the data tensor's own dtype (f32, bf16 or f16).
    Dense,
    /// Bytes with a scale per row, multiplied by activations that are quantized per token.
    Int8,
    /// Bytes with a scale per group of a row; activations keep their precision.
    Q8,
    /// Four bits with a scale, and perhaps a zero point, per group of a row.
    Int4,
    /// FP8 E4M3 with a scale per block of rows and columns.
    Fp8,
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

    /// Rows and columns of the tensor of scales of a `[num_rows, num_cols]` matrix.
    pub fn shape(self, num_rows: usize, num_cols: usize) -> [usize; 2] {
        [num_rows.div_ceil(self.rows), num_cols.div_ceil(self.cols)]
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
    /// `grid.shape(…)`: f32, or f16 where groups are small.
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

    /// Bytes of the codes of a row.
    pub fn row_bytes(&self) -> usize {
        self.data.size_bytes() / self.num_rows.max(1)
    }

    /// One row as f32: what the codes stand for, rounded once.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let width = self.num_cols;
        match self.format {
            Format::Dense => dense::row(self, row),
            Format::Int8 | Format::Q8 => {
                let codes = &self.data.as_slice::<i8>()[row * self.row_bytes()..][..width];
                self.scaled(row, codes.iter().map(|&code| f32::from(code)))
            }
            Format::Fp8 => {
                let codes = &self.data.as_slice::<u8>()[row * self.row_bytes()..][..width];
                self.scaled(row, codes.iter().map(|&code| fp8::decode(code)))
            }
            Format::Int4 => {
                let codes = &self.data.as_slice::<u8>()[row * self.row_bytes()..];
                let zero = |col| self.zero_point(row, col);
                self.scaled(row, (0..width).map(|col| int4::code(codes, col) - zero(col)))
            }
        }
    }

    fn scaled(&self, row: usize, values: impl Iterator<Item = f32>) -> Vec<f32> {
        values.enumerate().map(|(col, value)| value * self.scale(row, col)).collect()
    }

    /// The scale of an element; panics for a dense matrix.
    pub fn scale(&self, row: usize, col: usize) -> f32 {
        let quantized = self.quantized.as_ref().expect("a quantized matrix has scales");
        let at = quantized.cell(row, col);
        match quantized.scales.dtype() {
            DType::F16 => quantized.scales.as_slice::<half::f16>()[at].to_f32(),
            _ => quantized.scales.as_slice::<f32>()[at],
        }
    }

    fn zero_point(&self, row: usize, col: usize) -> f32 {
        let quantized = self.quantized.as_ref().expect("a quantized matrix has scales");
        let zero_points = quantized.zero_points.as_ref();
        zero_points.map_or(int4::MIDDLE, |zeros| {
            f32::from(zeros.as_slice::<u8>()[quantized.cell(row, col)])
        })
    }
}

impl Quantized {
    /// Index of an element's scale.
    pub fn cell(&self, row: usize, col: usize) -> usize {
        row / self.grid.rows * self.scales.shape().sizes()[1] + col / self.grid.cols
    }
}

/// How rows become codes: what an online quantization of any layout needs.
pub trait RowQuantizer: Sync {
    /// Type of the data tensor's elements.
    type Code: Element + Send;
    /// Type of the scales.
    type Scale: Element + Send;

    /// The layout that comes out.
    fn format(&self) -> Format;

    /// Which elements of a matrix with `num_cols` columns share a scale; rows do not.
    fn grid(&self, num_cols: usize) -> ScaleGrid;

    /// Codes of a row, padded.
    fn codes_per_row(&self, num_cols: usize) -> usize;

    /// Quantizes one row.
    fn quantize_row(&self, values: &[f32], codes: &mut [Self::Code], scales: &mut [Self::Scale]);
}

/// Quantizes a matrix on `threads` threads; `read(row, to)` fills `to` with a row's elements.
pub fn quantize<Q: RowQuantizer>(
    quantizer: &Q,
    [num_rows, num_cols]: [usize; 2],
    threads: usize,
    read: impl Fn(usize, &mut [f32]) + Sync,
) -> PackedMatrix {
    let grid = quantizer.grid(num_cols);
    let [_, scales_per_row] = grid.shape(num_rows, num_cols);
    let codes_per_row = quantizer.codes_per_row(num_cols);
    let mut data = Tensor::zeros(Q::Code::DTYPE, [num_rows, codes_per_row]);
    let mut scales = Tensor::zeros(Q::Scale::DTYPE, [num_rows, scales_per_row]);
    let rows_per_thread = num_rows.div_ceil(threads.max(1)).max(1);
    let quantize_rows = |first: usize, codes: &mut [Q::Code], scales: &mut [Q::Scale]| {
        let mut wide = vec![0.0; num_cols];
        let rows =
            codes.chunks_exact_mut(codes_per_row).zip(scales.chunks_exact_mut(scales_per_row));
        for (row, (codes, scales)) in rows.enumerate() {
            read(first + row, &mut wide);
            quantizer.quantize_row(&wide, codes, scales);
        }
    };
    let codes = data.as_mut_slice().chunks_mut(rows_per_thread * codes_per_row);
    let parts = codes.zip(scales.as_mut_slice().chunks_mut(rows_per_thread * scales_per_row));
    std::thread::scope(|scope| {
        let mut parts = parts.enumerate().map(|(i, part)| (i * rows_per_thread, part));
        let own = parts.next();
        for (first, (codes, scales)) in parts {
            let quantize_rows = &quantize_rows;
            scope.spawn(move || quantize_rows(first, codes, scales));
        }
        if let Some((first, (codes, scales))) = own {
            quantize_rows(first, codes, scales);
        }
    });
    let quantized = Some(Quantized { grid, scales, zero_points: None });
    PackedMatrix { format: quantizer.format(), num_rows, num_cols, data, quantized }
}

/// The nearest integer, ties to even, of a number below 2²² in magnitude: what adding and
/// subtracting 1.5 · 2²³ leaves. The compiler vectorises it on every machine.
fn round(x: f32) -> f32 {
    const ROUNDER: f32 = 12_582_912.0;
    (x + ROUNDER) - ROUNDER
}

fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()))
}
