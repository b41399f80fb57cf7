//! Completions as events.

use super::completions::SubmittedPrompt;
use super::sse::{EventWriter, Outbox};
use super::state::unix_now;
use crate::api::chat_response::StopReason;
use crate::api::completion_response::{Completion, CompletionChoice};
use crate::api::logprobs::{CompletionLogprobs, LogprobStyle};
use crate::api::options::ReplyOptions;
use crate::api::usage::Usage;
use crate::output::{FinishReason, LogprobEntry, TextDelta};

/// Writes the events of one request.
pub(super) struct CompletionStream {
    reply: ReplyOptions,
    created: u64,
    usage: Usage,
    prompts: Vec<PromptPart>,
    choices: Vec<Choice>,
}

/// What the first event of each continuation says about its prompt.
struct PromptPart {
    submitted: SubmittedPrompt,
    entries: Vec<LogprobEntry>,
}

#[derive(Clone, Default)]
struct Choice {
    opened: bool,
    /// Characters so far, for `text_offset`.
    offset: usize,
}

impl CompletionStream {
    pub fn new(reply: ReplyOptions, prompts: Vec<SubmittedPrompt>) -> CompletionStream {
        let mut usage = Usage::default();
        prompts.iter().for_each(|prompt| usage.add_prompt(prompt.token_ids.len()));
        let num_choices = prompts.len() * reply.n as usize;
        let part = |submitted| PromptPart { submitted, entries: Vec::new() };
        CompletionStream {
            reply,
            created: unix_now(),
            usage,
            prompts: prompts.into_iter().map(part).collect(),
            choices: vec![Choice::default(); num_choices],
        }
    }

    fn send(&self, choices: Vec<CompletionChoice>, usage: Option<Usage>, outbox: &mut Outbox) {
        let ReplyOptions { id, model, .. } = &self.reply;
        outbox.send(&Completion::new(id, self.created, model, choices, usage));
    }

    fn send_choice(&self, choice: CompletionChoice, outbox: &mut Outbox) {
        let usage = self.reply.continuous_usage.then_some(self.usage);
        self.send(vec![choice], usage, outbox);
    }

    /// What a continuation begins with: the prompt, as far as it was asked for.
    fn open(&mut self, prompt: usize, index: u32, outbox: &mut Outbox) {
        if std::mem::replace(&mut self.choices[index as usize].opened, true) {
            return;
        }
        let PromptPart { submitted, entries } = &self.prompts[prompt];
        let token_ids = self.reply.return_token_ids.then(|| submitted.token_ids.clone());
        if submitted.echo.is_none() && token_ids.is_none() {
            return;
        }
        let echoes = submitted.echo.is_some();
        let offset = &mut self.choices[index as usize].offset;
        let style = self.reply.logprobs.filter(|_| echoes && !entries.is_empty());
        let logprobs = style.map(|top| {
            let style = LogprobStyle { top, tokens_as_ids: self.reply.tokens_as_ids };
            CompletionLogprobs::new(entries, style, offset)
        });
        let choice = CompletionChoice {
            index,
            text: submitted.echo.clone().unwrap_or_default(),
            logprobs,
            prompt_token_ids: token_ids,
            ..CompletionChoice::default()
        };
        self.send_choice(choice, outbox);
    }
}

impl EventWriter for CompletionStream {
    fn delta(&mut self, prompt: usize, mut delta: TextDelta, outbox: &mut Outbox) {
        if let Some(report) = delta.prompt.take() {
            self.usage.add_cached(report.num_cached_tokens as usize);
            self.prompts[prompt].entries = report.logprobs;
        }
        let index = delta.index + prompt as u32 * self.reply.n;
        self.open(prompt, index, outbox);
        self.usage.add_completion(delta.token_ids.len());
        let has_logprobs = self.reply.logprobs.is_some() && !delta.logprobs.is_empty();
        let has_ids = self.reply.return_token_ids && !delta.token_ids.is_empty();
        if delta.text.is_empty() && delta.finish.is_none() && !has_logprobs && !has_ids {
            return;
        }
        let offset = &mut self.choices[index as usize].offset;
        let logprobs = self.reply.logprobs.filter(|_| has_logprobs).map(|top| {
            let style = LogprobStyle { top, tokens_as_ids: self.reply.tokens_as_ids };
            CompletionLogprobs::new(&delta.logprobs, style, offset)
        });
        let choice = CompletionChoice {
            index,
            text: delta.text,
            logprobs,
            finish_reason: delta.finish.as_ref().map(FinishReason::as_str),
            stop_reason: delta.finish.as_ref().and_then(StopReason::of),
            token_ids: has_ids.then_some(delta.token_ids),
            ..CompletionChoice::default()
        };
        self.send_choice(choice, outbox);
    }

    fn close(&mut self, outbox: &mut Outbox) {
        if self.reply.include_usage {
            self.send(Vec::new(), Some(self.usage), outbox);
        }
    }
}
