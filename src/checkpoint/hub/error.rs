//! Why a model did not come from the hub, each with the next step.

use std::path::{Path, PathBuf};

/// A model could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Not the name of a repository.
    #[error("{id:?} is neither a folder nor a hub id like owner/name")]
    InvalidId {
        /// What was given.
        id: String,
    },
    /// Not the name of a branch, tag or commit.
    #[error("--revision {revision:?} is not the name of a branch, tag or commit")]
    InvalidRevision {
        /// What was given.
        revision: String,
    },
    /// 401 or 403 without a token.
    #[error(
        "the hub does not show {id} without a token ({status}): check the id; if the model is private or gated, set HF_TOKEN"
    )]
    TokenNeeded {
        /// The repository.
        id: String,
        /// HTTP status.
        status: u16,
    },
    /// 401 or 403 with a token.
    #[error(
        "the hub refuses {id} to the owner of HF_TOKEN ({status}): accept the model's licence at {endpoint}/{id}, or use a token that may read it"
    )]
    AccessRefused {
        /// The repository.
        id: String,
        /// HTTP status.
        status: u16,
        /// Address of the hub.
        endpoint: String,
    },
    /// 404 for the repository or the revision.
    #[error("the hub has no {id} at revision {revision}: check the id and --revision")]
    NotFound {
        /// The repository.
        id: String,
        /// The revision.
        revision: String,
    },
    /// The repository is no model.
    #[error("{id} on the hub has no config.json, so it is not a model that can be served")]
    NoConfig {
        /// The repository.
        id: String,
    },
    /// The repository has weights of another kind only.
    #[error("{id} on the hub has no safetensors weights{}", found.as_ref().map(|f| format!(" (it has {f}, which is not supported)")).unwrap_or_default())]
    NoSafetensors {
        /// The repository.
        id: String,
        /// A weight file of another kind.
        found: Option<String>,
    },
    /// Offline, and an earlier start did not fetch the file.
    #[error("{id} is not in {} ({file} is missing) and HF_HUB_OFFLINE is set: run once without it", cache.display())]
    NotCached {
        /// The repository.
        id: String,
        /// The missing file.
        file: String,
        /// The cache folder.
        cache: PathBuf,
    },
    /// No connection.
    #[error("cannot reach {endpoint} ({reason}), and {id} is not in {}: check the network or HF_ENDPOINT, or give a folder", cache.display())]
    Unreachable {
        /// The repository.
        id: String,
        /// Address of the hub.
        endpoint: String,
        /// Why.
        reason: String,
        /// The cache folder.
        cache: PathBuf,
    },
    /// Another status than the hub should answer with.
    #[error("the hub answers {status} for {url}; try again later")]
    UnexpectedStatus {
        /// The address.
        url: String,
        /// HTTP status.
        status: u16,
    },
    /// The connection broke again and again.
    #[error("{file} is incomplete after {received} bytes ({reason}); start again to resume")]
    Interrupted {
        /// The file.
        file: String,
        /// Bytes on disk.
        received: u64,
        /// Why.
        reason: String,
    },
    /// The hub's answer makes no sense.
    #[error("the answer for {url} is malformed: {reason}")]
    MalformedReply {
        /// The address.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The cache cannot be written.
    #[error("cannot write {}: {source}; choose another folder with --download-dir", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl HubError {
    pub(super) fn io(path: &Path, source: std::io::Error) -> HubError {
        HubError::Io { path: path.to_owned(), source }
    }
}
