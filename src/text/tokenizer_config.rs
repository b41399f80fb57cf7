//! `tokenizer_config.json`: the special tokens' names and the chat templates.
//!
//! The file is loosely typed: a token is a string or an object, a template one string or a list
//! of named ones. This module turns it into plain maps and decides which template is which.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::text::TextError;

/// What the text layer needs of `tokenizer_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerConfig {
    /// `bos_token`, `eos_token`, … and their texts; those the model lacks are absent.
    pub special_tokens: BTreeMap<String, String>,
    /// The template for conversations.
    pub chat_template: Option<String>,
    /// The template for conversations with tools, where it is another one.
    pub tool_use_template: Option<String>,
}

impl TokenizerConfig {
    /// Reads the file's text.
    pub fn parse(json: &str) -> Result<TokenizerConfig, TextError> {
        let unusable = |reason: String| TextError::TokenizerConfig { reason };
        let config: Value = serde_json::from_str(json).map_err(|e| unusable(e.to_string()))?;
        let Value::Object(members) = &config else {
            return Err(unusable("it is not a JSON object".to_owned()));
        };
        let special_tokens = members
            .iter()
            .filter(|(name, _)| name.ends_with("_token"))
            .filter_map(|(name, token)| Some((name.clone(), token_text(token)?.to_owned())))
            .collect();
        let template = &config["chat_template"];
        let chat_template = template.as_str().or_else(|| named_template(template, "default"));
        Ok(TokenizerConfig {
            special_tokens,
            chat_template: chat_template.map(str::to_owned),
            tool_use_template: named_template(template, "tool_use").map(str::to_owned),
        })
    }
}

/// A token is its text, or an object that holds it.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

fn named_template<'a>(templates: &'a Value, name: &str) -> Option<&'a str> {
    let named = templates.as_array()?.iter().find(|template| template["name"] == name)?;
    named["template"].as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_from_strings_and_objects_and_null_is_absent() {
        let config = TokenizerConfig::parse(
            r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>",
                "pad_token": null, "add_bos_token": true, "chat_template": "x"}"#,
        )
        .unwrap();
        let tokens: Vec<(&str, &str)> =
            config.special_tokens.iter().map(|(name, text)| (&**name, &**text)).collect();
        assert_eq!(tokens, [("bos_token", "<s>"), ("eos_token", "</s>")]);
        assert_eq!(config.chat_template.as_deref(), Some("x"));
    }

    #[test]
    fn named_templates_are_told_apart() {
        let config = TokenizerConfig::parse(
            r#"{"chat_template": [{"name": "default", "template": "d"},
                                  {"name": "rag", "template": "r"},
                                  {"name": "tool_use", "template": "t"}]}"#,
        )
        .unwrap();
        assert_eq!(config.chat_template.as_deref(), Some("d"));
        assert_eq!(config.tool_use_template.as_deref(), Some("t"));
    }

    #[test]
    fn a_file_that_is_no_object_is_refused_with_its_name() {
        for broken in ["[]", "{", ""] {
            let error = TokenizerConfig::parse(broken).unwrap_err().to_string();
            assert!(error.starts_with("tokenizer_config.json is not usable: "), "{error}");
        }
    }
}
