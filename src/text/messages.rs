//! Messages of the API in the shape that a chat template expects.
//!
//! The API sends `content` as a string or as a list of parts, and a tool call's arguments as
//! JSON inside a string. Most templates print `content` as it is and walk through arguments.
//! Which shape of `content` a template can read is found by trying it, once.

use serde_json::{Value, json};

use crate::text::TextError;

/// The shapes of `content` that a template prints correctly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentShape {
    /// Only a string: the texts of a list are joined by line breaks.
    Text,
    /// Only a list of parts: a string becomes one part.
    Parts,
    /// Both, as they come.
    Either,
}

const PROBE: &str = "tokenmill-content-probe";

/// Renders the same user message in both shapes and compares.
pub fn probe_shape(render: impl Fn(Vec<Value>) -> Option<String>) -> ContentShape {
    let message = |content: Value| vec![json!({"role": "user", "content": content})];
    let printed = |text: Option<String>| text.filter(|text| text.contains(PROBE));
    let from_text = printed(render(message(json!(PROBE))));
    let from_parts = printed(render(message(json!([{"type": "text", "text": PROBE}]))));
    match (from_text, from_parts) {
        (Some(text), Some(parts)) if text == parts => ContentShape::Either,
        // A template that prints the list itself, quotes and all, does not read it.
        (None, Some(parts)) if !parts.contains("'type'") && !parts.contains("\"type\"") => {
            ContentShape::Parts
        }
        _ => ContentShape::Text,
    }
}

/// All messages in the given shape.
pub fn for_template(messages: &[Value], shape: ContentShape) -> Result<Vec<Value>, TextError> {
    let mut shaped = messages.to_vec();
    for (index, message) in shaped.iter_mut().enumerate() {
        shape_content(message, index, shape)?;
        parse_arguments(message);
    }
    Ok(shaped)
}

/// Appends to the text of the last message.
pub fn append_to_last(messages: &mut [Value], suffix: &str) -> Result<(), TextError> {
    let refused = |reason| TextError::ContinueFinalMessage { reason };
    let message = messages.last_mut().ok_or(refused("there are no messages"))?;
    let text = match &mut message["content"] {
        Value::Array(parts) => parts.last_mut().map(|part| &mut part["text"]),
        content => Some(content),
    };
    match text {
        Some(Value::String(text)) if !text.is_empty() => {
            text.push_str(suffix);
            Ok(())
        }
        _ => Err(refused("it has no text")),
    }
}

fn shape_content(message: &mut Value, index: usize, shape: ContentShape) -> Result<(), TextError> {
    let Value::Object(members) = message else { return Ok(()) };
    let content = members.entry("content").or_insert(Value::Null);
    let as_parts = |text: &str| json!([{"type": "text", "text": text}]);
    *content = match (content.take(), shape) {
        (Value::Null, ContentShape::Parts) => json!([]),
        (Value::Null, _) => json!(""),
        (Value::String(text), ContentShape::Parts) => as_parts(&text),
        (Value::Array(parts), ContentShape::Text) => {
            let texts: Result<Vec<&str>, TextError> =
                parts.iter().map(|part| part_text(part, index)).collect();
            json!(texts?.join("\n"))
        }
        (Value::Array(parts), _) => {
            parts.iter().try_for_each(|part| part_text(part, index).map(drop))?;
            Value::Array(parts)
        }
        (other, _) => other,
    };
    Ok(())
}

fn part_text(part: &Value, message: usize) -> Result<&str, TextError> {
    let text = part.as_str().or_else(|| part["text"].as_str());
    text.or_else(|| part["refusal"].as_str()).ok_or_else(|| TextError::UnsupportedContent {
        message,
        part_type: part["type"].as_str().unwrap_or("unknown").to_owned(),
    })
}

/// Tool calls carry their arguments as JSON in a string; templates want the object. A string
/// that is no JSON object (a call cut off by the length limit) stays as it is.
fn parse_arguments(message: &mut Value) {
    let Some(Value::Array(calls)) = message.get_mut("tool_calls") else { return };
    for call in calls {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let parsed = match arguments.as_str().map(str::trim) {
            Some("") => Some(json!({})),
            Some(text) => serde_json::from_str(text).ok().filter(Value::is_object),
            None => None,
        };
        if let Some(parsed) = parsed {
            *arguments = parsed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shaped(message: Value, shape: ContentShape) -> Value {
        for_template(&[message], shape).unwrap().remove(0)
    }

    #[test]
    fn parts_are_joined_by_line_breaks_for_a_template_that_reads_text() {
        let message = json!({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]});
        assert_eq!(shaped(message, ContentShape::Text)["content"], "a\nb");
    }

    #[test]
    fn text_becomes_a_part_for_a_template_that_reads_only_parts() {
        let message = json!({"role": "user", "content": "a"});
        let expected = json!([{"type": "text", "text": "a"}]);
        assert_eq!(shaped(message, ContentShape::Parts)["content"], expected);
    }

    #[test]
    fn missing_content_is_an_empty_text() {
        let message = json!({"role": "assistant", "tool_calls": []});
        assert_eq!(shaped(message, ContentShape::Text)["content"], "");
    }

    #[test]
    fn arguments_are_objects_when_they_are_json_objects() {
        let call =
            |arguments: &str| json!({"tool_calls": [{"function": {"arguments": arguments}}]});
        let arguments = |text: &str| {
            let message = shaped(call(text), ContentShape::Text);
            message.pointer("/tool_calls/0/function/arguments").cloned().unwrap()
        };
        assert_eq!(arguments(r#"{"a": 1}"#), json!({"a": 1}));
        assert_eq!(arguments(""), json!({}));
        assert_eq!(arguments(r#"{"a": "#), json!(r#"{"a": "#));
        assert_eq!(arguments("3"), json!("3"));
    }

    #[test]
    fn an_image_is_refused_by_name_and_place() {
        let messages = [json!({"content": "a"}), json!({"content": [{"type": "image_url"}]})];
        for shape in [ContentShape::Text, ContentShape::Either] {
            let error = for_template(&messages, shape).unwrap_err();
            let TextError::UnsupportedContent { message: 1, part_type } = error else {
                panic!("{error}")
            };
            assert_eq!(part_type, "image_url");
        }
    }
}
