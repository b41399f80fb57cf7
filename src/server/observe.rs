//! One exchange, seen from outside: its id, its log line, its metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::Instrument;

use super::state::App;
use crate::telemetry::{HttpReport, Metrics};

/// Names a request across services; read from the client or made up, and sent back.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken over from a client.
const MAX_ID_LEN: usize = 128;
/// What is recorded when the client left before there was a status.
const CLIENT_CLOSED: u16 = 499;
/// Probes and scrapes: neither measured nor worth a line at the usual level.
const QUIET: &[&str] = &["/metrics", "/health", "/ready", "/load", "/ping", "/version"];

/// The id of this request.
#[derive(Clone)]
pub(super) struct RequestTag(pub Arc<str>);

/// Counts as load, and is measured, until its last clone is gone: a streamed answer keeps one.
#[derive(Clone)]
pub(super) struct Exchange(#[expect(dead_code, reason = "held for its Drop")] Arc<Open>);

struct Open {
    tag: Arc<str>,
    handler: String,
    method: String,
    status: AtomicU16,
    started: Instant,
    load: Arc<AtomicUsize>,
    metrics: Arc<Metrics>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
        let (handler, method) = (self.handler.as_str(), self.method.as_str());
        let (status, duration) = (self.status.load(Ordering::Relaxed), self.started.elapsed());
        if QUIET.contains(&handler) {
            return;
        }
        let seconds = duration.as_secs_f64();
        tracing::info!(request_id = &*self.tag, method, handler, status, seconds, "answered");
        self.metrics.record_http(HttpReport { handler, method, status, duration });
    }
}

/// Wraps every request.
pub(super) async fn observe(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let tag: Arc<str> = request_tag(request.headers()).into();
    let matched = request.extensions().get::<MatchedPath>();
    app.load.fetch_add(1, Ordering::Relaxed);
    let open = Arc::new(Open {
        tag: Arc::clone(&tag),
        handler: matched.map_or("none", MatchedPath::as_str).to_owned(),
        method: request.method().to_string(),
        status: AtomicU16::new(CLIENT_CLOSED),
        started: Instant::now(),
        load: Arc::clone(&app.load),
        metrics: Arc::clone(app.engine.metrics()),
    });
    request.extensions_mut().insert(RequestTag(Arc::clone(&tag)));
    request.extensions_mut().insert(Exchange(Arc::clone(&open)));
    let span = tracing::info_span!("request", request_id = &*tag);
    let mut response = next.run(request).instrument(span).await;
    open.status.store(response.status().as_u16(), Ordering::Relaxed);
    if let Ok(value) = HeaderValue::from_str(&tag) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

/// The client's id, if it is fit for headers and logs; else a fresh one.
fn request_tag(headers: &HeaderMap) -> String {
    let sent = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let fit = |id: &&str| {
        (1..=MAX_ID_LEN).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    sent.filter(fit).map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tame_ids_are_taken_over() {
        let with = |value: &str| {
            let value = HeaderValue::from_str(value).expect("a header");
            request_tag(&HeaderMap::from_iter([(REQUEST_ID, value)]))
        };
        assert_eq!(with("abc-1"), "abc-1");
        assert_eq!(with("has space").len(), 32);
        assert_eq!(with(&"x".repeat(200)).len(), 32);
        assert_eq!(request_tag(&HeaderMap::new()).len(), 32);
    }
}
