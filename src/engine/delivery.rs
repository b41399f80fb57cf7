//! From the engine thread to the streams: what a step yielded is handed over in one piece.
//!
//! To wake a task from outside its runtime is often a system call, and the thread that wakes may
//! take the very core that the engine thread is on. Woken one by one, sixteen streams let the
//! engine thread wait sixteen times between two steps. So it wakes one task, the courier, which
//! is inside the runtime and wakes the streams there.

use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::output::TokenEvent;

/// Events with the streams that they are for, in the order in which they came to be.
pub(super) type Handover = Vec<(mpsc::Sender<TokenEvent>, TokenEvent)>;

/// The engine thread's way to all streams.
pub(super) struct Courier {
    // Not bounded by itself: a request yields no more events than its stream has room for.
    handovers: mpsc::UnboundedSender<Handover>,
}

impl Courier {
    /// Starts the task that delivers; it ends with the courier, when all is delivered.
    pub fn start(runtime: &Handle) -> Courier {
        let (handovers, receiver) = mpsc::unbounded_channel();
        runtime.spawn(deliver(receiver));
        Courier { handovers }
    }

    /// Delivers these events after all earlier ones. Never waits.
    pub fn send(&self, handover: Handover) {
        if !handover.is_empty() {
            // A failed send means that the runtime is gone, and every client with it.
            let _ = self.handovers.send(handover);
        }
    }
}

async fn deliver(mut handovers: mpsc::UnboundedReceiver<Handover>) {
    while let Some(handover) = handovers.recv().await {
        for (stream, event) in handover {
            // The stream has room for everything the request may yield; a failed send means that
            // the client is gone, and its Abort is on the way.
            let _ = stream.try_send(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::RequestId;

    fn event(index: u32) -> TokenEvent {
        let request_id = RequestId("a".into());
        TokenEvent { request_id, index, tokens: Vec::new(), finish: None, prompt: None }
    }

    #[tokio::test]
    async fn events_come_in_order_past_clients_that_are_gone_or_never_read() {
        let courier = Courier::start(&Handle::current());
        let (stream, mut events) = mpsc::channel(4);
        let (gone, _) = mpsc::channel(1);
        let (full, _unread) = mpsc::channel(1);
        for step in 0..4 {
            let others = [(gone.clone(), event(0)), (full.clone(), event(0))];
            courier.send(others.into_iter().chain([(stream.clone(), event(step))]).collect());
        }
        drop((courier, stream));
        for step in 0..4 {
            assert_eq!(events.recv().await.map(|event| event.index), Some(step));
        }
        assert!(events.recv().await.is_none(), "all is delivered before the courier ends");
    }
}
