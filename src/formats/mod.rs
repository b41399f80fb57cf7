//! How the bytes of a weight matrix are laid out while computing.
//!
//! One layout per file. A checkpoint scheme (`weights`) produces a [`PackedMatrix`];
//! `ops` multiplies by it. Knows nothing of files or models.

pub mod dense;

use crate::tensor::Tensor;

/// The layouts that the kernels understand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Row-major elements of the data tensor's own dtype (f32, bf16 or f16).
    Dense,
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
    /// The bytes.
    pub data: Tensor,
}

impl PackedMatrix {
    /// Size of the packed bytes.
    pub fn size_bytes(&self) -> usize {
        self.data.size_bytes()
    }
}
