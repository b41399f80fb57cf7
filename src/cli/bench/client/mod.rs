//! A client for streamed answers over plain HTTP/1.1: one connection per request.
//!
//! Written by hand because it must not cost what it measures: no pool, no retries, no TLS. A
//! connection is opened inside the measured time, as a new client's would be.

mod body;
mod sse;
mod url;

use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::TcpStream;

use body::Body;
use sse::EventParser;
pub(super) use url::BaseUrl;

/// Longest head of an answer.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Most bytes that are read at once.
const READ_BYTES: usize = 16 << 10;
/// Bytes of a refusal that are worth showing.
const SHOWN_BYTES: usize = 400;

/// A request that came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    /// The server cannot be reached, or hung up.
    #[error("{action} {authority}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The server.
        authority: String,
        /// The system's words.
        source: io::Error,
    },
    /// Not HTTP/1.1 as it should be.
    #[error("the server's answer is not HTTP/1.1: {0}")]
    Malformed(String),
    /// The server refused.
    #[error("the server answered {status}: {body}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The beginning of its explanation.
        body: String,
    },
    /// No answer, or no end of it, in time.
    #[error("no end of the answer after {} s; raise --timeout if the server is that slow", .0.as_secs())]
    TimedOut(Duration),
    /// The connection ended first.
    #[error("the connection ended before the answer did")]
    Closed,
}

/// An answer whose events are still coming.
pub(super) struct EventStream {
    connection: Connection,
    body: Body,
    events: EventParser,
}

impl EventStream {
    /// Sends `body` to `path` and reads the head of the answer.
    pub async fn post(
        url: &BaseUrl,
        path: &str,
        api_key: Option<&str>,
        body: &Value,
    ) -> Result<EventStream, ClientError> {
        let mut connection = Connection::open(url).await?;
        connection.write_all(request(url, path, api_key, body).as_bytes()).await?;
        let head = connection.read_head().await?;
        let mut stream =
            EventStream { connection, body: head.body()?, events: EventParser::default() };
        if head.status != 200 {
            let body = stream.read_text().await?;
            return Err(ClientError::Refused { status: head.status, body });
        }
        Ok(stream)
    }

    /// The data of the events that came next, at least one; empty when the answer has ended.
    pub async fn next(&mut self) -> Result<Vec<String>, ClientError> {
        loop {
            let payload = self.body.push(&self.connection.unread)?;
            self.connection.unread.clear();
            let events = self.events.push(&payload);
            if !events.is_empty() || self.body.has_ended() {
                return Ok(events);
            }
            if self.connection.read().await? == 0 {
                return if self.body.may_end_here() {
                    Ok(Vec::new())
                } else {
                    Err(ClientError::Closed)
                };
            }
        }
    }

    /// The beginning of the body as text.
    async fn read_text(&mut self) -> Result<String, ClientError> {
        let mut text = Vec::new();
        while text.len() < SHOWN_BYTES {
            text.extend(self.body.push(&self.connection.unread)?);
            self.connection.unread.clear();
            if self.body.has_ended() || self.connection.read().await? == 0 {
                break;
            }
        }
        text.truncate(SHOWN_BYTES);
        Ok(String::from_utf8_lossy(&text).trim().to_owned())
    }
}

fn request(url: &BaseUrl, path: &str, api_key: Option<&str>, body: &Value) -> String {
    let (authority, prefix, body) = (&url.authority, &url.path, body.to_string());
    let key = api_key.map(|key| format!("Authorization: Bearer {key}\r\n")).unwrap_or_default();
    format!(
        "POST {prefix}{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n\
         Content-Type: application/json\r\nAccept: text/event-stream\r\n{key}\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// The head of an answer.
struct Head {
    status: u16,
    headers: Vec<(String, String)>,
}

impl Head {
    /// Parses the bytes before the empty line.
    fn parse(text: &str) -> Result<Head, ClientError> {
        let malformed = || ClientError::Malformed(format!("it begins with {text:.60?}"));
        let mut lines = text.split("\r\n");
        let mut status_line = lines.next().unwrap_or_default().split(' ');
        let version = status_line.next().unwrap_or_default();
        let status = status_line.next().and_then(|status| status.parse().ok());
        let status = status.filter(|_| version.starts_with("HTTP/1.")).ok_or_else(malformed)?;
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        Ok(Head { status, headers: lines.filter_map(header).collect() })
    }

    /// How the body's end is known.
    fn body(&self) -> Result<Body, ClientError> {
        let header = |name: &str| {
            self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
        };
        if header("transfer-encoding").is_some_and(|coding| coding.contains("chunked")) {
            return Ok(Body::chunked());
        }
        match header("content-length") {
            None => Ok(Body::until_close()),
            Some(text) => {
                let wrong = || ClientError::Malformed(format!("content-length is {text:?}"));
                Ok(Body::of_length(text.parse().map_err(|_| wrong())?))
            }
        }
    }
}

/// A socket and what came from it but was not yet looked at.
struct Connection {
    stream: TcpStream,
    authority: String,
    buffer: Box<[u8; READ_BYTES]>,
    unread: Vec<u8>,
}

impl Connection {
    async fn open(url: &BaseUrl) -> Result<Connection, ClientError> {
        let authority = url.authority.clone();
        let opened = TcpStream::connect((url.host.as_str(), url.port)).await;
        let stream = opened.and_then(|stream| stream.set_nodelay(true).map(|()| stream));
        match stream {
            Ok(stream) => {
                let buffer = Box::new([0; READ_BYTES]);
                Ok(Connection { stream, authority, buffer, unread: Vec::new() })
            }
            Err(source) => Err(ClientError::Io { action: "cannot connect to", authority, source }),
        }
    }

    fn failed(&self, action: &'static str, source: io::Error) -> ClientError {
        ClientError::Io { action, authority: self.authority.clone(), source }
    }

    async fn write_all(&self, mut bytes: &[u8]) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            let ready = self.stream.writable().await;
            match ready.and_then(|()| self.stream.try_write(bytes)) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(self.failed("cannot send to", error)),
            }
        }
        Ok(())
    }

    /// Waits for more bytes; 0 when there will be none.
    async fn read(&mut self) -> Result<usize, ClientError> {
        let Connection { stream, buffer, unread, .. } = self;
        // After a short read the socket is known to be empty, which spares asking it again.
        let outcome = std::future::poll_fn(|cx| {
            let mut bytes = ReadBuf::new(&mut buffer[..]);
            ready!(Pin::new(&mut *stream).poll_read(cx, &mut bytes))?;
            unread.extend_from_slice(bytes.filled());
            Poll::Ready(Ok(bytes.filled().len()))
        });
        outcome.await.map_err(|error| self.failed("cannot read from", error))
    }

    async fn read_head(&mut self) -> Result<Head, ClientError> {
        loop {
            if let Some(end) = self.unread.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
                let head = Head::parse(&String::from_utf8_lossy(&self.unread[..end]))?;
                self.unread.drain(..end + 4);
                return Ok(head);
            }
            if self.unread.len() > MAX_HEAD_BYTES {
                return Err(ClientError::Malformed("its head never ends".to_owned()));
            }
            if self.read().await? == 0 {
                return Err(ClientError::Closed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_request_names_host_key_and_length() {
        let url: BaseUrl = "http://box:8000/api/".parse().unwrap();
        let request = request(&url, "/v1/completions", Some("secret"), &json!({"a": 1}));
        let (head, body) = request.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("POST /api/v1/completions HTTP/1.1\r\nHost: box:8000\r\n"));
        assert!(head.contains("Authorization: Bearer secret\r\n"), "{head}");
        assert!(head.ends_with("Content-Length: 7"), "{head}");
        assert_eq!(body, r#"{"a":1}"#);
    }

    #[test]
    fn a_head_gives_status_and_headers_in_any_case() {
        let head =
            Head::parse("HTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-LENGTH:  12").unwrap();
        assert_eq!(head.status, 503);
        assert_eq!(head.headers[1], ("content-length".to_owned(), "12".to_owned()));
        assert!(Head::parse("SSH-2.0-OpenSSH").is_err());
        assert!(Head::parse("HTTP/1.1 OK").is_err());
    }
}
