//! Parameters of the wider API that would change the answer and that this server cannot honour.
//!
//! They are refused by name, never ignored; their neutral values are accepted.

use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;

/// A parameter, when it asks for nothing, and what to do instead.
struct Unsupported {
    name: &'static str,
    is_neutral: fn(&Value) -> bool,
    advice: &'static str,
}

const fn row(
    name: &'static str,
    is_neutral: fn(&Value) -> bool,
    advice: &'static str,
) -> Unsupported {
    Unsupported { name, is_neutral, advice }
}

const NO_GRAMMAR: &str = "this server has no constrained decoding yet; ask for the format in the \
                          prompt and leave this parameter out";
const NO_MEDIA: &str = "this server handles text only";
const NO_TRANSFER: &str = "this server does not move KV caches between engines";
const PLAIN_SAMPLING: &str = "only plain sampling is available; leave this parameter out";

/// Refused at every endpoint that generates.
const EVERYWHERE: &[Unsupported] = &[
    row("response_format", is_text_format, NO_GRAMMAR),
    row("structured_outputs", is_empty, NO_GRAMMAR),
    row("guided_json", never, NO_GRAMMAR),
    row("guided_regex", never, NO_GRAMMAR),
    row("guided_choice", never, NO_GRAMMAR),
    row("guided_grammar", never, NO_GRAMMAR),
    row("structural_tag", never, NO_GRAMMAR),
    row("use_beam_search", is_false, PLAIN_SAMPLING),
    row("watermarking", is_false, PLAIN_SAMPLING),
    row("bad_words", is_empty, "use `logit_bias` with -100 for single tokens instead"),
    row("logprob_token_ids", is_empty, "use `top_logprobs` instead"),
    row("thinking_token_budget", never, "use `max_tokens` instead"),
    row("repetition_detection", never, "use `repetition_penalty` instead"),
    row("truncation_side", is_left, "prompts can only be truncated on the left"),
    row("prompt_embeds", never, "send text or token ids"),
    row("vllm_xargs", is_empty, "there are no engine extensions to pass them to"),
    row("kv_transfer_params", is_empty, NO_TRANSFER),
    row("ec_transfer_params", is_empty, NO_TRANSFER),
];

/// Refused for chat completions.
const CHAT: &[Unsupported] = &[
    row("chat_template", never, "templates are set by the operator, with --chat-template"),
    row("media_io_kwargs", is_empty, NO_MEDIA),
    row("mm_processor_kwargs", is_empty, NO_MEDIA),
    row("modalities", is_text_only, NO_MEDIA),
    row("audio", never, NO_MEDIA),
    row("web_search_options", never, "this server has no access to the web"),
    row("functions", is_empty, "it was replaced by `tools`"),
    row("function_call", is_none_word, "it was replaced by `tool_choice`"),
];

/// Refused for completions.
const COMPLETION: &[Unsupported] =
    &[row("suffix", is_empty, "this server cannot fill in the middle")];

/// Known parameters that have no effect here and cannot change a token.
const WITHOUT_EFFECT: &[&str] =
    &["user", "length_penalty", "early_stopping", "spaces_between_special_tokens"];

/// Refuses what neither endpoint can do.
pub(super) fn refuse_everywhere(fields: &mut Fields) -> Result<(), ApiError> {
    for name in WITHOUT_EFFECT {
        fields.take_value(name);
    }
    refuse(fields, EVERYWHERE)
}

/// Refuses what chat completions cannot do.
pub(super) fn refuse_in_chat(fields: &mut Fields) -> Result<(), ApiError> {
    refuse(fields, CHAT)
}

/// Refuses what completions cannot do.
pub(super) fn refuse_in_completions(fields: &mut Fields) -> Result<(), ApiError> {
    refuse(fields, COMPLETION)
}

fn refuse(fields: &mut Fields, table: &[Unsupported]) -> Result<(), ApiError> {
    for Unsupported { name, is_neutral, advice } in table {
        if fields.take_value(name).is_some_and(|value| !is_neutral(&value)) {
            return Err(ApiError::unsupported(name, advice));
        }
    }
    Ok(())
}

fn never(_: &Value) -> bool {
    false
}

fn is_false(value: &Value) -> bool {
    *value == Value::Bool(false)
}

fn is_left(value: &Value) -> bool {
    value.as_str() == Some("left")
}

fn is_none_word(value: &Value) -> bool {
    value.as_str() == Some("none")
}

fn is_text_format(value: &Value) -> bool {
    value.get("type").and_then(Value::as_str) == Some("text")
}

fn is_text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(|kind| kind.as_str() == Some("text")))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neutral_values_pass_and_are_not_reported() {
        let body = br#"{"response_format": {"type": "text"}, "use_beam_search": false,
            "bad_words": [], "truncation_side": "left", "user": "u"}"#;
        let mut fields = Fields::parse(body).expect("JSON");
        refuse_everywhere(&mut fields).expect("neutral");
        assert!(fields.into_ignored().is_empty());
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name() {
        for (name, value) in [
            ("response_format", r#"{"type": "json_object"}"#),
            ("response_format", "7"),
            ("guided_choice", r#"["a"]"#),
            ("use_beam_search", "true"),
            ("bad_words", r#"["x"]"#),
        ] {
            let body = format!(r#"{{"{name}": {value}}}"#);
            let mut fields = Fields::parse(body.as_bytes()).expect("JSON");
            let error = refuse_everywhere(&mut fields).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(name));
        }
    }
}
