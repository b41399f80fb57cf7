//! A hub on 127.0.0.1: the part of its API that downloads use, with faults on request.
//!
//! As on the real hub, small files answer after a redirect within the host, and weights live
//! on another host (`localhost` instead of `127.0.0.1`) that must not see the token.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use sha2::{Digest, Sha256};

/// What the hub holds and how it misbehaves.
#[derive(Default)]
pub struct Hub {
    /// Commit of `main`.
    pub commit: String,
    /// Files of that commit.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Required bearer token.
    pub token: Option<String>,
    /// Status for every request with the right token, or with any when none is required.
    pub refuse_with: Option<u16>,
    /// Break the next download of this file after so many bytes.
    pub break_once: Option<(String, usize)>,
    /// Answer range requests with the whole file.
    pub ignores_ranges: bool,
    /// Requests so far, `METHOD path`, with ` from N` for a range.
    pub requests: Vec<String>,
    /// The other host was sent the token.
    pub token_leaked: bool,
}

impl Hub {
    /// Entity tag of a file, as the hub computes it for large ones.
    pub fn etag(&self, name: &str) -> String {
        Sha256::digest(&self.files[name]).iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A running hub; it stops when dropped.
pub struct HubServer {
    /// What it holds.
    pub hub: Arc<Mutex<Hub>>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl HubServer {
    /// Starts a hub with one repository, `owner/name`.
    pub fn start(hub: Hub) -> HubServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let hub = Arc::new(Mutex::new(hub));
        let shared = Arc::clone(&hub);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some(request) = read_request(&stream) else { break };
                // A client that hangs up early is no fault of the server.
                let _ = answer(&mut shared.lock().unwrap(), address, &request, &mut stream);
            }
        });
        HubServer { hub, address, thread: Some(thread) }
    }

    /// Its address.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests since the last call.
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.hub.lock().unwrap().requests)
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        // An empty connection ends the loop.
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

struct Request {
    method: String,
    path: String,
    host: String,
    authorization: Option<String>,
    /// First byte asked for.
    from: Option<usize>,
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let headers: BTreeMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_owned()))
        })
        .collect();
    let from = headers
        .get("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let host = headers.get("host").cloned().unwrap_or_default();
    Some(Request { method, path, host, authorization: headers.get("authorization").cloned(), from })
}

fn answer(
    hub: &mut Hub,
    address: SocketAddr,
    request: &Request,
    stream: &mut TcpStream,
) -> std::io::Result<()> {
    let range = request.from.map(|from| format!(" from {from}")).unwrap_or_default();
    hub.requests.push(format!("{} {}{range}", request.method, request.path));
    if let Some(name) = request.path.strip_prefix("/cdn/") {
        hub.token_leaked |= request.authorization.is_some() || request.host.starts_with("127");
        return send_file(hub, request, name, stream);
    }
    let bearer = hub.token.as_ref().map(|token| format!("Bearer {token}"));
    if bearer.is_some() && bearer != request.authorization {
        return send_head(stream, 401, &[], 0);
    }
    if let Some(status) = hub.refuse_with {
        return send_head(stream, status, &[], 0);
    }
    if let Some(name) = request.path.strip_prefix("/api/resolve-cache/") {
        return send_file(hub, request, name, stream);
    }
    let resolve = format!("/owner/name/resolve/{}/", hub.commit);
    if request.path == "/api/models/owner/name/revision/main" {
        let siblings: Vec<_> =
            hub.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
        let info = serde_json::json!({"sha": hub.commit, "siblings": siblings}).to_string();
        send_head(stream, 200, &[], info.len())?;
        return stream.write_all(info.as_bytes());
    }
    match request.path.strip_prefix(&resolve).filter(|name| hub.files.contains_key(*name)) {
        None => send_head(stream, 404, &[], 0),
        Some(name) if name.ends_with(".safetensors") => {
            let headers = [
                ("location", format!("http://localhost:{}/cdn/{name}", address.port())),
                ("x-linked-etag", format!("\"{}\"", hub.etag(name))),
                ("x-linked-size", hub.files[name].len().to_string()),
            ];
            send_head(stream, 302, &headers, 0)
        }
        Some(name) => {
            send_head(stream, 307, &[("location", format!("/api/resolve-cache/{name}"))], 0)
        }
    }
}

fn send_file(
    hub: &mut Hub,
    request: &Request,
    name: &str,
    stream: &mut TcpStream,
) -> std::io::Result<()> {
    let content = &hub.files[name];
    let etag = ("etag", format!("W/\"{}\"", hub.etag(name)));
    let from = request.from.filter(|_| !hub.ignores_ranges);
    if from.is_some_and(|from| from >= content.len()) {
        return send_head(stream, 416, &[], 0);
    }
    let body = &content[from.unwrap_or(0)..];
    send_head(stream, if from.is_some() { 206 } else { 200 }, &[etag], body.len())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    let limit = hub.break_once.take_if(|(file, _)| file == name).map(|(_, bytes)| bytes);
    stream.write_all(&body[..limit.unwrap_or(body.len()).min(body.len())])
}

fn send_head(
    stream: &mut TcpStream,
    status: u16,
    headers: &[(&str, String)],
    len: usize,
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status} x\r\nconnection: close\r\ncontent-length: {len}\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    stream.write_all(head.as_bytes())
}
