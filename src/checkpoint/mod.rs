//! Bytes on disk: where a model's files come from and how tensors are read from them.
//!
//! [`files::ModelFiles`] opens a folder, the bundled model or a hub repository;
//! [`Checkpoint`] and [`dummy::DummySource`] serve its weights through one trait,
//! [`TensorSource`]. Nothing here knows what a tensor is for: names and shapes come from
//! above, facts about files go back as [`CheckpointError`].

pub mod bundled;
pub mod dummy;
mod error;
pub mod files;
pub mod hub;
pub mod safetensors;

pub use error::CheckpointError;
pub use safetensors::Checkpoint;

use crate::tensor::{DType, Tensor};

/// The element type a file declares; wider than what the engine can compute with.
pub use ::safetensors::Dtype as StoredDType;

/// What a file says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type as stored.
    pub dtype: StoredDType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The file that holds it, for messages.
    pub file: String,
}

/// What a tensor is for; made-up weights depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorRole {
    /// An embedding table or the weight of a linear layer.
    Matrix,
    /// The matrix that chooses experts, which keeps its precision.
    Router,
    /// Matrices of heads, which keep their precision.
    Heads,
    /// The bias of a linear layer.
    Bias,
    /// The weight of a normalisation.
    Norm,
}

/// A tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Name in the checkpoint.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: TensorRole,
}

/// Something that has named tensors: a checkpoint, or a generator of random weights.
pub trait TensorSource: Send + Sync {
    /// All names, sorted.
    fn names(&self) -> Vec<String>;

    /// What is known about a tensor without reading it.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// The tensor in its stored element type, without a copy where the bytes allow it.
    fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError>;

    /// The tensor, provided that it has this shape.
    fn tensor_of_shape(&self, name: &str, shape: &[usize]) -> Result<Tensor, CheckpointError> {
        let info = self
            .info(name)
            .ok_or_else(|| CheckpointError::MissingTensor { name: name.to_owned() })?;
        if info.shape != shape {
            return Err(CheckpointError::WrongShape {
                name: name.to_owned(),
                expected: shape.to_vec(),
                found: info.shape,
                file: info.file,
            });
        }
        self.tensor(name)
    }
}

/// Element types of weights that every operation takes, for messages.
pub const FLOATS: &str = "F32, BF16 and F16";

/// The engine's element type for a stored one, when it has it.
pub fn supported_dtype(stored: StoredDType) -> Option<DType> {
    match stored {
        StoredDType::F32 => Some(DType::F32),
        StoredDType::BF16 => Some(DType::BF16),
        StoredDType::F16 => Some(DType::F16),
        StoredDType::U32 => Some(DType::U32),
        // Codes, and the exponents of powers of two.
        StoredDType::U8 | StoredDType::F8_E8M0 => Some(DType::U8),
        _ => None,
    }
}
