//! What `POST /v1/chat/completions` answers, whole or in chunks.

use serde::Serialize;
use serde_json::{Map, Value};

use super::SYSTEM_FINGERPRINT;
use super::logprobs::ChatLogprobs;
use super::usage::Usage;
use crate::output::FinishReason;

/// What matched when a `stop` or `stop_token_ids` ended the output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// A text of `stop`.
    Text(String),
    /// A token of `stop_token_ids`.
    Token(u32),
}

impl StopReason {
    /// `None` unless one of the request's own stops matched.
    pub fn of(finish: &FinishReason) -> Option<StopReason> {
        match finish {
            FinishReason::StopString(text) => Some(StopReason::Text(text.clone())),
            FinishReason::StopToken(token_id) => Some(StopReason::Token(*token_id)),
            _ => None,
        }
    }
}

/// A whole answer.
#[derive(Debug, Serialize)]
pub struct ChatCompletion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<ChatChoice>,
    system_fingerprint: &'static str,
    usage: Usage,
    /// See `prompt_logprobs` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<Map<String, Value>>>>,
    /// See `return_token_ids` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

impl<'a> ChatCompletion<'a> {
    /// An answer with these choices.
    pub fn new(
        id: &'a str,
        created: u64,
        model: &'a str,
        choices: Vec<ChatChoice>,
        usage: Usage,
    ) -> ChatCompletion<'a> {
        ChatCompletion {
            id,
            object: "chat.completion",
            created,
            model,
            choices,
            system_fingerprint: SYSTEM_FINGERPRINT,
            usage,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }
}

/// One of the `n` answers.
#[derive(Debug, Serialize)]
pub struct ChatChoice {
    /// Which.
    pub index: u32,
    /// What the model said.
    pub message: ChatMessage,
    /// When asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: &'static str,
    /// Which stop ended it.
    pub stop_reason: Option<StopReason>,
    /// See `return_token_ids` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// A message of the assistant. The unit fields are always null: clients look for the keys.
#[derive(Debug, Serialize)]
pub struct ChatMessage {
    role: &'static str,
    content: Option<String>,
    refusal: (),
    annotations: (),
    audio: (),
    function_call: (),
    reasoning: (),
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
}

impl ChatMessage {
    /// A message; without text beside its calls the content is null.
    pub fn assistant(content: String, tool_calls: Vec<ToolCall>) -> ChatMessage {
        let silent = content.is_empty() && !tool_calls.is_empty();
        ChatMessage {
            role: "assistant",
            content: (!silent).then_some(content),
            refusal: (),
            annotations: (),
            audio: (),
            function_call: (),
            reasoning: (),
            tool_calls,
        }
    }
}

/// A whole tool call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolCall {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: CalledFunction,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct CalledFunction {
    name: String,
    arguments: String,
}

impl ToolCall {
    /// A call without arguments yet.
    pub fn new(id: String, name: String) -> ToolCall {
        ToolCall {
            id,
            kind: "function",
            function: CalledFunction { name, arguments: String::new() },
        }
    }

    /// Appends to the arguments, which are JSON in a string.
    pub fn push_arguments(&mut self, fragment: &str) {
        self.function.arguments.push_str(fragment);
    }
}

/// One event of a streamed answer; fields that are not set are not sent.
#[derive(Debug, Serialize)]
pub struct ChatCompletionChunk<'a> {
    /// Same in every chunk.
    pub id: &'a str,
    /// `chat.completion.chunk`
    pub object: &'static str,
    /// Unix seconds, same in every chunk.
    pub created: u64,
    /// Name of the model.
    pub model: &'a str,
    /// One choice, or none in the chunk that carries the usage.
    pub choices: Vec<ChunkChoice>,
    /// Which build answered.
    pub system_fingerprint: &'static str,
    /// See `stream_options` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// See `return_token_ids` of the request; in the first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// A change of one choice.
#[derive(Debug, Default, Serialize)]
pub struct ChunkChoice {
    /// Which.
    pub index: u32,
    /// What is new.
    pub delta: ChatDelta,
    /// For the tokens behind it.
    pub logprobs: Option<ChatLogprobs>,
    /// Set in the last chunk of the choice.
    pub finish_reason: Option<&'static str>,
    /// Which stop ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    /// See `return_token_ids` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// New parts of a message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChatDelta {
    /// In the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// New text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// New or continued tool calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
}

/// A new tool call, or more of its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ToolCallDelta {
    index: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<String>,
}

impl ToolCallDelta {
    /// The first delta of a call.
    pub fn start(index: u32, id: String, name: String) -> ToolCallDelta {
        let function = FunctionDelta { name: Some(name), arguments: Some(String::new()) };
        ToolCallDelta { index, id: Some(id), kind: Some("function"), function }
    }

    /// A later delta of a call.
    pub fn arguments(index: u32, fragment: String) -> ToolCallDelta {
        let function = FunctionDelta { name: None, arguments: Some(fragment) };
        ToolCallDelta { index, id: None, kind: None, function }
    }
}
