//! How checkpoints store a matrix: one file per scheme.
//!
//! A scheme recognises its tensors by their names and turns them into a [`PackedMatrix`] of
//! some format; [`linear::Linear`] is what the model multiplies by. [`Loader`] reads them, and
//! quantizes on the way if asked to. Knows nothing of layers.

pub mod heads;
pub mod linear;
pub mod mxfp4;
pub mod plain;
mod quantize;

use crate::checkpoint::{
    CheckpointError, ExpectedTensor, TensorRole, TensorSource, supported_dtype,
};
use crate::config::Quantization;
use crate::formats::PackedMatrix;
use crate::ops::args::{Expert, Experts};
use crate::ops::{Ops, OpsError};
use crate::tensor::{DType, Tensor};

/// How a scheme reads a layer's matrix.
type Load = fn(&dyn TensorSource, &str, [usize; 2], usize) -> Result<PackedMatrix, CheckpointError>;

/// One way of storing the matrix of a linear layer.
pub struct Scheme {
    /// Name for logs.
    pub name: &'static str,
    /// Whether the source stores the layer of this name (without `.weight`) this way.
    pub holds: fn(&dyn TensorSource, &str) -> bool,
    /// Reads the layer's `[out_features, in_features]` matrix,
    /// and packs codes on that many threads.
    pub load: Load,
}

/// All schemes; the first that holds a layer loads it.
pub const SCHEMES: [Scheme; 3] = [
    Scheme {
        name: "plain",
        holds: plain::holds,
        load: |source, name, shape, _| plain::load(source, name, shape),
    },
    mxfp4::PACKED,
    mxfp4::BLOCKS,
];

/// The matrix as `--quantization` makes it, on `threads` threads.
pub fn quantized(
    matrix: PackedMatrix,
    wanted: Option<Quantization>,
    threads: usize,
) -> PackedMatrix {
    match wanted {
        Some(wanted) => quantize::quantize(matrix, wanted, threads),
        None => matrix,
    }
}

/// A tensor cannot be read, or not be brought to the device.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device.
    #[error(transparent)]
    Device(#[from] OpsError),
}

/// Reads a model's tensors.
#[derive(Clone, Copy)]
pub struct Loader<'a> {
    source: &'a dyn TensorSource,
    quantization: Option<Quantization>,
    threads: usize,
    ops: Option<&'a dyn Ops>,
}

impl<'a> Loader<'a> {
    /// Reads tensors as they are.
    pub fn new(source: &'a dyn TensorSource) -> Loader<'a> {
        Loader { source, quantization: None, threads: 1, ops: None }
    }

    /// Quantizes floating-point matrices, on `threads` threads.
    pub fn quantized(self, quantization: Option<Quantization>, threads: usize) -> Loader<'a> {
        Loader { quantization, threads, ..self }
    }

    /// Brings tensors to where these operations read them, matrices as they want them.
    pub fn arranged(self, ops: &'a dyn Ops) -> Loader<'a> {
        Loader { ops: Some(ops), ..self }
    }

    /// Where the tensors come from.
    pub fn source(&self) -> &'a dyn TensorSource {
        self.source
    }

    /// A norm's weight or another small tensor. It is copied where matrices may be: one that was
    /// replaced must not be kept in memory by a neighbour in the same file.
    pub fn tensor(&self, name: &str) -> Result<Tensor, LoadError> {
        self.place(self.detached(self.source.tensor(name)?))
    }

    /// A tensor that was computed here, where operations read it.
    pub fn place(&self, tensor: Tensor) -> Result<Tensor, LoadError> {
        match self.ops {
            Some(ops) => Ok(ops.place(tensor)?),
            None => Ok(tensor),
        }
    }

    /// A bias or another small tensor of floats.
    fn floats(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        self.place(self.detached(plain::load_float(self.source, name, shape)?))
    }

    /// The `[out_features, in_features]` matrix of a linear layer in whichever scheme the source
    /// stores it.
    fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<PackedMatrix, LoadError> {
        let scheme = SCHEMES.iter().find(|scheme| (scheme.holds)(self.source, name));
        let scheme = scheme
            .ok_or_else(|| CheckpointError::MissingTensor { name: plain::weight_name(name) })?;
        self.prepare((scheme.load)(self.source, name, shape, self.threads)?)
    }

    /// A small tensor of floats, as f32.
    pub fn wide_floats(&self, name: &str, shape: &[usize]) -> Result<Tensor, LoadError> {
        let tensor = plain::load_float(self.source, name, shape)?;
        let row = crate::formats::dense::pack(tensor.reshaped([1, shape.iter().product()])).row(0);
        self.place(Tensor::from_slice(&row, shape))
    }

    /// Matrices of heads, `[num_heads, out_features, in_features]`, where operations read them.
    fn place_heads(&self, matrices: Tensor) -> Result<Tensor, LoadError> {
        match self.ops {
            Some(ops) => Ok(ops.place_heads(matrices)?),
            None => Ok(matrices),
        }
    }

    /// A table of floats, such as tied embeddings, as a matrix.
    fn table(&self, name: &str, shape: [usize; 2]) -> Result<PackedMatrix, LoadError> {
        let table = plain::load_float(self.source, name, &shape)?;
        self.prepare(crate::formats::dense::pack(table))
    }

    /// A small matrix of floats that keeps its precision, copied like other small tensors.
    fn precise(&self, name: &str, shape: [usize; 2]) -> Result<PackedMatrix, LoadError> {
        let matrix = plain::load_float(self.source, &plain::weight_name(name), &shape)?;
        self.arrange(crate::formats::dense::pack(self.detached(matrix)))
    }

    /// The experts of a layer as operations want them.
    pub fn experts(&self, experts: Vec<Expert>) -> Result<Experts, LoadError> {
        match self.ops {
            Some(ops) => Ok(ops.index_experts(experts)?),
            None => Ok(Experts::from(experts)),
        }
    }

    /// Quantizes and arranges what was read.
    fn prepare(&self, matrix: PackedMatrix) -> Result<PackedMatrix, LoadError> {
        self.arrange(quantized(matrix, self.quantization, self.threads))
    }

    fn arrange(&self, matrix: PackedMatrix) -> Result<PackedMatrix, LoadError> {
        match self.ops {
            Some(ops) => Ok(ops.arrange(matrix)?),
            None => Ok(matrix),
        }
    }

    fn detached(&self, tensor: Tensor) -> Tensor {
        let is_shared = self.quantization.is_none() && self.ops.is_none();
        if is_shared { tensor } else { tensor.to_owned_memory() }
    }

    /// Bytes that these tensors will take in memory.
    pub fn size_bytes(&self, tensors: &[ExpectedTensor]) -> usize {
        tensors.iter().map(|tensor| self.tensor_bytes(tensor)).sum()
    }

    /// The shape of a layer that is stored as codes.
    fn stored_codes(&self, tensor: &ExpectedTensor) -> Option<[usize; 2]> {
        let (layer, shape) = (plain::layer_name(&tensor.name)?, tensor.shape.as_slice());
        let &[rows, cols] = shape else { return None };
        let is_stored = |scheme: &Scheme| (scheme.holds)(self.source, layer);
        let is_coded = tensor.role == TensorRole::Matrix
            && !plain::holds(self.source, layer)
            && [mxfp4::PACKED, mxfp4::BLOCKS].iter().any(is_stored);
        is_coded.then_some([rows, cols])
    }

    fn tensor_bytes(&self, tensor: &ExpectedTensor) -> usize {
        if let Some(shape) = self.stored_codes(tensor) {
            return quantize::size_bytes(Quantization::Mxfp4, shape);
        }
        let dtype = self.source.info(&tensor.name).and_then(|info| supported_dtype(info.dtype));
        let floats = dtype.filter(|dtype| dtype.is_float());
        let quantization = self.quantization.filter(|_| tensor.role == TensorRole::Matrix);
        if let (TensorRole::Matrix | TensorRole::Router, &[rows, cols], Some(dtype)) =
            (tensor.role, tensor.shape.as_slice(), floats)
        {
            match (quantization, self.ops) {
                (Some(wanted), _) => return quantize::size_bytes(wanted, [rows, cols]),
                (None, Some(ops)) => return ops.arranged_bytes(dtype, [rows, cols]),
                (None, None) => {}
            }
        }
        let dtype = match (tensor.role, self.ops.map(Ops::activation_dtype)) {
            // A device multiplies them in the dtype of its activations, unless that is f32.
            (TensorRole::Heads, Some(activations)) if activations != DType::F32 => {
                Some(activations)
            }
            _ => dtype,
        };
        tensor.shape.iter().product::<usize>() * dtype.map_or(0, DType::size_bytes)
    }
}
