//! Messages as sent: checked, and completed where templates disagree about a name.
//!
//! The text layer brings content and call arguments into the shape that the model's template
//! reads; here only their types are decided.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::validate::Quoted;

/// Checks every message.
pub(super) fn check(mut messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        let message = "`messages` is empty, but must hold at least one message.";
        return Err(ApiError::invalid("messages", message));
    }
    for (i, message) in messages.iter_mut().enumerate() {
        let path = format!("messages[{i}]");
        let Value::Object(message) = message else {
            return Err(wrong(&path, "an object with `role` and `content`"));
        };
        check_message(&path, message)?;
        mirror_reasoning(message);
    }
    Ok(messages)
}

/// The text of a message's content.
pub(super) fn content_text(message: &Value) -> Option<String> {
    match message.get("content")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let texts = parts.iter().map(|part| part.as_str().or_else(|| part["text"].as_str()));
            texts.collect::<Option<Vec<&str>>>().map(|texts| texts.join("\n"))
        }
        _ => None,
    }
}

fn check_message(path: &str, message: &Map<String, Value>) -> Result<(), ApiError> {
    let role = message.get("role").and_then(Value::as_str).filter(|role| !role.is_empty());
    let Some(role) = role else {
        return Err(wrong(&format!("{path}.role"), "a role like \"user\" or \"assistant\""));
    };
    let path_of_content = format!("{path}.content");
    match message.get("content") {
        None | Some(Value::Null) if role == "assistant" => {}
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            for (j, part) in parts.iter().enumerate() {
                check_part(&format!("{path_of_content}[{j}]"), part)?;
            }
        }
        _ => return Err(wrong(&path_of_content, "a string or a list of text parts")),
    }
    match message.get("tool_calls") {
        None | Some(Value::Null) => Ok(()),
        Some(calls) => check_calls(&format!("{path}.tool_calls"), calls),
    }
}

fn check_part(path: &str, part: &Value) -> Result<(), ApiError> {
    let part = match part {
        Value::String(_) => return Ok(()),
        Value::Object(part) => part,
        _ => return Err(wrong(path, "an object like {\"type\": \"text\", \"text\": \"…\"}")),
    };
    let key = match part.get("type").and_then(Value::as_str).unwrap_or("") {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        kind => {
            let message = format!(
                "`{path}.type` is {}, but this server handles text only; use \"text\".",
                Quoted(kind)
            );
            return Err(ApiError::invalid(format!("{path}.type"), message));
        }
    };
    match part.get(key) {
        Some(Value::String(_)) => Ok(()),
        _ => Err(wrong(&format!("{path}.{key}"), "a string")),
    }
}

fn check_calls(path: &str, calls: &Value) -> Result<(), ApiError> {
    let Value::Array(calls) = calls else { return Err(wrong(path, "a list of tool calls")) };
    for (j, call) in calls.iter().enumerate() {
        let path = format!("{path}[{j}].function");
        let Some(Value::Object(function)) = call.get("function") else {
            return Err(wrong(&path, "an object with `name` and `arguments`"));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(wrong(&format!("{path}.name"), "a string"));
        }
        match function.get("arguments") {
            None | Some(Value::Null | Value::String(_) | Value::Object(_)) => {}
            Some(_) => {
                return Err(wrong(&format!("{path}.arguments"), "a JSON object in a string"));
            }
        }
    }
    Ok(())
}

/// Some templates read `reasoning_content`, others `reasoning`; clients send either.
fn mirror_reasoning(message: &mut Map<String, Value>) {
    for (from, to) in [("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")] {
        if let Some(text) = message.get(from).filter(|text| text.is_string()).cloned() {
            message.entry(to).or_insert(text);
        }
    }
}

fn wrong(path: &str, expected: &str) -> ApiError {
    ApiError::invalid(path, format!("`{path}` must be {expected}."))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn one(message: Value) -> Result<Value, ApiError> {
        check(vec![message]).map(|mut messages| messages.remove(0))
    }

    #[test]
    fn text_parts_pass_and_read_as_one_text() {
        let parts = json!([{"type": "text", "text": "a"}, "b"]);
        let message = one(json!({"role": "user", "content": parts})).expect("valid");
        assert_eq!(content_text(&message).as_deref(), Some("a\nb"));
    }

    #[test]
    fn images_are_refused_by_path() {
        let part = json!({"type": "image_url", "image_url": {"url": "data:,"}});
        let error = one(json!({"role": "user", "content": [part]})).expect_err("no images");
        assert_eq!(error.param.as_deref(), Some("messages[0].content[0].type"));
    }

    #[test]
    fn an_assistant_may_call_without_speaking() {
        let call = json!({"id": "c", "type": "function",
            "function": {"name": "f", "arguments": "{\"x\": 1}"}});
        one(json!({"role": "assistant", "content": null, "tool_calls": [call]})).expect("valid");
    }

    #[test]
    fn broken_messages_name_their_place() {
        let call = json!({"function": {"name": "f", "arguments": 3}});
        for (message, param) in [
            (json!(3), "messages[0]"),
            (json!({"content": "x"}), "messages[0].role"),
            (json!({"role": 1, "content": "x"}), "messages[0].role"),
            (json!({"role": "user"}), "messages[0].content"),
            (json!({"role": "user", "content": 4}), "messages[0].content"),
            (json!({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
            (
                json!({"role": "assistant", "tool_calls": [call]}),
                "messages[0].tool_calls[0].function.arguments",
            ),
        ] {
            assert_eq!(one(message).expect_err("refused").param.as_deref(), Some(param));
        }
    }

    #[test]
    fn both_names_of_reasoning_reach_the_template() {
        let message = json!({"role": "assistant", "content": "x", "reasoning_content": "r"});
        assert_eq!(one(message).expect("valid")["reasoning"], "r");
    }
}
