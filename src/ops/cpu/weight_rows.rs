//! Rows of weights as vectors of f32, for every format: what the vector kernels multiply by.

use half::f16;

use super::simd::{Float, Simd, load};
use crate::formats::{PackedMatrix, ROW_ALIGN};
use crate::tensor::DType;

/// Rows whose elements can be read as f32 vectors.
pub trait WeightRows: Copy + Send + Sync {
    /// Elements `at..at + S::LANES` of a row.
    ///
    /// # Safety
    /// The row must have all of them, and `at` must be a multiple of `S::LANES`.
    unsafe fn lanes<S: Simd>(&self, simd: S, row: usize, at: usize) -> S::V;

    /// As [`WeightRows::lanes`] at the end of a row of `len` elements: what lies beyond it is
    /// anything finite.
    ///
    /// # Safety
    /// The row must exist and `at` must be a multiple of `S::LANES` below `len`.
    unsafe fn tail<S: Simd>(&self, simd: S, row: usize, at: usize, len: usize) -> S::V;

    /// Where the elements from `at` on are stored; any indices will do.
    fn address(&self, row: usize, at: usize) -> *const u8;

    /// Bytes that a row takes.
    fn row_bytes(&self) -> usize;
}

/// Rows of floats.
#[derive(Clone, Copy)]
pub struct Dense<'a, E> {
    /// The elements of all rows.
    pub elements: &'a [E],
    /// Elements from a row to the next.
    pub stride: usize,
}

impl<'a, E: Float> Dense<'a, E> {
    /// The rows of a dense matrix; panics on another element type, or when elements are missing.
    pub fn of(matrix: &'a PackedMatrix) -> Dense<'a, E> {
        let (elements, stride) = (matrix.data.as_slice(), matrix.num_cols);
        assert!(elements.len() >= matrix.num_rows * stride, "rows of elements are whole");
        Dense { elements, stride }
    }
}

impl<E: Float> WeightRows for Dense<'_, E> {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, simd: S, row: usize, at: usize) -> S::V {
        // SAFETY: the same contract.
        unsafe { E::load_lanes(simd, self.elements.as_ptr().add(row * self.stride + at)) }
    }
    #[inline(always)]
    unsafe fn tail<S: Simd>(&self, simd: S, row: usize, at: usize, len: usize) -> S::V {
        load(simd, &self.elements[row * self.stride..row * self.stride + len], at)
    }
    #[inline(always)]
    fn address(&self, row: usize, at: usize) -> *const u8 {
        self.elements.as_ptr().wrapping_add(row * self.stride + at).cast()
    }
    #[inline(always)]
    fn row_bytes(&self) -> usize {
        self.stride * size_of::<E>()
    }
}

/// How one element is coded.
pub trait Code: Copy + Send + Sync {
    /// Elements `at..at + S::LANES` of the row that starts at `row`, before zero points and scales.
    ///
    /// # Safety
    /// The row must have them.
    unsafe fn lanes<S: Simd>(simd: S, row: *const u8, at: usize) -> S::V;
}

/// Signed bytes.
#[derive(Clone, Copy)]
pub struct Bytes;
/// FP8 E4M3.
#[derive(Clone, Copy)]
pub struct E4m3;

impl Code for Bytes {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(simd: S, row: *const u8, at: usize) -> S::V {
        // SAFETY: the same contract.
        unsafe { simd.load_i8(row.add(at).cast()) }
    }
}

impl Code for E4m3 {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(simd: S, row: *const u8, at: usize) -> S::V {
        // SAFETY: the same contract.
        unsafe { simd.load_e4m3(row.add(at)) }
    }
}

/// The scales of a matrix.
#[derive(Clone, Copy)]
pub enum Scales<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
}

/// Rows of codes with their scales.
#[derive(Clone, Copy)]
pub struct Coded<'a, C> {
    codes: &'a [u8],
    row_bytes: usize,
    scales: Scales<'a>,
    /// Binary logarithms of the rows and columns that share a scale: a division per vector
    /// would cost more than the vector.
    rows_shift: u32,
    cols_shift: u32,
    scales_per_row: usize,
    code: std::marker::PhantomData<C>,
}

impl<'a, C: Code> Coded<'a, C> {
    /// The rows of a quantized matrix; panics on another format's dtypes.
    pub fn of(matrix: &'a PackedMatrix) -> Coded<'a, C> {
        let quantized = matrix.quantized.as_ref().expect("a quantized matrix has scales");
        let codes = matrix.data.bytes();
        let width = matrix.num_cols.next_multiple_of(ROW_ALIGN);
        let row_bytes = width;
        assert!(codes.len() >= matrix.num_rows * row_bytes, "rows of codes are padded");
        let shape = quantized.grid.shape(matrix.num_rows, matrix.num_cols);
        assert_eq!(quantized.scales.shape().sizes(), shape, "scales fit the matrix");
        Coded {
            codes,
            row_bytes,
            scales: match quantized.scales.dtype() {
                DType::F16 => Scales::F16(quantized.scales.as_slice()),
                _ => Scales::F32(quantized.scales.as_slice()),
            },
            rows_shift: shift_of(quantized.grid.rows, matrix.num_rows),
            cols_shift: shift_of(quantized.grid.cols, width),
            scales_per_row: shape[1],
            code: std::marker::PhantomData,
        }
    }

    /// The codes of a row and of all that follow.
    #[inline(always)]
    pub fn row(&self, row: usize) -> *const u8 {
        self.codes[row * self.row_bytes..].as_ptr()
    }

    /// Index of the scale of an element.
    #[inline(always)]
    pub fn cell(&self, row: usize, at: usize) -> usize {
        (row >> self.rows_shift) * self.scales_per_row + (at >> self.cols_shift)
    }

    /// Whether every row has one scale of its own.
    pub fn is_scaled_per_row(&self) -> bool {
        self.rows_shift == 0 && self.scales_per_row == 1
    }

    /// A scale.
    #[inline(always)]
    pub fn scale<S: Simd>(&self, simd: S, cell: usize) -> S::V {
        match self.scales {
            Scales::F32(scales) => simd.splat(scales[cell]),
            Scales::F16(scales) => simd.splat_f16(scales[cell]),
        }
    }

    /// The scales themselves.
    pub fn scales(&self) -> Scales<'a> {
        self.scales
    }
}

/// What shares a scale is one row or column, a power of two of them, or all `len`.
fn shift_of(shared: usize, len: usize) -> u32 {
    if shared == 1 {
        return 0;
    }
    if shared >= len {
        return usize::BITS - 1;
    }
    assert!(shared.is_power_of_two() && shared >= 32, "{shared} elements share a scale");
    shared.trailing_zeros()
}

impl<C: Code> WeightRows for Coded<'_, C> {
    #[inline(always)]
    unsafe fn lanes<S: Simd>(&self, simd: S, row: usize, at: usize) -> S::V {
        let cell = self.cell(row, at);
        // SAFETY: the same contract; rows are padded to whole vectors.
        let codes = unsafe { C::lanes(simd, self.codes.as_ptr().add(row * self.row_bytes), at) };
        let scale = self.scale(simd, cell);
        simd.mul(codes, scale)
    }
    #[inline(always)]
    unsafe fn tail<S: Simd>(&self, simd: S, row: usize, at: usize, _len: usize) -> S::V {
        // SAFETY: the row is padded, so it has a whole vector at `at`.
        unsafe { self.lanes(simd, row, at) }
    }
    #[inline(always)]
    fn address(&self, row: usize, at: usize) -> *const u8 {
        self.codes.as_ptr().wrapping_add(row * self.row_bytes + at)
    }
    #[inline(always)]
    fn row_bytes(&self) -> usize {
        self.row_bytes
    }
}

/// Runs `$body` with `$rows` bound to the rows of a weight-only format.
macro_rules! with_rows {
    ($matrix:expr, $rows:ident => $body:expr) => {
        match ($matrix.format, $matrix.data.dtype()) {
            (Format::Dense, dtype) => with_float!(dtype, E => {
                let $rows = Dense::<E>::of($matrix);
                $body
            }),
            (Format::W8A16, _) => {
                let $rows = Coded::<Bytes>::of($matrix);
                $body
            }
            (Format::Fp8, _) => {
                let $rows = Coded::<E4m3>::of($matrix);
                $body
            }
            (format, _) => unreachable!("{format:?} lies in blocks"),
        }
    };
}
pub(super) use with_rows;
