//! What can be wrong with a model's files, as facts.
//!
//! Each sentence names the file or the tensor and, where the user can act, the next step.

use std::path::PathBuf;

/// A model's files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The model folder does not exist.
    #[error("{} is not a folder; give a folder with config.json or a hub id like owner/name", path.display())]
    NoSuchFolder {
        /// What was given.
        path: PathBuf,
    },
    /// A file that every model needs is absent.
    #[error("{place} has no {file}")]
    MissingFile {
        /// File name.
        file: String,
        /// Folder or repository.
        place: String,
    },
    /// The folder has weights, but none that this program reads.
    #[error("{place} has no safetensors weights{}", found.as_ref().map(|f| format!(" (found {f}, which is not supported; convert it to safetensors)")).unwrap_or_default())]
    NoWeights {
        /// Folder or repository.
        place: String,
        /// A weight file of another kind that is there.
        found: Option<String>,
    },
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A text file is not UTF-8 or not the JSON it should be.
    #[error("{file} is malformed: {reason}")]
    MalformedFile {
        /// File name.
        file: String,
        /// Why.
        reason: String,
    },
    /// A safetensors file is truncated or its header lies.
    #[error("{file} is not a valid safetensors file: {reason}; download it again")]
    InvalidSafetensors {
        /// The file.
        file: String,
        /// Why.
        reason: String,
    },
    /// The index names a shard that is not there.
    #[error("{index} names the shard {shard}, which is missing; the download is incomplete")]
    MissingShard {
        /// The index file.
        index: String,
        /// The shard.
        shard: String,
    },
    /// The index says that a shard holds a tensor, but it does not.
    #[error("{index} says that {shard} holds {name}, but it does not")]
    NotInShard {
        /// The index file.
        index: String,
        /// The shard.
        shard: String,
        /// The tensor.
        name: String,
    },
    /// No file holds this tensor.
    #[error("the checkpoint has no tensor {name}")]
    MissingTensor {
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than the model needs.
    #[error("{name} in {file} has shape {found:?}, but the model needs {expected:?}")]
    WrongShape {
        /// The tensor.
        name: String,
        /// What the model needs.
        expected: Vec<usize>,
        /// What the file holds.
        found: Vec<usize>,
        /// The file.
        file: String,
    },
    /// A tensor has an element type that cannot be computed with.
    #[error("{name} in {file} has dtype {dtype}; supported are {supported}")]
    UnsupportedDType {
        /// The tensor.
        name: String,
        /// As the file spells it.
        dtype: String,
        /// What would be right.
        supported: &'static str,
        /// The file.
        file: String,
    },
    /// A scale of MXFP4 that is no number.
    #[error(
        "{name} in {file} holds 255 at {place:?}, which is no scale (E8M0: not a number); convert or download the checkpoint again"
    )]
    NanScale {
        /// The tensor.
        name: String,
        /// Where in it.
        place: Vec<usize>,
        /// The file.
        file: String,
    },
    /// A tensor has no or more than four sizes.
    #[error("{name} in {file} has {rank} sizes; supported are one to four")]
    UnsupportedRank {
        /// The tensor.
        name: String,
        /// How many sizes it has.
        rank: usize,
        /// The file.
        file: String,
    },
    /// The hub did not give it.
    #[error(transparent)]
    Hub(#[from] super::hub::HubError),
}
