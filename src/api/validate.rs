//! From options as sent to parameters in range. Each refusal names the parameter, the value
//! and what would be right.

use std::collections::BTreeMap;
use std::fmt::Display;

use super::error::ApiError;
use super::options::{GenerationFields, OneOrMany, ReplyOptions};
use crate::request::{
    GenerateRequest, OutputOptions, Prompt, RequestId, SamplingDefaults, SamplingParams,
    StopConditions,
};

/// Below this a temperature means greedy, as dividing by it would only lose precision.
const GREEDY_TEMPERATURE: f32 = 1e-5;
/// Most stop strings per request.
const MAX_STOP_STRINGS: usize = 4;
/// Most continuations per prompt.
const MAX_N: i64 = 128;
/// Longest cache salt and request id, in characters.
const MAX_NAME_LEN: usize = 128;

/// What this server can serve.
#[derive(Clone, Debug)]
pub struct ApiLimits {
    /// Public names of the model, the first is canonical.
    pub served_model_names: Vec<String>,
    /// Most alternatives per token in log-probabilities.
    pub max_logprobs: u32,
    /// Longest prompt plus output in tokens.
    pub max_model_len: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Seed of requests that bring none; `None` draws one per request.
    pub default_seed: Option<u64>,
    /// Requests may have a `priority` other than 0.
    pub accepts_priority: bool,
    /// The model's own sampling defaults.
    pub defaults: SamplingDefaults,
}

impl ApiLimits {
    /// The canonical name when none is given; otherwise the name, if it is served.
    pub fn resolve_model(&self, name: Option<String>) -> Result<String, ApiError> {
        match name {
            None => Ok(self.served_model_names.first().cloned().unwrap_or_default()),
            Some(name) if self.served_model_names.contains(&name) => Ok(name),
            Some(name) => Err(ApiError::unknown_model(&name)),
        }
    }
}

/// What an endpoint adds to the shared options.
pub(super) struct EndpointOptions {
    /// `chatcmpl` or `cmpl`.
    pub prefix: &'static str,
    /// Output length when the request has none; `None` fills the context.
    pub default_max_tokens: Option<u32>,
    /// Nothing may be generated, because the prompt is to be scored.
    pub allows_no_output: bool,
    /// Alternatives per generated token.
    pub logprobs: Option<u32>,
    /// The prompt comes before the output, with its log-probabilities if any are wanted.
    pub echo: bool,
}

/// Everything of a generating request but its prompts.
pub(super) struct Validated {
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// When to end.
    pub stop: StopConditions,
    /// How to make text.
    pub output: OutputOptions,
    /// How to answer.
    pub reply: ReplyOptions,
    priority: i32,
    cache_salt: Option<String>,
    truncate_prompt_tokens: Option<u32>,
}

impl Validated {
    /// The request for one prompt. Engine ids are unique even when a client repeats its own.
    pub fn request(&self, index: usize, prompt: Prompt) -> GenerateRequest {
        let nonce = uuid::Uuid::new_v4().as_fields().0;
        let id = RequestId(format!("{}-{index}-{nonce:08x}", self.reply.id).into());
        GenerateRequest {
            id,
            prompt,
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            output: self.output.clone(),
            n: self.reply.n,
            priority: self.priority,
            cache_salt: self.cache_salt.clone(),
            truncate_prompt_tokens: self.truncate_prompt_tokens,
        }
    }
}

/// Checks the shared options. `request_tag` is the id that the transport gave the request.
pub(super) fn validate(
    sent: &GenerationFields,
    endpoint: &EndpointOptions,
    limits: &ApiLimits,
    request_tag: &str,
) -> Result<Validated, ApiError> {
    let model = limits.resolve_model(sent.model.clone())?;
    if sent.stream_options.is_some() && !sent.stream {
        let message = "`stream_options` is only allowed together with `stream: true`.";
        return Err(ApiError::invalid("stream_options", message));
    }
    let prompt_logprobs = prompt_logprobs(sent, limits)?;
    let stop = stop_conditions(sent, endpoint, limits)?;
    let options = sent.stream_options.unwrap_or_default();
    let include_usage = options.include_usage.unwrap_or(false);
    let n = integer("n", sent.n, |n| (1..=MAX_N).contains(&n), "from 1 to 128")?.unwrap_or(1);
    let reply = ReplyOptions {
        id: format!("{}-{request_tag}", endpoint.prefix),
        model,
        stream: sent.stream,
        include_usage,
        continuous_usage: include_usage && options.continuous_usage_stats.unwrap_or(false),
        logprobs: endpoint.logprobs,
        prompt_logprobs,
        return_token_ids: sent.return_token_ids,
        tokens_as_ids: sent.return_tokens_as_token_ids,
        n,
        shrinks_to_fit: sent.max_tokens.is_none(),
        ignored: Vec::new(),
    };
    let mut sampling = sampling_params(sent, limits)?;
    sampling.logprobs = endpoint.logprobs;
    let echoed_logprobs = endpoint.logprobs.filter(|_| endpoint.echo);
    sampling.prompt_logprobs = prompt_logprobs.max(echoed_logprobs);
    Ok(Validated {
        sampling,
        truncate_prompt_tokens: truncation(sent, stop.max_tokens, limits)?,
        stop,
        output: OutputOptions {
            include_stop_str_in_output: sent.include_stop_str_in_output,
            skip_special_tokens: sent.skip_special_tokens,
            echo: endpoint.echo,
        },
        reply,
        priority: priority(sent.priority, limits)?,
        cache_salt: cache_salt(sent.cache_salt.as_deref())?,
    })
}

/// The name of a request: what the client put into the body, or what the transport gave it.
pub(super) fn request_tag(sent: Option<&str>, transport: &str) -> Result<String, ApiError> {
    let Some(tag) = sent else { return Ok(transport.to_owned()) };
    let printable = tag.bytes().all(|byte| byte.is_ascii_graphic());
    if tag.is_empty() || tag.len() > MAX_NAME_LEN || !printable {
        let expected = "1 to 128 printable ASCII characters without spaces";
        return Err(ApiError::out_of_range("request_id", Quoted(tag), expected));
    }
    Ok(tag.to_owned())
}

fn sampling_params(
    sent: &GenerationFields,
    limits: &ApiLimits,
) -> Result<SamplingParams, ApiError> {
    let defaults = &limits.defaults;
    let temperature = number("temperature", sent.temperature, |t| t >= 0.0, "at least 0")?
        .or(defaults.temperature);
    let temperature = temperature.unwrap_or(1.0);
    let top_k = integer::<i64>("top_k", sent.top_k, |k| k >= -1, "-1, 0 (both keep all) or more")?;
    let top_k = top_k.map(|k| k.max(0).min(limits.vocab_size as i64) as u32);
    let penalty = |name, value| {
        number(name, value, |p| (-2.0..=2.0).contains(&p), "from -2 to 2")
            .map(Option::unwrap_or_default)
    };
    Ok(SamplingParams {
        temperature: if temperature < GREEDY_TEMPERATURE { 0.0 } else { temperature },
        top_k: top_k.or(defaults.top_k).unwrap_or(0),
        top_p: number("top_p", sent.top_p, |p| p > 0.0 && p <= 1.0, "above 0 and at most 1")?
            .or(defaults.top_p)
            .unwrap_or(1.0),
        min_p: number("min_p", sent.min_p, |p| (0.0..=1.0).contains(&p), "from 0 to 1")?
            .or(defaults.min_p)
            .unwrap_or(0.0),
        presence_penalty: penalty("presence_penalty", sent.presence_penalty)?,
        frequency_penalty: penalty("frequency_penalty", sent.frequency_penalty)?,
        repetition_penalty: number(
            "repetition_penalty",
            sent.repetition_penalty,
            |p| p > 0.0,
            "above 0",
        )?
        .or(defaults.repetition_penalty)
        .unwrap_or(1.0),
        logit_bias: logit_bias(&sent.logit_bias, limits.vocab_size)?,
        allowed_token_ids: allowed_token_ids(sent.allowed_token_ids.as_deref(), limits.vocab_size)?,
        seed: seed(sent.seed, limits),
        logprobs: None,
        prompt_logprobs: None,
    })
}

/// Every `i64` is a seed; its bits are what counts.
fn seed(sent: Option<i64>, limits: &ApiLimits) -> u64 {
    let random = || uuid::Uuid::new_v4().as_u64_pair().1;
    sent.map(|seed| seed as u64).or(limits.default_seed).unwrap_or_else(random)
}

fn logit_bias(
    sent: &BTreeMap<String, f64>,
    vocab_size: usize,
) -> Result<Vec<(u32, f32)>, ApiError> {
    let entry = |(key, &bias): (&String, &f64)| {
        let param = format!("logit_bias.{key}");
        let token_id = key.parse::<u32>().ok().filter(|&id| (id as usize) < vocab_size);
        let token_id = token_id.ok_or_else(|| {
            let message = format!(
                "`logit_bias` has the key {key:?}, but keys must be token ids below {vocab_size}."
            );
            ApiError::invalid(param.as_str(), message)
        })?;
        let bias =
            number(&param, Some(bias), |b| (-100.0..=100.0).contains(&b), "from -100 to 100")?;
        Ok((token_id, bias.unwrap_or_default()))
    };
    sent.iter().map(entry).collect()
}

fn allowed_token_ids(
    sent: Option<&[i64]>,
    vocab_size: usize,
) -> Result<Option<Vec<u32>>, ApiError> {
    let Some(sent) = sent else { return Ok(None) };
    if sent.is_empty() {
        let message = "`allowed_token_ids` is empty, but must allow at least one token.";
        return Err(ApiError::invalid("allowed_token_ids", message));
    }
    token_ids("allowed_token_ids", sent, vocab_size).map(Some)
}

fn stop_conditions(
    sent: &GenerationFields,
    endpoint: &EndpointOptions,
    limits: &ApiLimits,
) -> Result<StopConditions, ApiError> {
    let least = i64::from(!endpoint.allows_no_output);
    let most = limits.max_model_len as i64;
    let expected = format!("from {least} to {most}, the context length");
    let max_tokens =
        integer("max_tokens", sent.max_tokens, |n| (least..=most).contains(&n), &expected)?
            .or(endpoint.default_max_tokens)
            .or(limits.defaults.max_new_tokens);
    let most_min = max_tokens.map_or(most, i64::from);
    let min_tokens = integer(
        "min_tokens",
        sent.min_tokens,
        |n| (0..=most_min).contains(&n),
        &format!("from 0 to `max_tokens`, which is {most_min}"),
    )?;
    Ok(StopConditions {
        max_tokens,
        min_tokens: min_tokens.unwrap_or(0),
        stop: stop_strings(sent.stop.as_ref())?,
        stop_token_ids: token_ids("stop_token_ids", &sent.stop_token_ids, limits.vocab_size)?,
        ignore_eos: sent.ignore_eos,
    })
}

fn stop_strings(sent: Option<&OneOrMany>) -> Result<Vec<String>, ApiError> {
    let strings = match sent {
        None => Vec::new(),
        Some(OneOrMany::One(text)) => vec![text.clone()],
        Some(OneOrMany::Many(texts)) => texts.clone(),
    };
    if strings.len() > MAX_STOP_STRINGS {
        let message = format!(
            "`stop` has {} strings, but must have at most {MAX_STOP_STRINGS}.",
            strings.len()
        );
        return Err(ApiError::invalid("stop", message));
    }
    if strings.iter().any(String::is_empty) {
        let message = "`stop` contains an empty string, which would end every output at once.";
        return Err(ApiError::invalid("stop", message));
    }
    Ok(strings)
}

fn prompt_logprobs(sent: &GenerationFields, limits: &ApiLimits) -> Result<Option<u32>, ApiError> {
    if sent.prompt_logprobs.is_some() && sent.stream {
        let message = "`prompt_logprobs` is not available together with `stream: true`.";
        return Err(ApiError::invalid("prompt_logprobs", message));
    }
    num_logprobs("prompt_logprobs", sent.prompt_logprobs, limits)
}

/// A number of alternatives; -1 means the whole vocabulary.
pub(super) fn num_logprobs(
    name: &str,
    sent: Option<i64>,
    limits: &ApiLimits,
) -> Result<Option<u32>, ApiError> {
    let most = i64::from(limits.max_logprobs);
    let sent = sent.map(|n| if n == -1 { limits.vocab_size as i64 } else { n });
    let expected = format!("from 0 to {most}, the server's --max-logprobs");
    integer(name, sent, |n| (0..=most).contains(&n), &expected)
}

fn truncation(
    sent: &GenerationFields,
    max_tokens: Option<u32>,
    limits: &ApiLimits,
) -> Result<Option<u32>, ApiError> {
    let output = max_tokens.unwrap_or(1) as usize;
    let room = limits.max_model_len.saturating_sub(output).max(1) as i64;
    let sent = sent.truncate_prompt_tokens.map(|n| if n == -1 { room } else { n });
    let most = limits.max_model_len as i64;
    let expected = format!("-1 (as many as fit) or from 1 to {most}, the context length");
    integer("truncate_prompt_tokens", sent, |n| (1..=most).contains(&n), &expected)
}

fn priority(sent: i64, limits: &ApiLimits) -> Result<i32, ApiError> {
    if sent != 0 && !limits.accepts_priority {
        let expected = "0, because the server was not started with --scheduling-policy priority";
        return Err(ApiError::out_of_range("priority", sent, expected));
    }
    i32::try_from(sent).map_err(|_| ApiError::out_of_range("priority", sent, "a 32-bit integer"))
}

fn cache_salt(sent: Option<&str>) -> Result<Option<String>, ApiError> {
    let Some(salt) = sent else { return Ok(None) };
    let forbidden = |c| matches!(c, '@' | '/' | '\\' | '\0');
    if salt.is_empty() || salt.chars().count() > MAX_NAME_LEN || salt.contains(forbidden) {
        let expected = "1 to 128 characters, none of them @, /, \\ or NUL";
        return Err(ApiError::out_of_range("cache_salt", Quoted(salt), expected));
    }
    Ok(Some(salt.to_owned()))
}

/// Checks a list of token ids.
pub(super) fn token_ids(name: &str, sent: &[i64], vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    let check = |(i, &id): (usize, &i64)| {
        let valid = u32::try_from(id).ok().filter(|&id| (id as usize) < vocab_size);
        valid.ok_or_else(|| {
            let expected = format!("a token id from 0 to {}", vocab_size.saturating_sub(1));
            ApiError::out_of_range(&format!("{name}[{i}]"), id, &expected)
        })
    };
    sent.iter().enumerate().map(check).collect()
}

fn number(
    name: &str,
    sent: Option<f64>,
    holds: impl Fn(f32) -> bool,
    expected: &str,
) -> Result<Option<f32>, ApiError> {
    let Some(value) = sent else { return Ok(None) };
    let narrow = value as f32;
    if narrow.is_finite() && holds(narrow) {
        Ok(Some(narrow))
    } else {
        Err(ApiError::out_of_range(name, value, expected))
    }
}

fn integer<T: TryFrom<i64>>(
    name: &str,
    sent: Option<i64>,
    holds: impl Fn(i64) -> bool,
    expected: &str,
) -> Result<Option<T>, ApiError> {
    let Some(value) = sent else { return Ok(None) };
    let narrow = T::try_from(value).ok().filter(|_| holds(value));
    narrow.map(Some).ok_or_else(|| ApiError::out_of_range(name, value, expected))
}

/// A client's text inside a message: quoted, escaped and not longer than a line.
pub(super) struct Quoted<'a>(pub &'a str);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 60;
        let shown: String = self.0.chars().take(SHOWN).collect();
        let more = if shown.len() < self.0.len() { "…" } else { "" };
        write!(f, "{shown:?}{more}")
    }
}

/// Limits of an imaginary model, for tests of this layer.
#[cfg(test)]
pub(super) fn limits_for_tests() -> ApiLimits {
    ApiLimits {
        served_model_names: vec!["m".to_owned(), "alias".to_owned()],
        max_logprobs: 20,
        max_model_len: 4096,
        vocab_size: 300,
        default_seed: None,
        accepts_priority: false,
        defaults: SamplingDefaults::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn validated(sent: &GenerationFields, limits: &ApiLimits) -> Result<Validated, ApiError> {
        let endpoint = EndpointOptions {
            prefix: "cmpl",
            default_max_tokens: None,
            allows_no_output: false,
            logprobs: None,
            echo: false,
        };
        validate(sent, &endpoint, limits, "tag")
    }

    #[test]
    fn the_models_own_defaults_fill_what_a_request_leaves_out() {
        let mut limits = limits_for_tests();
        limits.defaults.temperature = Some(0.6);
        limits.defaults.top_k = Some(20);
        limits.defaults.max_new_tokens = Some(64);
        let sent = GenerationFields { top_k: Some(0), ..GenerationFields::default() };
        let validated = validated(&sent, &limits).expect("valid");
        assert_eq!(validated.sampling.temperature, 0.6);
        assert_eq!(validated.sampling.top_k, 0, "the request's own value wins");
        assert_eq!(validated.stop.max_tokens, Some(64));
        assert!(validated.reply.shrinks_to_fit);
    }

    #[test]
    fn a_seed_is_the_requests_the_servers_or_random() {
        let mut limits = limits_for_tests();
        let unseeded = GenerationFields::default();
        let random = [(); 2].map(|()| validated(&unseeded, &limits).expect("valid").sampling.seed);
        assert_ne!(random[0], random[1]);
        limits.default_seed = Some(7);
        assert_eq!(validated(&unseeded, &limits).expect("valid").sampling.seed, 7);
        let seeded = GenerationFields { seed: Some(9), ..unseeded };
        assert_eq!(validated(&seeded, &limits).expect("valid").sampling.seed, 9);
    }

    #[test]
    fn truncation_by_minus_one_leaves_room_for_the_output() {
        let sent = GenerationFields {
            truncate_prompt_tokens: Some(-1),
            max_tokens: Some(96),
            ..GenerationFields::default()
        };
        let validated = validated(&sent, &limits_for_tests()).expect("valid");
        assert_eq!(validated.truncate_prompt_tokens, Some(4000));
    }

    #[test]
    fn long_client_texts_are_shortened_in_messages() {
        let quoted = Quoted(&"é\n".repeat(500)).to_string();
        assert!(quoted.len() < 300 && !quoted.contains('\n'));
    }
}
