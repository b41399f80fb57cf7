//! Models on the hub: found, downloaded once, and read from the cache ever after.
//!
//! The cache has the layout of the `huggingface_hub` Python package (`blobs`, `refs`,
//! `snapshots`), so that both share their downloads; names and paths come from the
//! `hf-hub` crate. Its transfer is not used, for these reasons, each seen in version 0.5.0:
//! once a branch is cached it never looks for a newer commit; a file that was fully
//! received but not yet renamed is asked for again beyond its end, which the hub refuses; a
//! server that ignores `Range` corrupts the file; two processes that start together fail
//! after five seconds; nothing times out and there is no offline mode.
//!
//! A start with the hub in reach costs one request when nothing is new. All files of a
//! start belong to one commit, even if the branch moves meanwhile.

mod client;
mod error;

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use hf_hub::{Cache, Repo, RepoType};

pub use error::HubError;

use self::client::{Client, RemoteFile};
use super::files::{CONFIG, TEXT_FILES};
use super::safetensors::{INDEX_FILE, SINGLE_FILE, shards_of_index};
use crate::config::HubSettings;

/// Whether downloads draw bars on the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// One bar per file, when standard error is a terminal.
    Bars,
    /// Log lines only.
    Hidden,
}

/// A repository whose text files are on disk.
pub struct HubRepository {
    id: String,
    revision: String,
    cache: Cache,
    client: Client,
    /// The commit, which names the snapshot folder.
    commit: String,
    /// Files of the commit; `None` when the hub was not asked or not reached.
    remote_files: Option<BTreeSet<String>>,
}

impl HubRepository {
    /// Resolves the revision to a commit and fetches the small files, not the weights.
    pub fn open(
        id: &str,
        revision: &str,
        settings: &HubSettings,
        progress: Progress,
    ) -> Result<HubRepository, HubError> {
        check_id(id)?;
        check_revision(revision)?;
        let client = Client::new(id, revision, settings, progress);
        let cache = Cache::new(settings.cache.clone());
        let repository = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        let found = if settings.offline { None } else { client.info_if_reachable(&repository)? };
        let (commit, remote_files) = match found {
            Some(info) => (info.sha, Some(info.siblings)),
            None => {
                let commit = cached_commit(&cache, id, revision);
                (commit.ok_or_else(|| client.not_cached(CONFIG))?, None)
            }
        };
        let this = HubRepository {
            id: id.to_owned(),
            revision: revision.to_owned(),
            cache,
            client,
            commit,
            remote_files,
        };
        this.fetch_text_files()?;
        Ok(this)
    }

    /// The folder with the files of the commit.
    pub fn folder(&self) -> PathBuf {
        self.cache.repo(self.at_commit()).pointer_path(&self.commit)
    }

    /// Fetches the safetensors file, or the index and its shards.
    pub fn fetch_weights(&self) -> Result<(), HubError> {
        let folder = self.folder();
        let Some(remote) = &self.remote_files else {
            let cached = [SINGLE_FILE, INDEX_FILE].iter().any(|name| folder.join(name).exists());
            return if cached { Ok(()) } else { Err(self.client.not_cached(SINGLE_FILE)) };
        };
        if remote.contains(SINGLE_FILE) {
            return self.fetch(SINGLE_FILE);
        }
        if !remote.contains(INDEX_FILE) {
            let other =
                |name: &&String| [".bin", ".gguf", ".pth"].iter().any(|e| name.ends_with(e));
            let found = remote.iter().find(other).cloned();
            return Err(HubError::NoSafetensors { id: self.id.clone(), found });
        }
        self.fetch(INDEX_FILE)?;
        let path = folder.join(INDEX_FILE);
        let text = std::fs::read_to_string(&path).map_err(|e| HubError::io(&path, e))?;
        let weight_map = shards_of_index(&text)
            .map_err(|reason| HubError::MalformedReply { url: INDEX_FILE.to_owned(), reason })?;
        let shards: BTreeSet<String> = weight_map.into_values().collect();
        shards.iter().try_for_each(|shard| self.fetch(shard))
    }

    fn at_commit(&self) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, self.commit.clone())
    }

    fn fetch_text_files(&self) -> Result<(), HubError> {
        let Some(remote) = &self.remote_files else {
            let cached = self.folder().join(CONFIG).exists();
            return if cached { Ok(()) } else { Err(self.client.not_cached(CONFIG)) };
        };
        if !remote.contains(CONFIG) {
            return Err(HubError::NoConfig { id: self.id.clone() });
        }
        // config.json comes last: where it is, an earlier start fetched all the others.
        for name in TEXT_FILES.iter().rev().filter(|name| remote.contains(**name)) {
            self.fetch(name)?;
        }
        // A cache that is complete may lie on a read-only disk.
        if cached_commit(&self.cache, &self.id, &self.revision).as_ref() == Some(&self.commit) {
            return Ok(());
        }
        let branch = Repo::with_revision(self.id.clone(), RepoType::Model, self.revision.clone());
        let refs = self.cache.path().join(branch.folder_name()).join("refs");
        self.cache.repo(branch).create_ref(&self.commit).map_err(|e| HubError::io(&refs, e))
    }

    /// Makes a file of the commit present in the snapshot folder.
    fn fetch(&self, name: &str) -> Result<(), HubError> {
        let pointer = self.folder().join(name);
        if pointer.exists() {
            return Ok(());
        }
        let repo = self.at_commit();
        let file = self.client.locate(&repo, name)?;
        let blob = self.cache.repo(repo.clone()).blob_path(&file.etag);
        let locks = self.cache.path().join(".locks").join(repo.folder_name());
        create_folder(blob.parent())?;
        create_folder(pointer.parent())?;
        create_folder(Some(&locks))?;
        let _lock = lock(&locks.join(format!("{}.lock", file.etag)))?;
        if !blob.exists() {
            self.receive(&file, &blob)?;
        }
        link(&blob, &pointer)
    }

    /// Downloads beside the blob and renames, so that a blob is always whole.
    fn receive(&self, file: &RemoteFile, blob: &Path) -> Result<(), HubError> {
        let partial = blob.with_extension("incomplete");
        self.client.download(file, &partial)?;
        std::fs::rename(&partial, blob).map_err(|e| HubError::io(blob, e))
    }
}

/// The commit that an earlier start resolved a revision to, or the revision if it is one.
fn cached_commit(cache: &Cache, id: &str, revision: &str) -> Option<String> {
    let repo = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
    let folder = cache.path().join(repo.folder_name());
    if let Ok(commit) = std::fs::read_to_string(folder.join("refs").join(revision)) {
        return Some(commit.trim().to_owned()).filter(|commit| is_plain_name(commit));
    }
    folder.join("snapshots").join(revision).is_dir().then(|| revision.to_owned())
}

/// An id becomes part of paths and addresses, so only the hub's own alphabet passes.
fn check_id(id: &str) -> Result<(), HubError> {
    let parts: Vec<&str> = id.split('/').collect();
    let well_formed = parts.len() <= 2 && parts.iter().all(|part| is_plain_name(part));
    if well_formed { Ok(()) } else { Err(HubError::InvalidId { id: id.to_owned() }) }
}

fn check_revision(revision: &str) -> Result<(), HubError> {
    let well_formed = revision.split('/').all(is_plain_name);
    if well_formed {
        Ok(())
    } else {
        Err(HubError::InvalidRevision { revision: revision.to_owned() })
    }
}

/// Letters, digits, dashes, underscores and dots, but no `..`, as path components need.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !name.is_empty() && name.chars().all(plain) && !name.contains("..") && name != "."
}

fn create_folder(path: Option<&Path>) -> Result<(), HubError> {
    let Some(path) = path else { return Ok(()) };
    std::fs::create_dir_all(path).map_err(|e| HubError::io(path, e))
}

/// Waits until no other process downloads the same blob; the lock ends with the file handle.
fn lock(path: &Path) -> Result<File, HubError> {
    let file = File::create(path).map_err(|e| HubError::io(path, e))?;
    file.lock().map_err(|e| HubError::io(path, e))?;
    Ok(file)
}

/// Points from the snapshot to the blob, relative, so that the cache can be moved.
fn link(blob: &Path, pointer: &Path) -> Result<(), HubError> {
    if pointer.exists() {
        return Ok(());
    }
    // A link whose blob was deleted is in the way of the new one.
    if pointer.symlink_metadata().is_ok() {
        std::fs::remove_file(pointer).map_err(|e| HubError::io(pointer, e))?;
    }
    let name = blob.file_name().unwrap_or_default();
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(Path::new("../../blobs").join(name), pointer);
    #[cfg(not(unix))]
    let linked = std::fs::hard_link(blob, pointer).map(|()| drop(name));
    linked.map_err(|e| HubError::io(pointer, e))
}
