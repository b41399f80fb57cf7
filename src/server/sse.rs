//! Server-sent events: `data: {json}` per delta, `data: [DONE]` at the end.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_core::Stream;
use serde::Serialize;

use super::observe::Exchange;
use super::outputs::Outputs;
use crate::output::TextDelta;

/// A comment goes out after this much silence, so that proxies keep the connection.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Tells nginx not to collect events into blocks.
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// Turns deltas into events.
pub(super) trait EventWriter: Send + Unpin + 'static {
    /// Something new of the prompt with this index.
    fn delta(&mut self, prompt: usize, delta: TextDelta, outbox: &mut Outbox);
    /// Every continuation has ended.
    fn close(&mut self, outbox: &mut Outbox);
}

/// Events that wait for the connection.
#[derive(Default)]
pub(super) struct Outbox(VecDeque<Event>);

impl Outbox {
    /// Appends an event.
    pub fn send(&mut self, data: &impl Serialize) {
        match Event::default().json_data(data) {
            Ok(event) => self.0.push_back(event),
            Err(error) => tracing::error!(%error, "an event could not be written"),
        }
    }

    fn done(&mut self) {
        self.0.push_back(Event::default().data("[DONE]"));
    }
}

/// An answer as a stream of events.
struct EventStream<W> {
    outputs: Option<Outputs>,
    writer: W,
    outbox: Outbox,
    _exchange: Exchange,
}

impl<W: EventWriter> Stream for EventStream<W> {
    type Item = Result<Event, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let EventStream { outputs, writer, outbox, .. } = self.get_mut();
        loop {
            if let Some(event) = outbox.0.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(open) = outputs else { return Poll::Ready(None) };
            match std::task::ready!(Pin::new(open).poll_next(cx)) {
                Some(Ok((prompt, delta))) => writer.delta(prompt, delta, outbox),
                Some(Err(error)) => {
                    outbox.send(&error.body());
                    outbox.done();
                    *outputs = None;
                }
                None => {
                    writer.close(outbox);
                    outbox.done();
                    *outputs = None;
                }
            }
        }
    }
}

/// The response that streams these outputs.
pub(super) fn respond(outputs: Outputs, writer: impl EventWriter, exchange: Exchange) -> Response {
    let outbox = Outbox::default();
    let stream = EventStream { outputs: Some(outputs), writer, outbox, _exchange: exchange };
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("keep-alive");
    let mut response = Sse::new(stream).keep_alive(keep_alive).into_response();
    response.headers_mut().insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    response
}
