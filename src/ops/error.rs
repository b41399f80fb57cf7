//! What can go wrong on a device, as facts.

use crate::formats::Format;
use crate::tensor::DType;

/// A device cannot do what was asked of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpsError {
    /// It has no room.
    #[error("{device} has no room for {bytes} more bytes: {reason}")]
    OutOfMemory {
        /// Which device.
        device: String,
        /// How much was wanted.
        bytes: usize,
        /// The device's words.
        reason: String,
    },
    /// An operation failed, and so did all after it.
    #[error("{device} failed: {reason}")]
    Failed {
        /// Which device.
        device: String,
        /// What failed and the device's words.
        reason: String,
    },
    /// It has no kernel for such weights.
    #[error("{device} has no kernel for weights in {format:?} of {dtype}")]
    UnsupportedWeights {
        /// Which device.
        device: String,
        /// How they are laid out.
        format: Format,
        /// Their elements.
        dtype: DType,
    },
}
