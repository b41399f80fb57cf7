//! The way out: token events become text, stop strings are found, the client gets deltas.
//!
//! Runs on the task of whoever polls the [`Generation`], so that decoding text never takes
//! time from the engine thread.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use crossbeam_channel::Sender;
use futures_core::Stream;
use tokio::sync::mpsc;

use super::step::Command;
use crate::output::{
    FinishReason, LogprobEntry, PromptReport, PromptText, SampledToken, TextDelta, TokenEvent,
    TokenLogprobs,
};
use crate::request::{OutputOptions, RequestId, TokenizedRequest};
use crate::text::{Detokenizer, StopMatcher, TextPipeline};

/// Tokens of the prompt that the detokenizer sees, so that the first output token joins it well.
const PROMPT_TAIL: usize = 8;

/// The output of one request. Dropping it ends the request.
pub struct Generation {
    /// Names the request.
    pub id: RequestId,
    /// The prompt as the model sees it.
    pub prompt_token_ids: Arc<[u32]>,
    choices: Vec<Choice>,
    num_open: usize,
    text: Arc<TextPipeline>,
    events: mpsc::Receiver<TokenEvent>,
    commands: Sender<Command>,
}

/// One continuation on its way to text.
struct Choice {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    include_stop: bool,
    /// Tokens that must come before a stop string counts.
    min_tokens: u32,
    num_tokens: u32,
    open: bool,
}

impl Generation {
    pub(super) fn new(
        request: &TokenizedRequest,
        output: &OutputOptions,
        text: Arc<TextPipeline>,
        commands: Sender<Command>,
        events: mpsc::Receiver<TokenEvent>,
    ) -> Generation {
        let prompt = &request.prompt_token_ids;
        let tail = &prompt[prompt.len().saturating_sub(PROMPT_TAIL)..];
        let include_stop = output.include_stop_str_in_output;
        let choice = || Choice {
            detokenizer: Detokenizer::new(
                text.tokenizer().clone(),
                tail,
                output.skip_special_tokens,
            ),
            matcher: StopMatcher::new(&request.stop.stop, include_stop),
            include_stop,
            min_tokens: request.stop.min_tokens,
            num_tokens: 0,
            open: true,
        };
        Generation {
            id: request.id.clone(),
            prompt_token_ids: prompt.as_slice().into(),
            choices: (0..request.n).map(|_| choice()).collect(),
            num_open: request.n as usize,
            text,
            events,
            commands,
        }
    }

    /// Waits for the next delta; `None` after the last one.
    pub async fn next(&mut self) -> Option<TextDelta> {
        std::future::poll_fn(|cx| Pin::new(&mut *self).poll_next(cx)).await
    }

    fn delta(&mut self, event: TokenEvent) -> TextDelta {
        let choice = &mut self.choices[event.index as usize];
        let mut delta = TextDelta { index: event.index, ..TextDelta::default() };
        delta.prompt =
            event.prompt.map(|report| prompt_text(&self.text, &self.prompt_token_ids, report));
        let hides_last = hides_last_token(event.finish.as_ref()) && !choice.include_stop;
        let num_visible = event.tokens.len() - usize::from(hides_last);
        for (i, token) in event.tokens.into_iter().enumerate() {
            delta.token_ids.push(token.token_id);
            let stopped = (i < num_visible).then(|| choice.push(token.token_id, &mut delta.text));
            if let Some(entry) = logprob_entry(&self.text, token) {
                delta.logprobs.push(entry);
            }
            if let Some(Some(stop)) = stopped {
                delta.finish = Some(FinishReason::StopString(stop));
                break;
            }
        }
        if delta.finish.is_none() && event.finish.is_some() {
            delta.finish = choice.finish(event.finish, &mut delta.text);
        }
        if delta.finish.is_some() {
            choice.open = false;
            self.num_open -= 1;
        }
        delta
    }
}

impl Choice {
    /// Adds the text that `token_id` completes; returns the stop string that it completes.
    fn push(&mut self, token_id: u32, text: &mut String) -> Option<String> {
        let piece = self.detokenizer.push(token_id);
        self.num_tokens += 1;
        if self.num_tokens <= self.min_tokens {
            text.push_str(&piece);
            return None;
        }
        self.release(&piece, text)
    }

    fn release(&mut self, piece: &str, text: &mut String) -> Option<String> {
        let released = self.matcher.push(piece);
        text.push_str(&released.text);
        released.matched
    }

    /// Flushes held-back text; a stop string may still be completed by it.
    fn finish(&mut self, reason: Option<FinishReason>, text: &mut String) -> Option<FinishReason> {
        let rest = self.detokenizer.finish();
        if let Some(stop) = self.release(&rest, text) {
            return Some(FinishReason::StopString(stop));
        }
        text.push_str(&self.matcher.finish());
        reason
    }
}

impl Stream for Generation {
    type Item = TextDelta;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<TextDelta>> {
        while self.num_open > 0 {
            let Some(event) = ready!(self.events.poll_recv(cx)) else {
                return Poll::Ready(None);
            };
            let index = event.index;
            if !self.choices[index as usize].open {
                continue; // computed before the engine learned of the stop string
            }
            let engine_knows = event.finish.is_some();
            let delta = self.delta(event);
            if delta.finish.is_some() && !engine_knows {
                let id = self.id.clone();
                let _ = self.commands.send(Command::Abort { id, index: Some(index) });
            }
            return Poll::Ready(Some(delta));
        }
        Poll::Ready(None)
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if self.num_open > 0 {
            let _ = self.commands.send(Command::Abort { id: self.id.clone(), index: None });
        }
    }
}

/// End tokens are reported but not shown.
fn hides_last_token(finish: Option<&FinishReason>) -> bool {
    matches!(finish, Some(FinishReason::EndOfText | FinishReason::StopToken(_)))
}

fn entry(text: &TextPipeline, token_id: u32, logprobs: Option<TokenLogprobs>) -> LogprobEntry {
    let logprob = logprobs.as_ref().map(|l| l.logprob);
    let top = logprobs.map(|l| l.top).unwrap_or_default();
    LogprobEntry {
        token: text.tokenizer().token_text(token_id),
        logprob,
        top: top
            .into_iter()
            .map(|(id, logprob)| (text.tokenizer().token_text(id), logprob))
            .collect(),
    }
}

fn logprob_entry(text: &TextPipeline, token: SampledToken) -> Option<LogprobEntry> {
    token.logprobs.map(|logprobs| entry(text, token.token_id, Some(logprobs)))
}

fn prompt_text(text: &TextPipeline, prompt: &[u32], report: PromptReport) -> PromptText {
    let logprobs = report.logprobs.into_iter().zip(prompt);
    PromptText {
        num_cached_tokens: report.num_cached_tokens,
        logprobs: logprobs.map(|(logprobs, &id)| entry(text, id, logprobs)).collect(),
    }
}
