//! Server-sent events: `data: {json}` per delta, `data: [DONE]` at the end.
//!
//! Events are written straight into the bytes that the connection takes. What is there when the
//! connection asks leaves together, so that a step that tells a client several things costs one
//! write; nothing waits for what is not there yet.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use super::observe::Exchange;
use super::outputs::Outputs;
use crate::output::TextDelta;

/// A comment goes out after this much silence, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// That comment.
const COMMENT: &[u8] = b": keep-alive\n\n";
/// Where a write ends although there is more: a client that reads slowly must not make the
/// server turn all of its tokens into text beforehand.
const FULL_BYTES: usize = 16 << 10;
/// Tells nginx not to collect events into blocks.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Turns deltas into events.
pub(super) trait EventWriter: Send + Unpin + 'static {
    /// Something new of the prompt with this index.
    fn delta(&mut self, prompt: usize, delta: TextDelta, outbox: &mut Outbox);
    /// Every continuation has ended.
    fn close(&mut self, outbox: &mut Outbox);
}

/// Events that wait for the connection, as they go over it.
#[derive(Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
    /// Size of the last write: the next one is likely to be as large.
    last_len: usize,
}

impl Outbox {
    /// Appends an event.
    pub fn send(&mut self, data: &impl Serialize) {
        if self.bytes.capacity() == 0 {
            self.bytes.reserve_exact(self.last_len + self.last_len / 8);
        }
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(b"data: ");
        // Compact JSON has no line break, so one `data` field holds all of it.
        match serde_json::to_writer(&mut self.bytes, data) {
            Ok(()) => self.bytes.extend_from_slice(b"\n\n"),
            Err(error) => {
                self.bytes.truncate(begin);
                tracing::error!(%error, "an event could not be written");
            }
        }
    }

    fn done(&mut self) {
        self.bytes.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// All that waits; `None` when nothing does.
    fn take(&mut self) -> Option<Bytes> {
        self.last_len = self.bytes.len();
        (self.last_len > 0).then(|| std::mem::take(&mut self.bytes).into())
    }
}

/// An answer as a stream of writes.
struct EventStream<W> {
    outputs: Option<Outputs>,
    writer: W,
    outbox: Outbox,
    silence: Silence,
    _exchange: Exchange,
}

impl<W: EventWriter> EventStream<W> {
    /// Writes the events of everything that has come so far.
    fn poll_outputs(&mut self, cx: &mut Context<'_>) {
        let EventStream { outputs, writer, outbox, .. } = self;
        while let Some(open) = outputs
            && outbox.bytes.len() < FULL_BYTES
        {
            let Poll::Ready(next) = Pin::new(open).poll_next(cx) else { return };
            match next {
                Some(Ok((prompt, delta))) => {
                    writer.delta(prompt, delta, outbox);
                    continue;
                }
                Some(Err(error)) => outbox.send(&error.body()),
                None => writer.close(outbox),
            }
            outbox.done();
            *outputs = None;
        }
    }
}

impl<W: EventWriter> Stream for EventStream<W> {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        this.poll_outputs(cx);
        if let Some(bytes) = this.outbox.take() {
            this.silence.broken(Instant::now());
            return Poll::Ready(Some(Ok(bytes)));
        }
        if this.outputs.is_none() {
            return Poll::Ready(None);
        }
        ready!(this.silence.poll_too_long(cx));
        Poll::Ready(Some(Ok(Bytes::from_static(COMMENT))))
    }
}

/// How long nothing was sent. The timer is only set anew when it rings, not with every event.
struct Silence {
    since: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Silence {
    fn begin() -> Silence {
        let since = Instant::now();
        Silence { since, timer: Box::pin(tokio::time::sleep_until(since + KEEP_ALIVE)) }
    }

    /// Something was sent.
    fn broken(&mut self, now: Instant) {
        self.since = now;
    }

    /// Ready each time that the silence has become too long.
    fn poll_too_long(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let now = Instant::now();
            let is_too_long = now >= self.since + KEEP_ALIVE;
            if is_too_long {
                self.since = now;
            }
            self.timer.as_mut().reset(self.since + KEEP_ALIVE);
            if is_too_long {
                return Poll::Ready(());
            }
        }
    }
}

/// The response that streams these outputs.
pub(super) fn respond(outputs: Outputs, writer: impl EventWriter, exchange: Exchange) -> Response {
    let stream = EventStream {
        outputs: Some(outputs),
        writer,
        outbox: Outbox::default(),
        silence: Silence::begin(),
        _exchange: exchange,
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (ACCEL_BUFFERING, HeaderValue::from_static("no")),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn events_that_wait_leave_in_one_write() {
        let mut outbox = Outbox::default();
        assert!(outbox.take().is_none());
        outbox.send(&serde_json::json!({"text": "a\n\nb"}));
        outbox.send(&serde_json::json!({"text": "c"}));
        outbox.done();
        let sent = outbox.take().expect("three events");
        let expected =
            "data: {\"text\":\"a\\n\\nb\"}\n\ndata: {\"text\":\"c\"}\n\ndata: [DONE]\n\n";
        assert_eq!(sent, expected);
        assert!(outbox.take().is_none());
    }

    #[tokio::test]
    async fn a_silence_counts_from_what_was_sent_last() {
        let mut cx = Context::from_waker(Waker::noop());
        let long_ago = Instant::now().checked_sub(KEEP_ALIVE * 2).expect("a clock that runs");
        let rung = || Box::pin(tokio::time::sleep_until(long_ago));
        let mut silence = Silence { since: long_ago, timer: rung() };
        assert!(silence.poll_too_long(&mut cx).is_ready());
        assert!(silence.poll_too_long(&mut cx).is_pending(), "the comment broke the silence");
        let mut silence = Silence { since: long_ago, timer: rung() };
        silence.broken(Instant::now());
        assert!(silence.poll_too_long(&mut cx).is_pending());
    }
}
