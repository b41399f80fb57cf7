//! A chat completion as one answer.

use axum::Json;
use axum::response::{IntoResponse, Response};
use tokio_stream::StreamExt;

use super::error::ServerError;
use super::outputs::Outputs;
use super::state::unix_now;
use super::tool_calls::{OutputReader, Piece};
use crate::api::chat::ChatAnswer;
use crate::api::chat_response::{ChatChoice, ChatCompletion, ChatMessage, StopReason, ToolCall};
use crate::api::logprobs::{self, ChatLogprobs, LogprobStyle};
use crate::api::options::ReplyOptions;
use crate::api::usage::Usage;
use crate::output::{FinishReason, TextDelta};

/// Waits for all outputs and answers with them.
pub(super) async fn collect(
    mut outputs: Outputs,
    answer: ChatAnswer,
    prompt_token_ids: &[u32],
) -> Result<Response, ServerError> {
    let created = unix_now();
    let mut usage = Usage::default();
    usage.add_prompt(prompt_token_ids.len());
    let mut prompt_entries = Vec::new();
    let mut partials: Vec<Partial> = (0..answer.reply.n).map(|_| Partial::new(&answer)).collect();
    let reply = answer.reply;
    while let Some(item) = outputs.next().await {
        let (_, mut delta) = item?;
        if let Some(prompt) = delta.prompt.take() {
            usage.add_cached(prompt.num_cached_tokens as usize);
            prompt_entries = prompt.logprobs;
        }
        usage.add_completion(delta.token_ids.len());
        partials[delta.index as usize].push(delta, &reply);
    }
    let choices = (0..).zip(partials).map(|(index, partial)| partial.into_choice(index, &reply));
    let choices = choices.collect();
    let mut answer = ChatCompletion::new(&reply.id, created, &reply.model, choices, usage);
    answer.prompt_logprobs =
        reply.prompt_logprobs.map(|top| logprobs::prompt_logprobs(&prompt_entries, top));
    answer.prompt_token_ids = reply.return_token_ids.then(|| prompt_token_ids.to_vec());
    Ok(Json(answer).into_response())
}

/// A message so far.
struct Partial {
    reader: OutputReader,
    content: String,
    calls: Vec<ToolCall>,
    logprobs: ChatLogprobs,
    token_ids: Vec<u32>,
    finish: FinishReason,
}

impl Partial {
    fn new(answer: &ChatAnswer) -> Partial {
        Partial {
            reader: OutputReader::new(answer.tools),
            content: answer.echo.clone().unwrap_or_default(),
            calls: Vec::new(),
            logprobs: ChatLogprobs::default(),
            token_ids: Vec::new(),
            finish: FinishReason::Abort,
        }
    }

    fn push(&mut self, delta: TextDelta, reply: &ReplyOptions) {
        for piece in self.reader.read(delta.text, delta.finish.is_some()) {
            match piece {
                Piece::Text(text) => self.content.push_str(&text),
                Piece::Call { id, name, .. } => self.calls.push(ToolCall::new(id, name)),
                Piece::Arguments { index, text } => {
                    if let Some(call) = self.calls.get_mut(index as usize) {
                        call.push_arguments(&text);
                    }
                }
            }
        }
        if let Some(top) = reply.logprobs {
            let style = LogprobStyle { top, tokens_as_ids: reply.tokens_as_ids };
            self.logprobs.extend(ChatLogprobs::new(&delta.logprobs, style));
        }
        self.token_ids.extend(delta.token_ids);
        if let Some(finish) = delta.finish {
            self.finish = finish;
        }
    }

    fn into_choice(self, index: u32, reply: &ReplyOptions) -> ChatChoice {
        ChatChoice {
            index,
            finish_reason: self.reader.finish_word(&self.finish),
            stop_reason: StopReason::of(&self.finish),
            message: ChatMessage::assistant(self.content, self.calls),
            logprobs: reply.logprobs.is_some().then_some(self.logprobs),
            token_ids: reply.return_token_ids.then_some(self.token_ids),
        }
    }
}
