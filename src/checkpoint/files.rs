//! The files of a model, wherever they are.
//!
//! A folder, the bundled model and a hub repository answer the same questions: the text of
//! a named file, and the weights. A hub repository is downloaded first and is a folder then.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use super::bundled::{Bundle, TINY};
use super::dummy::DummySource;
use super::hub::{HubRepository, Progress};
use super::safetensors::SINGLE_FILE;
use super::{Checkpoint, CheckpointError, ExpectedTensor, TensorSource};
use crate::config::{LoadFormat, ModelSource};
use crate::tensor::DType;

/// The model's architecture and sizes.
pub const CONFIG: &str = "config.json";
/// The model's sampling defaults and end tokens.
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// Special tokens by role, and in older repositories the chat template.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Special tokens by role, in repositories that keep them apart.
pub const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
/// The chat template of newer repositories.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// Text files that a model may have; all but the first are optional here.
pub const TEXT_FILES: [&str; 6] =
    [CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE];

/// The files of one model.
pub enum ModelFiles {
    /// In the binary.
    Bundled(&'static Bundle),
    /// In a folder.
    Folder(PathBuf),
    /// In the hub's cache; the weights may still have to be fetched.
    Hub(Box<HubRepository>),
}

impl ModelFiles {
    /// Finds the model and makes its text files readable. Weights are not touched yet, so
    /// that a model that cannot be served is refused before gigabytes are fetched.
    pub fn open(source: &ModelSource, progress: Progress) -> Result<ModelFiles, CheckpointError> {
        match source {
            ModelSource::Bundled => Ok(ModelFiles::Bundled(&TINY)),
            ModelSource::Folder(path) if !path.is_dir() => {
                Err(CheckpointError::NoSuchFolder { path: path.clone() })
            }
            ModelSource::Folder(path) => Ok(ModelFiles::Folder(path.clone())),
            ModelSource::Hub { id, revision, hub } => {
                let repository = HubRepository::open(id, revision, hub, progress)?;
                Ok(ModelFiles::Hub(Box::new(repository)))
            }
        }
    }

    /// The text of a file; `None` when the model has no such file.
    pub fn text(&self, name: &str) -> Option<Result<Cow<'static, str>, CheckpointError>> {
        match self {
            ModelFiles::Bundled(bundle) => bundle.text(name).map(|text| Ok(Cow::Borrowed(text))),
            ModelFiles::Folder(folder) => read_text(folder, name),
            ModelFiles::Hub(repository) => read_text(&repository.folder(), name),
        }
    }

    /// The text of a file without which the model cannot be served.
    pub fn required_text(&self, name: &str) -> Result<Cow<'static, str>, CheckpointError> {
        self.text(name).unwrap_or_else(|| {
            Err(CheckpointError::MissingFile { file: name.to_owned(), place: self.place() })
        })
    }

    /// The weights, fetched if need be, or random ones of the expected names and shapes.
    pub fn weights(
        &self,
        format: LoadFormat,
        expected: Vec<ExpectedTensor>,
        dtype: DType,
    ) -> Result<Box<dyn TensorSource>, CheckpointError> {
        if format == LoadFormat::Dummy {
            return Ok(Box::new(DummySource::new(expected, dtype)));
        }
        let checkpoint = match self {
            ModelFiles::Bundled(bundle) => Checkpoint::from_static(bundle.weights, SINGLE_FILE)?,
            ModelFiles::Folder(folder) => Checkpoint::open(folder)?,
            ModelFiles::Hub(repository) => {
                repository.fetch_weights()?;
                Checkpoint::open(&repository.folder())?
            }
        };
        tracing::info!(
            files = checkpoint.num_files(),
            bytes = checkpoint.size_bytes(),
            "opened the checkpoint"
        );
        Ok(Box::new(checkpoint))
    }

    /// Where the files are, for messages.
    pub fn place(&self) -> String {
        match self {
            ModelFiles::Bundled(bundle) => format!("the bundled model {}", bundle.name),
            ModelFiles::Folder(folder) => folder.display().to_string(),
            ModelFiles::Hub(repository) => repository.folder().display().to_string(),
        }
    }
}

fn read_text(folder: &Path, name: &str) -> Option<Result<Cow<'static, str>, CheckpointError>> {
    let path = folder.join(name);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(source) => return Some(Err(CheckpointError::Io { path, source })),
    };
    let text = String::from_utf8(bytes).map_err(|error| CheckpointError::MalformedFile {
        file: name.to_owned(),
        reason: error.to_string(),
    });
    Some(text.map(Cow::Owned))
}
