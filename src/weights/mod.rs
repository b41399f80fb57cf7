//! How checkpoints store a matrix: one file per scheme.
//!
//! A scheme recognises its tensors by their names and turns them into a [`PackedMatrix`] of
//! some format; [`linear::Linear`] is what the model multiplies by. Knows nothing of layers.

pub mod linear;
pub mod plain;

use crate::checkpoint::{CheckpointError, TensorSource};
use crate::formats::PackedMatrix;

/// One way of storing the matrix of a linear layer.
pub struct Scheme {
    /// Name for logs.
    pub name: &'static str,
    /// Whether the source stores the layer of this name (without `.weight`) this way.
    pub holds: fn(&dyn TensorSource, &str) -> bool,
    /// Reads the layer's `[out_features, in_features]` matrix.
    pub load: fn(&dyn TensorSource, &str, [usize; 2]) -> Result<PackedMatrix, CheckpointError>,
}

/// All schemes; the first that holds a layer loads it.
pub const SCHEMES: [Scheme; 1] = [Scheme { name: "plain", holds: plain::holds, load: plain::load }];

/// Reads the `[out_features, in_features]` matrix of a linear layer in whichever scheme the
/// source stores it.
pub fn load_matrix(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
) -> Result<PackedMatrix, CheckpointError> {
    let scheme = SCHEMES.iter().find(|scheme| (scheme.holds)(source, name));
    let scheme =
        scheme.ok_or_else(|| CheckpointError::MissingTensor { name: plain::weight_name(name) })?;
    (scheme.load)(source, name, shape)
}
