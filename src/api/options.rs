//! The options that both generating endpoints share, as sent, and what they mean for the answer.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::error::ApiError;
use super::fields::Fields;

/// One string, or several.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub enum OneOrMany {
    /// `"a"`
    One(String),
    /// `["a", "b"]`
    Many(Vec<String>),
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct StreamOptions {
    /// Send one more chunk with the usage at the end.
    #[serde(default)]
    pub include_usage: Option<bool>,
    /// With `include_usage`: carry the running usage in every chunk.
    #[serde(default)]
    pub continuous_usage_stats: Option<bool>,
}

/// Shared options as sent; nothing is checked but the types.
#[derive(Clone, Debug, Default)]
pub struct GenerationFields {
    /// Name of the model.
    pub model: Option<String>,
    /// Sampling temperature.
    pub temperature: Option<f64>,
    /// Nucleus mass.
    pub top_p: Option<f64>,
    /// Number of candidates; 0 and -1 mean all.
    pub top_k: Option<i64>,
    /// Least probability relative to the best.
    pub min_p: Option<f64>,
    /// Penalty on tokens that appeared.
    pub presence_penalty: Option<f64>,
    /// Penalty per appearance.
    pub frequency_penalty: Option<f64>,
    /// Factor on tokens that appeared in prompt or output.
    pub repetition_penalty: Option<f64>,
    /// Token id, as a string, to bias.
    pub logit_bias: BTreeMap<String, f64>,
    /// Only these tokens may be chosen.
    pub allowed_token_ids: Option<Vec<i64>>,
    /// Seed of the random stream.
    pub seed: Option<i64>,
    /// Log-probabilities of prompt tokens.
    pub prompt_logprobs: Option<i64>,
    /// Number of continuations.
    pub n: Option<i64>,
    /// Most tokens to generate.
    pub max_tokens: Option<i64>,
    /// Fewest tokens to generate.
    pub min_tokens: Option<i64>,
    /// Texts that end the output.
    pub stop: Option<OneOrMany>,
    /// Tokens that end the output.
    pub stop_token_ids: Vec<i64>,
    /// Do not end at the model's end tokens.
    pub ignore_eos: bool,
    /// Leave the stop string in the text.
    pub include_stop_str_in_output: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Keep only the last tokens of the prompt; -1 means as many as fit.
    pub truncate_prompt_tokens: Option<i64>,
    /// Scheduling priority.
    pub priority: i64,
    /// Name of the request.
    pub request_id: Option<String>,
    /// Separates prefix caches.
    pub cache_salt: Option<String>,
    /// Answer as a stream of events.
    pub stream: bool,
    /// Options of the stream.
    pub stream_options: Option<StreamOptions>,
    /// Put token ids into the answer.
    pub return_token_ids: bool,
    /// Write tokens of log-probabilities as `token_id:123`.
    pub return_tokens_as_token_ids: bool,
}

impl GenerationFields {
    /// Takes the shared options out of a body.
    pub(super) fn take(fields: &mut Fields) -> Result<GenerationFields, ApiError> {
        fields.ignore("stream_interval");
        fields.ignore("session_id");
        Ok(GenerationFields {
            model: fields.take("model")?,
            temperature: fields.take("temperature")?,
            top_p: fields.take("top_p")?,
            top_k: fields.take("top_k")?,
            min_p: fields.take("min_p")?,
            presence_penalty: fields.take("presence_penalty")?,
            frequency_penalty: fields.take("frequency_penalty")?,
            repetition_penalty: fields.take("repetition_penalty")?,
            logit_bias: fields.take_or("logit_bias", BTreeMap::new())?,
            allowed_token_ids: fields.take("allowed_token_ids")?,
            seed: fields.take("seed")?,
            prompt_logprobs: fields.take("prompt_logprobs")?,
            n: fields.take("n")?,
            max_tokens: fields.take("max_tokens")?,
            min_tokens: fields.take("min_tokens")?,
            stop: fields.take("stop")?,
            stop_token_ids: fields.take_or("stop_token_ids", Vec::new())?,
            ignore_eos: fields.take_or("ignore_eos", false)?,
            include_stop_str_in_output: fields.take_or("include_stop_str_in_output", false)?,
            skip_special_tokens: fields.take_or("skip_special_tokens", true)?,
            truncate_prompt_tokens: fields.take("truncate_prompt_tokens")?,
            priority: fields.take_or("priority", 0)?,
            request_id: fields.take("request_id")?,
            cache_salt: fields.take("cache_salt")?,
            stream: fields.take_or("stream", false)?,
            stream_options: fields.take("stream_options")?,
            return_token_ids: fields.take_or("return_token_ids", false)?,
            return_tokens_as_token_ids: fields.take_or("return_tokens_as_token_ids", false)?,
        })
    }
}

/// How to answer a validated request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplyOptions {
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: String,
    /// Public name of the model, as the client wrote it.
    pub model: String,
    /// Answer as a stream of events.
    pub stream: bool,
    /// One more chunk with the usage at the end.
    pub include_usage: bool,
    /// The running usage in every chunk.
    pub continuous_usage: bool,
    /// Alternatives to list per token; `None` leaves log-probabilities out.
    pub logprobs: Option<u32>,
    /// Alternatives to list per prompt token, as `prompt_logprobs`.
    pub prompt_logprobs: Option<u32>,
    /// Put token ids into the answer.
    pub return_token_ids: bool,
    /// Write tokens of log-probabilities as `token_id:123`.
    pub tokens_as_ids: bool,
    /// Continuations per prompt.
    pub n: u32,
    /// The output length was not asked for, so it shrinks to what the context has room for.
    pub shrinks_to_fit: bool,
    /// Fields that had no effect.
    pub ignored: Vec<String>,
}
