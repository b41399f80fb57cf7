//! The plain scheme: `name.weight` holds the matrix as f32, bf16 or f16, row-major.

use crate::checkpoint::{CheckpointError, FLOATS, TensorSource};
use crate::formats::{PackedMatrix, dense};
use crate::tensor::Tensor;

/// Name of the tensor that holds the matrix of a layer.
pub fn weight_name(name: &str) -> String {
    format!("{name}.weight")
}

/// The layer of a tensor that holds its matrix.
pub fn layer_name(tensor: &str) -> Option<&str> {
    tensor.strip_suffix(".weight")
}

/// Whether the source has a weight of this name.
pub fn holds(source: &dyn TensorSource, name: &str) -> bool {
    source.info(&weight_name(name)).is_some()
}

/// The matrix as it is stored, without a copy where the source allows it.
pub fn load(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
) -> Result<PackedMatrix, CheckpointError> {
    load_float(source, &weight_name(name), &shape).map(dense::pack)
}

/// A float tensor of this shape: a weight, a bias, a norm or an embedding table.
pub fn load_float(
    source: &dyn TensorSource,
    name: &str,
    shape: &[usize],
) -> Result<Tensor, CheckpointError> {
    let tensor = source.tensor_of_shape(name, shape)?;
    if !tensor.dtype().is_float() {
        return Err(CheckpointError::UnsupportedDType {
            name: name.to_owned(),
            dtype: tensor.dtype().to_string(),
            supported: FLOATS,
            file: source.info(name).map(|info| info.file).unwrap_or_default(),
        });
    }
    Ok(tensor)
}
