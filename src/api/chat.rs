//! `POST /v1/chat/completions`: the request as sent, and its validation.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::Fields;
use super::messages;
use super::options::{GenerationFields, ReplyOptions};
use super::tools::{self, Tools};
use super::unsupported;
use super::validate::{self, ApiLimits, EndpointOptions, Quoted};
use crate::request::{ChatPrompt, GenerateRequest, Prompt};

/// Template variables that a request sets by other means.
const RESERVED_KWARGS: &[&str] = &[
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
];
const REASONING_EFFORTS: &[&str] = &["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// A conversation and how to render it, as sent; also what `/tokenize` takes.
#[derive(Clone, Debug)]
pub struct TemplateFields {
    messages: Vec<Value>,
    documents: Option<Vec<Value>>,
    add_generation_prompt: Option<bool>,
    continue_final_message: bool,
    add_special_tokens: bool,
    template_kwargs: Map<String, Value>,
    reasoning_effort: Option<String>,
}

impl TemplateFields {
    pub(super) fn take(fields: &mut Fields) -> Result<TemplateFields, ApiError> {
        Ok(TemplateFields {
            messages: fields.require("messages")?,
            documents: fields.take("documents")?,
            add_generation_prompt: fields.take("add_generation_prompt")?,
            continue_final_message: fields.take_or("continue_final_message", false)?,
            add_special_tokens: fields.take_or("add_special_tokens", false)?,
            template_kwargs: fields.take_or("chat_template_kwargs", Map::new())?,
            reasoning_effort: fields.take("reasoning_effort")?,
        })
    }

    /// Checks everything.
    pub(super) fn validate(self, tools: Option<Vec<Value>>) -> Result<ChatPrompt, ApiError> {
        if self.continue_final_message && self.add_generation_prompt == Some(true) {
            let message =
                "`continue_final_message` and `add_generation_prompt` cannot both be true.";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        Ok(ChatPrompt {
            messages: messages::check(self.messages)?,
            tools,
            documents: check_documents(self.documents)?,
            add_generation_prompt: self
                .add_generation_prompt
                .unwrap_or(!self.continue_final_message),
            continue_final_message: self.continue_final_message,
            add_special_tokens: self.add_special_tokens,
            template_kwargs: template_kwargs(self.template_kwargs, self.reasoning_effort)?,
        })
    }
}

fn check_documents(documents: Option<Vec<Value>>) -> Result<Option<Vec<Value>>, ApiError> {
    let wrong = documents.iter().flatten().position(|document| !document.is_object());
    match wrong {
        None => Ok(documents),
        Some(i) => {
            let path = format!("documents[{i}]");
            let message = format!("`{path}` must be an object like {{\"title\": …, \"text\": …}}.");
            Err(ApiError::invalid(path, message))
        }
    }
}

fn template_kwargs(
    mut kwargs: Map<String, Value>,
    reasoning_effort: Option<String>,
) -> Result<Map<String, Value>, ApiError> {
    if let Some(name) = RESERVED_KWARGS.iter().find(|name| kwargs.contains_key(**name)) {
        let message = format!("`chat_template_kwargs` must not set `{name}`.");
        return Err(ApiError::invalid(format!("chat_template_kwargs.{name}"), message));
    }
    if let Some(effort) = reasoning_effort {
        if !REASONING_EFFORTS.contains(&effort.as_str()) {
            let expected = format!("one of {}", REASONING_EFFORTS.join(", "));
            return Err(ApiError::out_of_range("reasoning_effort", Quoted(&effort), &expected));
        }
        kwargs.entry("reasoning_effort").or_insert(Value::String(effort));
    }
    Ok(kwargs)
}

/// The body of `POST /v1/chat/completions`, as sent.
#[derive(Clone, Debug)]
pub struct ChatCompletionRequest {
    generation: GenerationFields,
    template: TemplateFields,
    tools: Tools,
    logprobs: bool,
    top_logprobs: Option<i64>,
    echo: bool,
    ignored: Vec<String>,
}

/// A validated chat completion.
#[derive(Clone, Debug)]
pub struct ChatJob {
    /// For the engine.
    pub request: GenerateRequest,
    /// How to answer.
    pub answer: ChatAnswer,
}

/// How to answer a validated chat completion.
#[derive(Clone, Debug)]
pub struct ChatAnswer {
    /// What every endpoint knows.
    pub reply: ReplyOptions,
    /// How to read tool calls in the output.
    pub tools: ToolUse,
    /// Text to put before each answer: the message that the model continues.
    pub echo: Option<String>,
}

/// Whether the output may hold tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolUse {
    /// It is text.
    Off,
    /// At most one call is reported.
    Single,
    /// All calls are reported.
    Parallel,
}

impl ChatCompletionRequest {
    /// Parses a body.
    pub fn parse(body: &[u8]) -> Result<ChatCompletionRequest, ApiError> {
        let mut fields = Fields::parse(body)?;
        unsupported::refuse_everywhere(&mut fields)?;
        unsupported::refuse_in_chat(&mut fields)?;
        let mut generation = GenerationFields::take(&mut fields)?;
        if let Some(max_tokens) = fields.take("max_completion_tokens")? {
            generation.max_tokens = Some(max_tokens);
        }
        fields.ignore("include_reasoning");
        Ok(ChatCompletionRequest {
            generation,
            template: TemplateFields::take(&mut fields)?,
            tools: tools::take(&mut fields)?,
            logprobs: fields.take_or("logprobs", false)?,
            top_logprobs: fields.take("top_logprobs")?,
            echo: fields.take_or("echo", false)?,
            ignored: fields.into_ignored(),
        })
    }

    /// Checks every value. `transport_tag` names the request unless the body does.
    pub fn validate(self, limits: &ApiLimits, transport_tag: &str) -> Result<ChatJob, ApiError> {
        let endpoint = EndpointOptions {
            prefix: "chatcmpl",
            default_max_tokens: None,
            allows_no_output: false,
            logprobs: self.num_logprobs(limits)?,
            echo: false,
        };
        let tag = validate::request_tag(self.generation.request_id.as_deref(), transport_tag)?;
        let mut validated = validate::validate(&self.generation, &endpoint, limits, &tag)?;
        validated.reply.ignored = self.ignored;
        let tools = match (&self.tools.definitions, self.tools.parallel) {
            (None, _) => ToolUse::Off,
            (Some(_), false) => ToolUse::Single,
            (Some(_), true) => ToolUse::Parallel,
        };
        let prompt = self.template.validate(self.tools.definitions)?;
        let echo = self.echo.then(|| last_assistant_text(&prompt.messages)).flatten();
        let request = validated.request(0, Prompt::Chat(prompt));
        Ok(ChatJob { request, answer: ChatAnswer { reply: validated.reply, tools, echo } })
    }

    fn num_logprobs(&self, limits: &ApiLimits) -> Result<Option<u32>, ApiError> {
        let top = validate::num_logprobs("top_logprobs", self.top_logprobs, limits)?;
        if !self.logprobs && top.is_some_and(|top| top > 0) {
            let message = "`top_logprobs` is only allowed together with `logprobs: true`.";
            return Err(ApiError::invalid("top_logprobs", message));
        }
        Ok(self.logprobs.then(|| top.unwrap_or(0)))
    }
}

/// The last message's text, if it is the assistant's own.
fn last_assistant_text(messages: &[Value]) -> Option<String> {
    let last = messages.last()?;
    let own = last.get("role").and_then(Value::as_str) == Some("assistant");
    messages::content_text(last).filter(|_| own)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::ErrorKind;
    use super::super::validate::limits_for_tests;
    use super::*;

    fn job(extra: &Value) -> Result<ChatJob, ApiError> {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        let extra = extra.as_object().expect("an object").clone();
        body.as_object_mut().expect("an object").extend(extra);
        let request = ChatCompletionRequest::parse(body.to_string().as_bytes())?;
        request.validate(&limits_for_tests(), "tag")
    }

    #[test]
    fn an_empty_request_gets_the_documented_defaults() {
        let job = job(&json!({})).expect("valid");
        assert_eq!(job.answer.reply.id, "chatcmpl-tag");
        assert_eq!(job.answer.reply.model, "m");
        assert_eq!(job.request.sampling.temperature, 1.0);
        assert_eq!(job.request.stop.max_tokens, None);
        assert!(job.answer.reply.shrinks_to_fit);
        assert_eq!(job.answer.tools, ToolUse::Off);
        let Prompt::Chat(prompt) = job.request.prompt else { panic!("a chat") };
        assert!(prompt.add_generation_prompt && !prompt.add_special_tokens);
    }

    #[test]
    fn max_completion_tokens_wins_over_max_tokens() {
        let job = job(&json!({"max_tokens": 5, "max_completion_tokens": 7})).expect("valid");
        assert_eq!(job.request.stop.max_tokens, Some(7));
        assert!(!job.answer.reply.shrinks_to_fit);
    }

    #[test]
    fn sampling_options_reach_the_engine() {
        let job = job(&json!({
            "temperature": 0.000001, "top_k": -1, "top_p": 0.5, "min_p": 0.1, "seed": -1, "n": 3,
            "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.5,
            "logit_bias": {"3": 2.5}, "stop": "x", "stop_token_ids": [4], "min_tokens": 2,
            "logprobs": true, "top_logprobs": 4, "cache_salt": "s", "ignore_eos": true,
        }))
        .expect("valid");
        let sampling = job.request.sampling;
        assert_eq!((sampling.temperature, sampling.top_k, sampling.top_p), (0.0, 0, 0.5));
        assert_eq!((sampling.seed, sampling.logprobs), (u64::MAX, Some(4)));
        assert_eq!(sampling.logit_bias, [(3, 2.5)]);
        assert_eq!(job.request.stop.stop, ["x"]);
        assert_eq!(job.request.n, 3);
        assert!(job.request.stop.ignore_eos);
        assert_eq!(job.request.cache_salt.as_deref(), Some("s"));
    }

    #[test]
    fn a_value_out_of_range_is_named_with_its_range() {
        for (name, value) in [
            ("temperature", json!(-0.1)),
            ("temperature", json!(1e300)),
            ("top_p", json!(0)),
            ("top_p", json!(1.01)),
            ("top_k", json!(-2)),
            ("min_p", json!(-1)),
            ("presence_penalty", json!(2.5)),
            ("frequency_penalty", json!(-3)),
            ("repetition_penalty", json!(0)),
            ("n", json!(0)),
            ("n", json!(129)),
            ("max_tokens", json!(0)),
            ("max_tokens", json!(100_000)),
            ("min_tokens", json!(-1)),
            ("top_logprobs", json!(21)),
            ("prompt_logprobs", json!(-2)),
            ("truncate_prompt_tokens", json!(0)),
            ("priority", json!(1)),
            ("cache_salt", json!("a/b")),
            ("request_id", json!("a b")),
            ("reasoning_effort", json!("huge")),
        ] {
            let error = job(&json!({name: value})).expect_err(name);
            assert_eq!(error.kind, ErrorKind::BadRequest);
            assert_eq!(error.param.as_deref(), Some(name));
            assert!(error.message.contains("must be"), "{}", error.message);
        }
    }

    #[test]
    fn wrong_combinations_name_the_parameter_to_change() {
        for (extra, param) in [
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"top_logprobs": 2}), "top_logprobs"),
            (json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs"),
            (
                json!({"add_generation_prompt": true, "continue_final_message": true}),
                "continue_final_message",
            ),
            (json!({"min_tokens": 9, "max_tokens": 8}), "min_tokens"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"stop": ["a", ""]}), "stop"),
            (json!({"stop": 5}), "stop"),
            (json!({"stop_token_ids": [1, 500]}), "stop_token_ids[1]"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias.x"),
            (json!({"logit_bias": {"5": 101}}), "logit_bias.5"),
            (json!({"allowed_token_ids": []}), "allowed_token_ids"),
            (json!({"documents": ["x"]}), "documents[0]"),
            (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages"),
            (json!({"chat_template": "{{ x }}"}), "chat_template"),
            (json!({"messages": []}), "messages"),
            (json!({"messages": null}), "messages"),
            (json!({"stream": "yes"}), "stream"),
            (json!({"n": 1.5}), "n"),
        ] {
            let error = job(&extra).expect_err(&extra.to_string());
            assert_eq!(error.param.as_deref(), Some(param), "{extra}");
        }
    }

    #[test]
    fn an_unknown_model_is_not_found() {
        let error = job(&json!({"model": "gpt-9"})).expect_err("unknown");
        assert_eq!((error.kind, error.param.as_deref()), (ErrorKind::NotFound, Some("model")));
    }

    #[test]
    fn fields_without_effect_are_reported() {
        let job = job(&json!({"store": true, "stream_interval": 3, "user": "me"})).expect("valid");
        assert_eq!(job.answer.reply.ignored, ["store", "stream_interval"]);
    }

    #[test]
    fn equal_request_ids_stay_distinct_in_the_engine() {
        let ids = [(); 2].map(|()| job(&json!({"request_id": "same"})).expect("valid"));
        assert_eq!(ids[0].answer.reply.id, "chatcmpl-same");
        assert_ne!(ids[0].request.id, ids[1].request.id);
    }

    #[test]
    fn continuing_a_message_needs_no_second_flag() {
        let messages = json!([{"role": "assistant", "content": "Once"}]);
        let job = job(&json!({"continue_final_message": true, "echo": true, "messages": messages}));
        let job = job.expect("valid");
        assert_eq!(job.answer.echo.as_deref(), Some("Once"));
        let Prompt::Chat(prompt) = job.request.prompt else { panic!("a chat") };
        assert!(!prompt.add_generation_prompt);
    }
}
