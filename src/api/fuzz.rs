//! Whatever a client sends is answered, never a panic: random bodies around the real fields.

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::chat::ChatCompletionRequest;
use super::completions::CompletionRequest;
use super::error::ErrorKind;
use super::tokenize::{DetokenizeJob, TokenizeJob};
use super::validate::limits_for_tests;
use super::{ApiError, ApiLimits};

const NAMES: &[&str] = &[
    "messages",
    "prompt",
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "seed",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "response_format",
    "echo",
    "truncate_prompt_tokens",
    "priority",
    "request_id",
    "cache_salt",
    "chat_template_kwargs",
    "documents",
    "allowed_token_ids",
    "reasoning_effort",
    "tokens",
    "presence_penalty",
    "repetition_penalty",
    "continue_final_message",
    "unknown",
    "best_of",
];

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..400).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
        prop::sample::select(vec!["user", "assistant", "text", "function", "auto", "m", "{}"])
            .prop_map(Value::from),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let key = prop::sample::select(vec![
        "role",
        "content",
        "type",
        "text",
        "tool_calls",
        "function",
        "name",
        "arguments",
        "3",
        "include_usage",
    ]);
    leaf().prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((key.clone(), inner), 0..4).prop_map(|entries| {
                entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
            }),
        ]
    })
}

fn body() -> impl Strategy<Value = Value> {
    let good = json!({"messages": [{"role": "user", "content": "hi"}], "prompt": "hi"});
    vec((prop::sample::select(NAMES), value()), 0..6).prop_map(move |entries| {
        let mut body = good.clone();
        for (name, value) in entries {
            body[name] = value;
        }
        body
    })
}

/// Every way in, with its outcome reduced to the error.
fn outcomes(body: &[u8], limits: &ApiLimits) -> [Option<ApiError>; 4] {
    let chat = ChatCompletionRequest::parse(body).and_then(|chat| chat.validate(limits, "t"));
    let text = CompletionRequest::parse(body).and_then(|text| text.validate(limits, "t"));
    [
        chat.err(),
        text.err(),
        TokenizeJob::parse(body, limits).err(),
        DetokenizeJob::parse(body, limits).err(),
    ]
}

fn check(body: &[u8]) -> Result<(), TestCaseError> {
    for error in outcomes(body, &limits_for_tests()).into_iter().flatten() {
        prop_assert!(matches!(error.kind, ErrorKind::BadRequest | ErrorKind::NotFound));
        prop_assert!(!error.message.is_empty() && error.message.len() < 2000, "{}", error.message);
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_body_is_accepted_or_refused_with_a_reason(body in body()) {
        check(body.to_string().as_bytes())?;
    }

    #[test]
    fn any_bytes_are_refused_with_a_reason(bytes in vec(any::<u8>(), 0..64)) {
        check(&bytes)?;
    }

    #[test]
    fn any_truncated_body_is_refused(body in body(), cut in 1usize..20) {
        let text = body.to_string();
        let bytes = &text.as_bytes()[..text.len().saturating_sub(cut)];
        prop_assert!(outcomes(bytes, &limits_for_tests()).iter().all(Option::is_some));
    }
}
