//! Messages as sent become messages as chat templates read them.
//!
//! Templates want `content` to be a string and `arguments` to be an object, while the API
//! allows lists of parts and has arguments as a JSON string.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::validate::Quoted;

/// Checks and rewrites every message.
pub(super) fn for_template(messages: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        let message = "`messages` is empty, but must hold at least one message.";
        return Err(ApiError::invalid("messages", message));
    }
    messages.into_iter().enumerate().map(|(i, message)| rewrite(i, message)).collect()
}

fn rewrite(i: usize, message: Value) -> Result<Value, ApiError> {
    let path = format!("messages[{i}]");
    let Value::Object(mut message) = message else {
        return Err(wrong(&path, "an object with `role` and `content`"));
    };
    let role = match message.get("role") {
        Some(Value::String(role)) if !role.is_empty() => role.clone(),
        _ => return Err(wrong(&format!("{path}.role"), "a role like \"user\" or \"assistant\"")),
    };
    let content = message.get_mut("content").map(Value::take).unwrap_or_default();
    if content.is_null() && role != "assistant" {
        return Err(wrong(&format!("{path}.content"), "a string or a list of text parts"));
    }
    let content = flatten(&format!("{path}.content"), content)?;
    message.insert("content".to_owned(), Value::String(content));
    if let Some(calls) = message.get_mut("tool_calls").filter(|calls| !calls.is_null()) {
        rewrite_calls(&format!("{path}.tool_calls"), calls)?;
    }
    mirror_reasoning(&mut message);
    Ok(Value::Object(message))
}

/// Joins text parts; anything but text is refused.
fn flatten(path: &str, content: Value) -> Result<String, ApiError> {
    let parts = match content {
        Value::Null => return Ok(String::new()),
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        _ => return Err(wrong(path, "a string or a list of text parts")),
    };
    let texts: Result<Vec<String>, ApiError> = parts
        .into_iter()
        .enumerate()
        .map(|(j, part)| part_text(&format!("{path}[{j}]"), part))
        .collect();
    Ok(texts?.join("\n"))
}

fn part_text(path: &str, part: Value) -> Result<String, ApiError> {
    let mut part = match part {
        Value::String(text) => return Ok(text),
        Value::Object(part) => part,
        _ => return Err(wrong(path, "an object like {\"type\": \"text\", \"text\": \"…\"}")),
    };
    let kind = part.get("type").and_then(Value::as_str).unwrap_or("").to_owned();
    let key = match kind.as_str() {
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
    match part.get_mut(key).map(Value::take) {
        Some(Value::String(text)) => Ok(text),
        _ => Err(wrong(&format!("{path}.{key}"), "a string")),
    }
}

fn rewrite_calls(path: &str, calls: &mut Value) -> Result<(), ApiError> {
    let Value::Array(calls) = calls else { return Err(wrong(path, "a list of tool calls")) };
    for (j, call) in calls.iter_mut().enumerate() {
        let path = format!("{path}[{j}].function");
        let Some(Value::Object(function)) = call.get_mut("function") else {
            return Err(wrong(&path, "an object with `name` and `arguments`"));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(wrong(&format!("{path}.name"), "a string"));
        }
        let arguments = parse_arguments(&format!("{path}.arguments"), function.get("arguments"))?;
        function.insert("arguments".to_owned(), Value::Object(arguments));
    }
    Ok(())
}

fn parse_arguments(path: &str, sent: Option<&Value>) -> Result<Map<String, Value>, ApiError> {
    match sent {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(object)) => Ok(object.clone()),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(Map::new()),
        Some(Value::String(text)) => {
            serde_json::from_str(text).map_err(|_| wrong(path, "a JSON object written as a string"))
        }
        Some(_) => Err(wrong(path, "a JSON object written as a string")),
    }
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
        for_template(vec![message]).map(|mut messages| messages.remove(0))
    }

    #[test]
    fn text_parts_become_one_string() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let message = one(json!({"role": "user", "content": parts})).expect("valid");
        assert_eq!(message["content"], "a\nb");
    }

    #[test]
    fn images_are_refused_by_path() {
        let part = json!({"type": "image_url", "image_url": {"url": "data:,"}});
        let error = one(json!({"role": "user", "content": [part]})).expect_err("no images");
        assert_eq!(error.param.as_deref(), Some("messages[0].content[0].type"));
    }

    #[test]
    fn call_arguments_become_an_object() {
        let call = json!({"id": "c", "type": "function",
            "function": {"name": "f", "arguments": "{\"x\": 1}"}});
        let message = one(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
        let message = message.expect("valid");
        assert_eq!(message["content"], "");
        assert_eq!(message["tool_calls"][0]["function"]["arguments"], json!({"x": 1}));
    }

    #[test]
    fn broken_messages_name_their_place() {
        let call = json!({"function": {"name": "f", "arguments": "{"}});
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
