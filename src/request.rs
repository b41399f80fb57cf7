//! Requests after validation: plain data, nothing left to guess.
//!
//! `api` makes a [`GenerateRequest`] from what a client sent; `engine::intake` turns its
//! prompt into ids and hands a [`TokenizedRequest`] to the scheduler. Knows nothing of
//! HTTP, tokenizers or devices.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

/// Names one request for its whole life, in logs, metrics and responses.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub Arc<str>);

impl RequestId {
    /// A fresh id with the given prefix (`chatcmpl`, `cmpl`, …).
    pub fn random(prefix: &str) -> RequestId {
        RequestId(format!("{prefix}-{}", uuid::Uuid::new_v4().simple()).into())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the model is to continue.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Raw text.
    Text {
        /// The text.
        text: String,
        /// Ask the tokenizer for BOS and the like.
        add_special_tokens: bool,
    },
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
    /// A conversation for the chat template.
    Chat(ChatPrompt),
}

/// A conversation and how to render it.
#[derive(Clone, Debug)]
pub struct ChatPrompt {
    /// Messages as the template sees them: objects with `role`, `content`, `tool_calls`, ….
    pub messages: Vec<Value>,
    /// Tool definitions, as sent.
    pub tools: Option<Vec<Value>>,
    /// Documents for retrieval templates, as sent.
    pub documents: Option<Vec<Value>>,
    /// Open an assistant turn at the end.
    pub add_generation_prompt: bool,
    /// Leave the last message open so that the model continues it.
    pub continue_final_message: bool,
    /// Let the tokenizer add its special tokens to the rendered text.
    pub add_special_tokens: bool,
    /// Extra template variables.
    pub template_kwargs: serde_json::Map<String, Value>,
}

/// How one token is chosen from logits. All values are in range.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens with at least this probability mass; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this fraction of the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted from the logit of each token already generated.
    pub presence_penalty: f32,
    /// Subtracted once per earlier generation of the token.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// When set, only these tokens may be chosen.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Base of the random stream; the choice is a function of (seed, position) alone.
    pub seed: u64,
    /// Report the log-probability of the chosen token and of this many most likely ones.
    pub logprobs: Option<u32>,
    /// The same for each prompt token.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            seed: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Greedy decoding, everything else off.
    pub fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..SamplingParams::default() }
    }

    /// True when a choice depends on the tokens before it.
    pub fn needs_history(&self) -> bool {
        self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || self.repetition_penalty != 1.0
    }
}

/// A token of a sequence, as penalties see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeenToken {
    /// Which.
    pub token_id: u32,
    /// How often it was generated; 0 when only the prompt has it.
    pub times_generated: u32,
}

/// When a sequence ends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StopConditions {
    /// Most tokens to generate; `None` means up to the context length. May be 0 for scoring.
    pub max_tokens: Option<u32>,
    /// No end token is allowed before this many tokens.
    pub min_tokens: u32,
    /// Texts that end the output; found by the output stream, not by the scheduler.
    pub stop: Vec<String>,
    /// Token ids that end the output, beside the model's own end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Ignore the model's own end tokens.
    pub ignore_eos: bool,
}

/// How tokens become text.
#[derive(Clone, Debug, PartialEq)]
pub struct OutputOptions {
    /// Leave the stop string in the text.
    pub include_stop_str_in_output: bool,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// Put the prompt before the output (completions only).
    pub echo: bool,
}

impl Default for OutputOptions {
    fn default() -> Self {
        OutputOptions { include_stop_str_in_output: false, skip_special_tokens: true, echo: false }
    }
}

/// A validated request, before tokenization.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Names the request everywhere.
    pub id: RequestId,
    /// What to continue.
    pub prompt: Prompt,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// When to end.
    pub stop: StopConditions,
    /// How to make text.
    pub output: OutputOptions,
    /// Number of independent continuations.
    pub n: u32,
    /// Lower runs first; only the priority policy looks at it.
    pub priority: i32,
    /// Requests share cached prefixes only with requests of the same salt.
    pub cache_salt: Option<String>,
    /// Keep only this many prompt tokens, from the end.
    pub truncate_prompt_tokens: Option<u32>,
}

impl GenerateRequest {
    /// A request with default options; mostly for tests and the terminal chat.
    pub fn new(id: RequestId, prompt: Prompt) -> GenerateRequest {
        GenerateRequest {
            id,
            prompt,
            sampling: SamplingParams::default(),
            stop: StopConditions::default(),
            output: OutputOptions::default(),
            n: 1,
            priority: 0,
            cache_salt: None,
            truncate_prompt_tokens: None,
        }
    }
}

/// A request as the scheduler admits it.
#[derive(Clone, Debug)]
pub struct TokenizedRequest {
    /// Names the request everywhere.
    pub id: RequestId,
    /// Never empty, and shorter than the context length.
    pub prompt_token_ids: Vec<u32>,
    /// How to choose tokens.
    pub sampling: Arc<SamplingParams>,
    /// When to end; the scheduler ignores `stop`.
    pub stop: StopConditions,
    /// Number of independent continuations.
    pub n: u32,
    /// Lower runs first; only the priority policy looks at it.
    pub priority: i32,
    /// Part of every block hash of this request.
    pub cache_salt: Option<String>,
}

/// A model's own sampling defaults (`generation_config.json`); `None` leaves the API's default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SamplingDefaults {
    /// See [`SamplingParams::temperature`].
    pub temperature: Option<f32>,
    /// See [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// See [`SamplingParams::top_k`].
    pub top_k: Option<u32>,
    /// See [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// See [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// Default output length when a request gives none.
    pub max_new_tokens: Option<u32>,
}

/// The seed of continuation `index` of a request with `seed`: the first keeps it, so that
/// `n` never changes what the first continuation says.
pub fn continuation_seed(seed: u64, index: u32) -> u64 {
    if index == 0 { seed } else { mix(seed.wrapping_add(u64::from(index))) }
}

/// The SplitMix64 finaliser (Steele, Lea, Flood 2014).
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
