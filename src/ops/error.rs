//! What can go wrong on a device, as facts.

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
    /// It has no kernels for such a model, weight or step.
    #[error("{device} has no kernels for {field} {value}: {needed} is needed")]
    Unsupported {
        /// Which device.
        device: String,
        /// What cannot be computed, by its name in the model's or the engine's configuration.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        needed: String,
    },
}
