//! What `POST /v1/completions` answers, whole or in chunks.

use serde::Serialize;
use serde_json::{Map, Value};

use super::SYSTEM_FINGERPRINT;
use super::chat_response::StopReason;
use super::logprobs::CompletionLogprobs;
use super::usage::Usage;

/// A whole answer or one event of a streamed one: both have the same shape.
#[derive(Debug, Serialize)]
pub struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<CompletionChoice>,
    system_fingerprint: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

impl<'a> Completion<'a> {
    /// An answer or event with these choices.
    pub fn new(
        id: &'a str,
        created: u64,
        model: &'a str,
        choices: Vec<CompletionChoice>,
        usage: Option<Usage>,
    ) -> Completion<'a> {
        Completion {
            id,
            object: "text_completion",
            created,
            model,
            choices,
            system_fingerprint: SYSTEM_FINGERPRINT,
            usage,
        }
    }
}

/// One continuation of one prompt, or what is new in it.
#[derive(Debug, Default, Serialize)]
pub struct CompletionChoice {
    /// Continuation number plus prompt number times `n`.
    pub index: u32,
    /// The text.
    pub text: String,
    /// When asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Why it ended; null in all but the last event of a choice.
    pub finish_reason: Option<&'static str>,
    /// Which stop ended it.
    pub stop_reason: Option<StopReason>,
    /// See `prompt_logprobs` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Option<Map<String, Value>>>>,
    /// See `return_token_ids` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// See `return_token_ids` of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}
