//! Completions as one answer.

use axum::Json;
use axum::response::{IntoResponse, Response};
use tokio_stream::StreamExt;

use super::completions::SubmittedPrompt;
use super::error::ServerError;
use super::outputs::Outputs;
use super::state::unix_now;
use crate::api::chat_response::StopReason;
use crate::api::completion_response::{Completion, CompletionChoice};
use crate::api::logprobs::{self, CompletionLogprobs, LogprobStyle};
use crate::api::options::ReplyOptions;
use crate::api::usage::Usage;
use crate::output::{FinishReason, LogprobEntry, TextDelta};

/// Waits for all outputs and answers with them.
pub(super) async fn collect(
    mut outputs: Outputs,
    reply: ReplyOptions,
    prompts: Vec<SubmittedPrompt>,
) -> Result<Response, ServerError> {
    let created = unix_now();
    let n = reply.n as usize;
    let mut usage = Usage::default();
    prompts.iter().for_each(|prompt| usage.add_prompt(prompt.token_ids.len()));
    let mut prompt_entries = vec![Vec::new(); prompts.len()];
    let mut partials: Vec<Partial> = (0..n * prompts.len()).map(|_| Partial::default()).collect();
    while let Some(item) = outputs.next().await {
        let (prompt, mut delta) = item?;
        if let Some(report) = delta.prompt.take() {
            usage.add_cached(report.num_cached_tokens as usize);
            prompt_entries[prompt] = report.logprobs;
        }
        usage.add_completion(delta.token_ids.len());
        partials[prompt * n + delta.index as usize].push(delta);
    }
    let choice = |(index, partial): (usize, Partial)| {
        let prompt = index / n;
        partial.into_choice(index as u32, &prompts[prompt], &prompt_entries[prompt], &reply)
    };
    let choices = partials.into_iter().enumerate().map(choice).collect();
    let answer = Completion::new(&reply.id, created, &reply.model, choices, Some(usage));
    Ok(Json(answer).into_response())
}

/// A continuation so far.
#[derive(Default)]
struct Partial {
    text: String,
    token_ids: Vec<u32>,
    entries: Vec<LogprobEntry>,
    finish: Option<FinishReason>,
}

impl Partial {
    fn push(&mut self, delta: TextDelta) {
        self.text.push_str(&delta.text);
        self.token_ids.extend(delta.token_ids);
        self.entries.extend(delta.logprobs);
        self.finish = delta.finish.or(self.finish.take());
    }

    fn into_choice(
        self,
        index: u32,
        prompt: &SubmittedPrompt,
        prompt_entries: &[LogprobEntry],
        reply: &ReplyOptions,
    ) -> CompletionChoice {
        let logprobs = reply.logprobs.map(|top| {
            let style = LogprobStyle { top, tokens_as_ids: reply.tokens_as_ids };
            let echoed = if prompt.echo.is_some() { prompt_entries } else { &[] };
            let mut offset = 0;
            let mut logprobs = CompletionLogprobs::new(echoed, style, &mut offset);
            logprobs.extend(CompletionLogprobs::new(&self.entries, style, &mut offset));
            logprobs
        });
        let mut text = prompt.echo.clone().unwrap_or_default();
        text.push_str(&self.text);
        CompletionChoice {
            index,
            text,
            logprobs,
            finish_reason: self.finish.as_ref().map(FinishReason::as_str),
            stop_reason: self.finish.as_ref().and_then(StopReason::of),
            prompt_logprobs: reply
                .prompt_logprobs
                .map(|top| logprobs::prompt_logprobs(prompt_entries, top)),
            prompt_token_ids: reply.return_token_ids.then(|| prompt.token_ids.clone()),
            token_ids: reply.return_token_ids.then_some(self.token_ids),
        }
    }
}
