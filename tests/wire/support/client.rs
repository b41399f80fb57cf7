//! HTTP/1.1 by hand, so that nothing between the test and the bytes can help.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

use serde_json::Value;

use super::PATIENCE;

/// Headers that belong in a transcript; the others are the HTTP library's business.
const SHOWN_HEADERS: &[&str] = &[
    "allow",
    "cache-control",
    "connection",
    "content-type",
    "retry-after",
    "www-authenticate",
    "x-accel-buffering",
    "x-ignored-params",
    "x-request-id",
];

/// Sends requests to one server, each over its own connection.
#[derive(Clone)]
pub struct Client {
    address: SocketAddr,
    headers: Vec<(String, String)>,
}

/// What came back.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Client {
    pub fn new(address: SocketAddr) -> Client {
        let headers = [("content-type", "application/json"), ("x-request-id", "test")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Client { address, headers: headers.into() }
    }

    /// Sets a header for all requests; an empty value removes it.
    pub fn with_header(mut self, name: &str, value: &str) -> Client {
        self.headers.retain(|(known, _)| known != name);
        if !value.is_empty() {
            self.headers.push((name.to_owned(), value.to_owned()));
        }
        self
    }

    pub fn get(&self, path: &str) -> Reply {
        self.request("GET", path, "")
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        self.request("POST", path, &body.to_string())
    }

    /// One exchange, to its end.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Reply {
        self.open(method, path, body).finish()
    }

    /// Sends a request and reads the head of the answer, but not the body.
    pub fn open(&self, method: &str, path: &str, body: &str) -> Answering {
        Answering::new(self.send(method, path, body))
    }

    /// Sends a request and reads nothing.
    pub fn send(&self, method: &str, path: &str, body: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
        for (name, value) in &self.headers {
            write!(head, "{name}: {value}\r\n").expect("memory");
        }
        write!(head, "content-length: {}\r\n\r\n", body.len()).expect("memory");
        stream.write_all(head.as_bytes()).expect("the server reads");
        // A refused body may find the connection closed.
        let _ = stream.write_all(body.as_bytes());
        BufReader::new(stream)
    }

    /// An exchange as text, with what changes from run to run replaced.
    pub fn transcript(&self, path: &str, body: &Value) -> String {
        let reply = self.post(path, body);
        format!("POST {path}\n{body}\n\n{}", reply.transcript())
    }
}

/// True when an answer has begun to arrive.
pub fn has_answer(connection: &BufReader<TcpStream>) -> bool {
    let stream = connection.get_ref();
    stream.set_nonblocking(true).expect("a socket");
    let arrived = stream.peek(&mut [0]).is_ok_and(|bytes| bytes > 0);
    stream.set_nonblocking(false).expect("a socket");
    arrived
}

/// Reads a whole answer.
pub fn read_answer(connection: BufReader<TcpStream>) -> Reply {
    Answering::new(connection).finish()
}

/// An answer whose body is still coming.
pub struct Answering {
    connection: BufReader<TcpStream>,
    pub status: u16,
    headers: Vec<(String, String)>,
}

impl Answering {
    fn new(mut connection: BufReader<TcpStream>) -> Answering {
        let (status, headers) = read_head(&mut connection);
        Answering { connection, status, headers }
    }

    /// Reads until a text has arrived.
    pub fn read_until(&mut self, wanted: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            let mut line = String::new();
            let read = self.connection.read_line(&mut line).expect("the server writes");
            assert!(read > 0, "the answer ended before {wanted:?}: {seen}");
            seen.push_str(&line);
        }
        seen
    }

    /// Reads the rest after a part was read, chunk sizes and all.
    pub fn finish_chunks(mut self) -> String {
        let mut rest = String::new();
        self.connection.read_to_string(&mut rest).expect("the server writes");
        rest
    }

    /// Reads the rest.
    pub fn finish(mut self) -> Reply {
        let mut raw = Vec::new();
        self.connection.read_to_end(&mut raw).expect("the server writes");
        let is_chunked = self.headers.iter().any(|(name, _)| name == "transfer-encoding");
        let body = if is_chunked { dechunk(&raw) } else { raw };
        let body = String::from_utf8(body).expect("answers are UTF-8");
        Reply { status: self.status, headers: self.headers, body }
    }
}

fn read_head(connection: &mut BufReader<TcpStream>) -> (u16, Vec<(String, String)>) {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        connection.read_line(&mut line).expect("the server answers");
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let status = lines.first().and_then(|line| line.split(' ').nth(1));
    let status = status.and_then(|status| status.parse().ok()).expect("a status line");
    let header = |line: &String| {
        let (name, value) = line.split_once(": ").expect("a header");
        (name.to_ascii_lowercase(), value.to_owned())
    };
    (status, lines[1..].iter().map(header).collect())
}

fn dechunk(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = raw.windows(2).position(|pair| pair == b"\r\n").expect("a chunk size");
        let size = std::str::from_utf8(&raw[..end]).expect("a chunk size");
        let size = usize::from_str_radix(size, 16).expect("a chunk size");
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&raw[end + 2..end + 2 + size]);
        raw = &raw[end + 2 + size + 2..];
    }
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("a JSON body")
    }

    /// The JSON of every event but the last, which must be `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        let data = |event: &str| event.strip_prefix("data: ").map(str::to_owned);
        let mut events: Vec<String> = self.body.split("\n\n").filter_map(data).collect();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{}", self.body);
        events.iter().map(|event| serde_json::from_str(event).expect("a JSON event")).collect()
    }

    /// `param` of an error.
    pub fn error_param(&self) -> Option<String> {
        self.json()["error"]["param"].as_str().map(str::to_owned)
    }

    /// Status, headers and body as text, with what changes from run to run replaced.
    pub fn transcript(&self) -> String {
        let mut text = format!("{}\n", self.status);
        let mut headers = self.headers.clone();
        headers.retain(|(name, value)| {
            let ours = (name.as_str(), value.as_str()) == ("connection", "close");
            SHOWN_HEADERS.contains(&name.as_str()) && !ours
        });
        headers.sort();
        for (name, value) in headers {
            writeln!(text, "{name}: {value}").expect("memory");
        }
        let body = match serde_json::from_str::<Value>(&self.body) {
            Ok(json) => serde_json::to_string_pretty(&json).expect("JSON"),
            Err(_) => self.body.clone(),
        };
        let body = replace_run(&body, "\"created\":", |c| c.is_ascii_digit() || c == ' ');
        let body = replace_run(&body, "chatcmpl-tool-", |c| c.is_ascii_hexdigit());
        let version = concat!("tokenmill-", env!("CARGO_PKG_VERSION"));
        format!("{text}\n{}", body.replace(version, "tokenmill-VERSION"))
    }
}

/// Replaces the characters after each `prefix` for which `belongs` holds.
fn replace_run(text: &str, prefix: &str, belongs: impl Fn(char) -> bool) -> String {
    let mut parts = text.split(prefix);
    let mut replaced = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(&belongs);
        write!(replaced, "{prefix}…{rest}").expect("memory");
    }
    replaced
}
