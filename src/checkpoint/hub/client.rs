//! Three requests to the hub: what a repository holds, where a file is, its bytes.
//!
//! Knows addresses, headers and retries; nothing of the cache beyond the file it appends to.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use hf_hub::Repo;
use hf_hub::api::RepoInfo;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Agent, Body};

use super::{HubError, Progress, is_plain_name};
use crate::config::HubSettings;

/// A connection that stays silent this long is broken.
const SILENCE: Duration = Duration::from_secs(60);
/// Time to connect.
const CONNECT: Duration = Duration::from_secs(15);
/// Broken connections in a row that brought no byte before giving up.
const MAX_FRUITLESS_TRIES: u32 = 5;
/// Unit of the pauses between them, which double.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Redirects within the hub that are followed when a file is located.
const MAX_REDIRECTS: usize = 5;
/// Bytes read at once.
const READ_BYTES: usize = 1 << 18;

/// A commit and the files in it.
pub(super) struct RemoteCommit {
    pub(super) sha: String,
    pub(super) siblings: BTreeSet<String>,
}

/// A file of a commit.
pub(super) struct RemoteFile {
    pub(super) name: String,
    url: String,
    /// Identifies the content; the blob's name in the cache.
    pub(super) etag: String,
    size_bytes: Option<u64>,
}

/// Talks to one hub about one repository.
pub(super) struct Client {
    id: String,
    revision: String,
    settings: HubSettings,
    progress: Progress,
    /// Follows redirects; the token stays with the hub's host.
    following: Agent,
    /// Shows redirects, whose headers describe the file.
    staying: Agent,
    /// Unit of the growing pauses between fruitless tries.
    first_pause: Duration,
}

/// How one attempt to receive the rest of a file ended.
enum Attempt {
    Complete,
    /// The connection broke; what was received is on disk.
    Broken(String),
}

impl Client {
    pub(super) fn new(
        id: &str,
        revision: &str,
        settings: &HubSettings,
        progress: Progress,
    ) -> Client {
        let agent = |max_redirects| -> Agent {
            Agent::config_builder()
                .user_agent(concat!("tokenmill/", env!("CARGO_PKG_VERSION")))
                .http_status_as_error(false)
                .max_redirects(max_redirects)
                .max_redirects_will_error(false)
                .redirect_auth_headers(RedirectAuthHeaders::SameHost)
                .timeout_connect(Some(CONNECT))
                .timeout_recv_response(Some(SILENCE))
                .timeout_per_read(Some(SILENCE))
                .build()
                .into()
        };
        Client {
            id: id.to_owned(),
            revision: revision.to_owned(),
            settings: settings.clone(),
            progress,
            following: agent(10),
            staying: agent(0),
            first_pause: FIRST_PAUSE,
        }
    }

    /// The error that says that a file is needed but may not be fetched.
    pub(super) fn not_cached(&self, file: &str) -> HubError {
        if self.settings.offline {
            return HubError::NotCached {
                id: self.id.clone(),
                file: file.to_owned(),
                cache: self.settings.cache.clone(),
            };
        }
        self.unreachable("the connection failed")
    }

    /// The commit of the revision; `None` when the hub cannot be reached, in which case a
    /// warning is logged and the caller falls back on the cache.
    pub(super) fn info_if_reachable(&self, repo: &Repo) -> Result<Option<RemoteCommit>, HubError> {
        let url = format!("{}/api/{}", self.settings.endpoint, repo.api_url());
        let mut response = match self.get(&self.following, &url, 0) {
            Ok(response) if response.status().is_server_error() => {
                tracing::warn!(
                    url,
                    status = response.status().as_u16(),
                    "the hub fails; trying the cache"
                );
                return Ok(None);
            }
            Ok(response) => response,
            Err(error) => {
                tracing::warn!(url, %error, "the hub is out of reach; trying the cache");
                return Ok(None);
            }
        };
        self.check_status(&response, &url)?;
        let malformed = |reason: String| HubError::MalformedReply { url: url.clone(), reason };
        let info: RepoInfo =
            response.body_mut().read_json().map_err(|error| malformed(error.to_string()))?;
        if !is_plain_name(&info.sha) {
            return Err(malformed(format!("{:?} is not a commit", info.sha)));
        }
        let siblings = info.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
        Ok(Some(RemoteCommit { sha: info.sha, siblings }))
    }

    /// Asks for a file's size and content id without its bytes. Large files live on another
    /// host; the redirect there carries both in headers of its own.
    pub(super) fn locate(&self, repo: &Repo, name: &str) -> Result<RemoteFile, HubError> {
        let endpoint = &self.settings.endpoint;
        let url = format!("{endpoint}/{}/resolve/{}/{name}", repo.url(), repo.url_revision());
        let mut at = url.clone();
        for _ in 0..MAX_REDIRECTS {
            let response = self.head(&at)?;
            let location = header(&response, "location").filter(|to| to.starts_with('/'));
            if let (true, Some(location)) = (response.status().is_redirection(), location) {
                at = format!("{}{location}", origin_of(endpoint));
                continue;
            }
            self.check_status(&response, &at)?;
            let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag"));
            let etag = etag.unwrap_or_default();
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            if !is_plain_name(&etag) {
                let reason = format!("{etag:?} is not an entity tag that can name a file");
                return Err(HubError::MalformedReply { url: at, reason });
            }
            let own_size = Some("content-length").filter(|_| response.status().is_success());
            let size = header(&response, "x-linked-size")
                .or_else(|| own_size.and_then(|name| header(&response, name)))
                .and_then(|size| size.parse().ok());
            return Ok(RemoteFile { name: name.to_owned(), url, etag, size_bytes: size });
        }
        Err(HubError::MalformedReply { url, reason: "too many redirects".to_owned() })
    }

    /// Appends to `partial` until it holds the whole file; a broken connection is resumed,
    /// here and in a later start.
    pub(super) fn download(&self, file: &RemoteFile, partial: &Path) -> Result<(), HubError> {
        let bar = self.bar(file);
        let mut fruitless = 0;
        let mut before = size_of(partial);
        tracing::info!(
            file = file.name,
            bytes = file.size_bytes,
            resumed_at = before,
            "downloading"
        );
        loop {
            let reason = match self.receive_rest(file, partial, &bar)? {
                Attempt::Complete => break,
                Attempt::Broken(reason) => reason,
            };
            let received = size_of(partial);
            fruitless = if received > before { 0 } else { fruitless + 1 };
            before = received;
            if fruitless == MAX_FRUITLESS_TRIES {
                return Err(HubError::Interrupted { file: file.name.clone(), received, reason });
            }
            tracing::warn!(file = file.name, received, reason, "the connection broke; resuming");
            // The first repetition is immediate: most breaks are a proxy's idle limit.
            if fruitless > 1 {
                std::thread::sleep(self.first_pause * (1 << fruitless));
            }
        }
        bar.finish_and_clear();
        tracing::info!(file = file.name, "downloaded");
        Ok(())
    }

    /// One connection's worth of a file.
    fn receive_rest(
        &self,
        file: &RemoteFile,
        partial: &Path,
        bar: &ProgressBar,
    ) -> Result<Attempt, HubError> {
        let start = size_of(partial);
        match file.size_bytes {
            Some(size) if start == size => return Ok(Attempt::Complete),
            Some(size) if start > size => return restart(partial, "the part on disk is too long"),
            _ => {}
        }
        let response = match self.get(&self.following, &file.url, start) {
            Ok(response) => response,
            Err(error) => return Ok(Attempt::Broken(error.to_string())),
        };
        if response.status() == 416 {
            return restart(partial, "the hub cannot resume where the part on disk ends");
        }
        if response.status().is_server_error() {
            return Ok(Attempt::Broken(format!("the hub answers {}", response.status())));
        }
        self.check_status(&response, &file.url)?;
        // Whoever ignores `Range` answers 200 and sends everything.
        let resumes = response.status() == 206;
        let mut options = OpenOptions::new();
        options.create(true).write(true).append(resumes).truncate(!resumes);
        let out = options.open(partial).map_err(|e| HubError::io(partial, e))?;
        bar.set_position(if resumes { start } else { 0 });
        copy_body(response.into_body(), out, bar, partial, file.size_bytes)
    }

    fn get(&self, agent: &Agent, url: &str, start: u64) -> Result<Response<Body>, ureq::Error> {
        let mut request = agent.get(url).header("accept-encoding", "identity");
        if let Some(token) = &self.settings.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.header("range", format!("bytes={start}-"));
        }
        request.call()
    }

    fn head(&self, url: &str) -> Result<Response<Body>, HubError> {
        let mut request = self.staying.head(url).header("accept-encoding", "identity");
        if let Some(token) = &self.settings.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        request.call().map_err(|error| self.unreachable(&error.to_string()))
    }

    fn unreachable(&self, reason: &str) -> HubError {
        HubError::Unreachable {
            id: self.id.clone(),
            endpoint: self.settings.endpoint.clone(),
            reason: reason.to_owned(),
            cache: self.settings.cache.clone(),
        }
    }

    fn check_status(&self, response: &Response<Body>, url: &str) -> Result<(), HubError> {
        let status = response.status().as_u16();
        let id = self.id.clone();
        match status {
            200..=399 => Ok(()),
            401 | 403 if self.settings.token.is_none() => Err(HubError::TokenNeeded { id, status }),
            401 | 403 => {
                let endpoint = self.settings.endpoint.clone();
                Err(HubError::AccessRefused { id, status, endpoint })
            }
            404 => Err(HubError::NotFound { id, revision: self.revision.clone() }),
            _ => Err(HubError::UnexpectedStatus { url: url.to_owned(), status }),
        }
    }

    fn bar(&self, file: &RemoteFile) -> ProgressBar {
        let bar = match file.size_bytes {
            Some(size) => ProgressBar::new(size),
            None => ProgressBar::no_length(),
        };
        if self.progress == Progress::Hidden {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let template = "{msg:32} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        bar.set_style(style);
        bar.set_message(file.name.clone());
        bar
    }
}

/// Copies a body to the end of a file and judges whether the file is whole.
fn copy_body(
    body: Body,
    mut out: File,
    bar: &ProgressBar,
    partial: &Path,
    expected: Option<u64>,
) -> Result<Attempt, HubError> {
    let mut reader = body.into_reader();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                out.write_all(&buffer[..count]).map_err(|e| HubError::io(partial, e))?;
                bar.inc(count as u64);
            }
            Err(error) => return Ok(Attempt::Broken(error.to_string())),
        }
    }
    out.sync_all().map_err(|e| HubError::io(partial, e))?;
    match expected {
        Some(size) if size_of(partial) < size => {
            Ok(Attempt::Broken("the connection ended early".to_owned()))
        }
        Some(size) if size_of(partial) > size => restart(partial, "the hub sent too much"),
        _ => Ok(Attempt::Complete),
    }
}

/// Throws the part on disk away, because nothing can be appended to it.
fn restart(partial: &Path, reason: &str) -> Result<Attempt, HubError> {
    std::fs::remove_file(partial).map_err(|e| HubError::io(partial, e))?;
    Ok(Attempt::Broken(reason.to_owned()))
}

fn size_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

/// `https://host:port` of an address.
fn origin_of(url: &str) -> &str {
    let host_at = url.find("://").map_or(0, |at| at + 3);
    let end = url[host_at..].find('/').map_or(url.len(), |at| host_at + at);
    &url[..end]
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_connection_that_never_brings_a_byte_is_given_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            for _ in 0..MAX_FRUITLESS_TRIES {
                drop(listener.accept());
            }
        });
        let folder = tempfile::tempdir().unwrap();
        let settings = HubSettings {
            endpoint: endpoint.clone(),
            token: None,
            cache: folder.path().to_owned(),
            offline: false,
        };
        let mut client = Client::new("owner/name", "main", &settings, Progress::Hidden);
        client.first_pause = Duration::ZERO;
        let file = RemoteFile {
            name: "model.safetensors".to_owned(),
            url: format!("{endpoint}/file"),
            etag: "e".to_owned(),
            size_bytes: Some(10),
        };
        let error = client.download(&file, &folder.path().join("e.incomplete")).unwrap_err();
        server.join().unwrap();
        assert!(matches!(error, HubError::Interrupted { received: 0, .. }), "{error}");
    }

    #[test]
    fn the_origin_of_an_address_ends_before_its_path() {
        assert_eq!(origin_of("https://hub.example:8080/mirror/hf"), "https://hub.example:8080");
        assert_eq!(origin_of("http://127.0.0.1:9"), "http://127.0.0.1:9");
    }
}
