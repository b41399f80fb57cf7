//! Tool definitions and the choice among them, as sent.

use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use super::validate::Quoted;

/// Tools that the model may call in this request.
#[derive(Clone, Debug, Default)]
pub(super) struct Tools {
    /// Definitions for the template; `None` when the model is to see none.
    pub definitions: Option<Vec<Value>>,
    /// More than one call per answer is wanted.
    pub parallel: bool,
}

/// Takes `tools`, `tool_choice` and `parallel_tool_calls`.
pub(super) fn take(fields: &mut Fields) -> Result<Tools, ApiError> {
    let sent: Option<Vec<Value>> = fields.take("tools")?;
    let choice = fields.take_value("tool_choice");
    let parallel = fields.take_or("parallel_tool_calls", true)?;
    if let Some(tools) = &sent {
        check_definitions(tools)?;
    }
    let offered = check_choice(choice.as_ref(), sent.is_some())?;
    Ok(Tools { definitions: sent.filter(|_| offered), parallel })
}

fn check_definitions(tools: &[Value]) -> Result<(), ApiError> {
    if tools.is_empty() {
        let message = "`tools` is empty; define at least one tool or leave it out.";
        return Err(ApiError::invalid("tools", message));
    }
    for (i, tool) in tools.iter().enumerate() {
        if tool.get("type").and_then(Value::as_str) != Some("function") {
            let path = format!("tools[{i}].type");
            let message = format!("`{path}` must be \"function\", the only type of tool.");
            return Err(ApiError::invalid(path, message));
        }
        let name = tool.get("function").and_then(|function| function.get("name"));
        if name.and_then(Value::as_str).is_none_or(str::is_empty) {
            let path = format!("tools[{i}].function.name");
            let message = format!("`{path}` must be the name of the function.");
            return Err(ApiError::invalid(path, message));
        }
    }
    Ok(())
}

/// True when the model is to see the tools.
fn check_choice(choice: Option<&Value>, has_tools: bool) -> Result<bool, ApiError> {
    let word = match choice {
        None => return Ok(has_tools),
        Some(choice) => choice.as_str(),
    };
    match word {
        Some("none") => Ok(false),
        Some("auto") if has_tools => Ok(true),
        Some("auto" | "required") if !has_tools => {
            let message = "`tool_choice` is only allowed together with `tools`.";
            Err(ApiError::invalid("tool_choice", message))
        }
        Some("required") => Err(forced()),
        Some(other) => {
            let expected = "\"none\" or \"auto\"";
            Err(ApiError::out_of_range("tool_choice", Quoted(other), expected))
        }
        None if choice.is_some_and(Value::is_object) => Err(forced()),
        None => {
            let message = "`tool_choice` must be \"none\" or \"auto\".";
            Err(ApiError::invalid("tool_choice", message))
        }
    }
}

fn forced() -> ApiError {
    let message = "`tool_choice` can be \"none\" or \"auto\"; forcing a call is not supported, \
                   because this server has no constrained decoding yet.";
    ApiError::invalid("tool_choice", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOOL: &str = r#"[{"type": "function", "function": {"name": "f"}}]"#;

    fn taken(body: &str) -> Result<Tools, ApiError> {
        take(&mut Fields::parse(body.as_bytes()).expect("JSON"))
    }

    #[test]
    fn tools_are_offered_unless_the_choice_is_none() {
        let auto = taken(&format!(r#"{{"tools": {TOOL}}}"#)).expect("valid");
        assert_eq!(auto.definitions.map(|tools| tools.len()), Some(1));
        let none = taken(&format!(r#"{{"tools": {TOOL}, "tool_choice": "none"}}"#));
        assert!(none.expect("valid").definitions.is_none());
        assert!(taken(r#"{"tool_choice": "none"}"#).expect("valid").definitions.is_none());
    }

    #[test]
    fn wrong_tools_and_choices_are_refused_by_name() {
        let with = |rest: &str| format!(r#"{{"tools": {TOOL}, {rest}}}"#);
        for (body, param) in [
            (r#"{"tools": []}"#.to_owned(), "tools"),
            (r#"{"tools": [{}]}"#.to_owned(), "tools[0].type"),
            (r#"{"tools": [{"type": "function"}]}"#.to_owned(), "tools[0].function.name"),
            (r#"{"tool_choice": "auto"}"#.to_owned(), "tool_choice"),
            (with(r#""tool_choice": "required""#), "tool_choice"),
            (with(r#""tool_choice": {"type": "function"}"#), "tool_choice"),
            (with(r#""tool_choice": "maybe""#), "tool_choice"),
            (with(r#""tool_choice": 1"#), "tool_choice"),
        ] {
            assert_eq!(taken(&body).expect_err("refused").param.as_deref(), Some(param), "{body}");
        }
    }
}
