//! A chat completion as events.

use super::sse::{EventWriter, Outbox};
use super::state::unix_now;
use super::tool_calls::OutputReader;
use crate::api::SYSTEM_FINGERPRINT;
use crate::api::chat::ChatAnswer;
use crate::api::chat_response::{ChatCompletionChunk, ChatDelta, ChunkChoice, StopReason};
use crate::api::logprobs::{ChatLogprobs, LogprobStyle};
use crate::api::options::ReplyOptions;
use crate::api::usage::Usage;
use crate::output::TextDelta;

/// Writes the events of one request.
pub(super) struct ChatStream {
    reply: ReplyOptions,
    created: u64,
    usage: Usage,
    echo: Option<String>,
    /// Goes into the first event when asked for.
    prompt_token_ids: Option<Vec<u32>>,
    choices: Vec<Choice>,
}

struct Choice {
    opened: bool,
    reader: OutputReader,
}

impl ChatStream {
    pub fn new(answer: ChatAnswer, prompt_token_ids: &[u32]) -> ChatStream {
        let ChatAnswer { reply, tools, echo } = answer;
        let mut usage = Usage::default();
        usage.add_prompt(prompt_token_ids.len());
        let choice = |_| Choice { opened: false, reader: OutputReader::new(tools) };
        ChatStream {
            created: unix_now(),
            usage,
            echo,
            prompt_token_ids: reply.return_token_ids.then(|| prompt_token_ids.to_vec()),
            choices: (0..reply.n).map(choice).collect(),
            reply,
        }
    }

    fn send(&mut self, choices: Vec<ChunkChoice>, usage: Option<Usage>, outbox: &mut Outbox) {
        outbox.send(&ChatCompletionChunk {
            id: &self.reply.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.reply.model,
            choices,
            system_fingerprint: SYSTEM_FINGERPRINT,
            usage,
            prompt_token_ids: self.prompt_token_ids.take(),
        });
    }

    fn send_choice(&mut self, choice: ChunkChoice, outbox: &mut Outbox) {
        let usage = self.reply.continuous_usage.then_some(self.usage);
        self.send(vec![choice], usage, outbox);
    }

    /// The role comes first, then the message that the model continues.
    fn open(&mut self, index: u32, outbox: &mut Outbox) {
        let choice = &mut self.choices[index as usize];
        if std::mem::replace(&mut choice.opened, true) {
            return;
        }
        let content = |text| ChatDelta { content: Some(text), ..ChatDelta::default() };
        let delta = ChatDelta { role: Some("assistant"), ..content(String::new()) };
        self.send_choice(ChunkChoice { index, delta, ..ChunkChoice::default() }, outbox);
        if let Some(echo) = self.echo.clone() {
            let delta = content(echo);
            self.send_choice(ChunkChoice { index, delta, ..ChunkChoice::default() }, outbox);
        }
    }

    /// What belongs to the tokens of a delta: it goes out with the first chunk made of it.
    fn token_part(&self, delta: &TextDelta) -> ChunkChoice {
        let style = self
            .reply
            .logprobs
            .map(|top| LogprobStyle { top, tokens_as_ids: self.reply.tokens_as_ids });
        let logprobs = style.filter(|_| !delta.logprobs.is_empty());
        let token_ids = self.reply.return_token_ids && !delta.token_ids.is_empty();
        ChunkChoice {
            index: delta.index,
            logprobs: logprobs.map(|style| ChatLogprobs::new(&delta.logprobs, style)),
            token_ids: token_ids.then(|| delta.token_ids.clone()),
            ..ChunkChoice::default()
        }
    }
}

impl EventWriter for ChatStream {
    fn delta(&mut self, _prompt: usize, mut delta: TextDelta, outbox: &mut Outbox) {
        if let Some(prompt) = delta.prompt.take() {
            self.usage.add_cached(prompt.num_cached_tokens as usize);
        }
        self.open(delta.index, outbox);
        self.usage.add_completion(delta.token_ids.len());
        let first = self.token_part(&delta);
        let has_token_part = first.logprobs.is_some() || first.token_ids.is_some();
        let reader = &mut self.choices[delta.index as usize].reader;
        let pieces = reader.read(std::mem::take(&mut delta.text), delta.finish.is_some());
        let finish_word = delta.finish.as_ref().map(|finish| reader.finish_word(finish));
        let mut deltas: Vec<ChatDelta> = pieces.into_iter().map(ChatDelta::from).collect();
        if deltas.is_empty() && (has_token_part || finish_word.is_some()) {
            deltas.push(ChatDelta::default());
        }
        let last = deltas.len().saturating_sub(1);
        let mut first = Some(first);
        for (i, part) in deltas.into_iter().enumerate() {
            let index = delta.index;
            let mut choice =
                first.take().unwrap_or(ChunkChoice { index, ..ChunkChoice::default() });
            choice.delta = part;
            if i == last {
                choice.finish_reason = finish_word;
                choice.stop_reason = delta.finish.as_ref().and_then(StopReason::of);
            }
            self.send_choice(choice, outbox);
        }
    }

    fn close(&mut self, outbox: &mut Outbox) {
        if self.reply.include_usage {
            self.send(Vec::new(), Some(self.usage), outbox);
        }
    }
}
