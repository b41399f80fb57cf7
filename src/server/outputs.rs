//! The outputs of all prompts of one HTTP request, merged as they come.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;

use crate::api::{ApiError, ErrorKind};
use crate::engine::Generation;
use crate::output::{FinishReason, TextDelta};

/// Yields `(prompt index, delta)`; ends when every continuation of every prompt has ended.
pub(super) struct Outputs {
    open: Vec<Open>,
    /// Where the next round begins, so that no prompt starves the others.
    turn: usize,
}

struct Open {
    prompt: usize,
    generation: Generation,
    num_unfinished: u32,
}

impl Outputs {
    /// Merges one generation per prompt, each of `n` continuations.
    pub fn new(generations: Vec<Generation>, n: u32) -> Outputs {
        let open = |(prompt, generation)| Open { prompt, generation, num_unfinished: n };
        Outputs { open: generations.into_iter().enumerate().map(open).collect(), turn: 0 }
    }

    fn poll_one(
        &mut self,
        i: usize,
        cx: &mut Context<'_>,
    ) -> Poll<Result<(usize, TextDelta), ApiError>> {
        let open = &mut self.open[i];
        let Some(delta) = std::task::ready!(Pin::new(&mut open.generation).poll_next(cx)) else {
            return Poll::Ready(Err(failed("the engine stopped before the output was complete")));
        };
        if let Some(FinishReason::Error(reason)) = &delta.finish {
            return Poll::Ready(Err(failed(reason)));
        }
        let prompt = open.prompt;
        open.num_unfinished -= u32::from(delta.finish.is_some());
        if open.num_unfinished == 0 {
            self.open.swap_remove(i);
        } else {
            self.turn = i + 1;
        }
        Poll::Ready(Ok((prompt, delta)))
    }
}

/// The engine's own words go to the log, not to the client.
fn failed(reason: &str) -> ApiError {
    tracing::error!(reason, "generation failed");
    ApiError::new(ErrorKind::Internal, "The engine failed while it generated the output.")
}

impl Stream for Outputs {
    type Item = Result<(usize, TextDelta), ApiError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let outputs = self.get_mut();
        let num_open = outputs.open.len();
        if num_open == 0 {
            return Poll::Ready(None);
        }
        for step in 0..num_open {
            let i = (outputs.turn + step) % num_open;
            if let Poll::Ready(item) = outputs.poll_one(i, cx) {
                if item.is_err() {
                    outputs.open.clear();
                }
                return Poll::Ready(Some(item));
            }
        }
        Poll::Pending
    }
}
