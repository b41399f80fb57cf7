//! Why a model cannot be served, as facts.
//!
//! Every sentence about config.json names the field, its value and what is supported.

use std::fmt;

use crate::checkpoint::CheckpointError;
use crate::weights::LoadError;

/// How many problems an error lists before it only counts them.
const MOST_LISTED_PROBLEMS: usize = 10;

/// A model cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `config.json` is not a JSON object.
    #[error("config.json is malformed: {reason}")]
    MalformedConfig {
        /// Why.
        reason: String,
    },
    /// A field without which nothing can be computed is absent.
    #[error("config.json has no {field}")]
    MissingField {
        /// Path of the field.
        field: String,
    },
    /// A field has a value that this program does not support.
    #[error("config.json: {field} is {value}; supported {supported}")]
    Unsupported {
        /// Path of the field.
        field: String,
        /// Its value as JSON.
        value: String,
        /// What is supported, beginning with `is` or `are`.
        supported: String,
    },
    /// The checkpoint does not hold what `config.json` describes.
    #[error("the checkpoint does not match config.json: {}", Listed(problems))]
    Tensors {
        /// Every mismatch.
        problems: Vec<TensorProblem>,
    },
    /// The files cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The weights cannot be brought to the device.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// One way in which a checkpoint differs from the description.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorProblem {
    /// No file holds it.
    #[error("{name} {expected:?} is missing")]
    Missing {
        /// The tensor.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// The model has no use for it, so that serving without it would be wrong.
    #[error("{name} {found:?} in {file} is not part of the model")]
    Extra {
        /// The tensor.
        name: String,
        /// Its shape.
        found: Vec<usize>,
        /// The file.
        file: String,
    },
    /// It has another shape.
    #[error("{name} in {file} has shape {found:?} instead of {expected:?}")]
    WrongShape {
        /// The tensor.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The shape it has.
        found: Vec<usize>,
        /// The file.
        file: String,
    },
    /// Its element type cannot be computed with.
    #[error("{name} in {file} has dtype {found}; supported are {supported}")]
    WrongDType {
        /// The tensor.
        name: String,
        /// As the file spells it.
        found: String,
        /// What would be right.
        supported: &'static str,
        /// The file.
        file: String,
    },
}

/// Writes the first few problems and the number of the others.
struct Listed<'a>(&'a [TensorProblem]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().take(MOST_LISTED_PROBLEMS).enumerate() {
            write!(f, "{}{problem}", if i == 0 { "" } else { "; " })?;
        }
        match self.0.len().saturating_sub(MOST_LISTED_PROBLEMS) {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}
