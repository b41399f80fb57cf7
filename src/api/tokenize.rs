//! `POST /tokenize` and `POST /detokenize`.

use serde::Serialize;

use super::chat::TemplateFields;
use super::error::ApiError;
use super::fields::Fields;
use super::tools;
use super::validate::{self, ApiLimits};
use crate::request::Prompt;

/// A validated `/tokenize` request: a text, or a conversation to render first.
#[derive(Clone, Debug)]
pub struct TokenizeJob {
    /// What to tokenize.
    pub prompt: Prompt,
    /// Also list each token's text.
    pub return_token_strs: bool,
    /// Fields that had no effect.
    pub ignored: Vec<String>,
}

impl TokenizeJob {
    /// Parses and checks a body.
    pub fn parse(body: &[u8], limits: &ApiLimits) -> Result<TokenizeJob, ApiError> {
        let mut fields = Fields::parse(body)?;
        limits.resolve_model(fields.take("model")?)?;
        let text: Option<String> = fields.take("prompt")?;
        let prompt = match text {
            Some(text) => {
                let add_special_tokens = fields.take_or("add_special_tokens", true)?;
                Prompt::Text { text, add_special_tokens }
            }
            None => Prompt::Chat(chat(&mut fields)?),
        };
        Ok(TokenizeJob {
            prompt,
            return_token_strs: fields.take_or("return_token_strs", false)?,
            ignored: fields.into_ignored(),
        })
    }
}

fn chat(fields: &mut Fields) -> Result<crate::request::ChatPrompt, ApiError> {
    let tools = tools::take(fields)?;
    let template = TemplateFields::take(fields).map_err(|error| match error.param.as_deref() {
        Some("messages") => {
            ApiError::invalid("prompt", "Either `prompt` or `messages` is required.")
        }
        _ => error,
    })?;
    template.validate(tools.definitions)
}

/// The answer of `/tokenize`.
#[derive(Debug, Serialize)]
pub struct TokenizeResponse {
    /// Number of tokens.
    pub count: usize,
    /// Longest prompt plus output of the model.
    pub max_model_len: usize,
    /// The ids.
    pub tokens: Vec<u32>,
    /// Each token's text, when asked for.
    pub token_strs: Option<Vec<String>>,
}

/// A validated `/detokenize` request.
#[derive(Clone, Debug)]
pub struct DetokenizeJob {
    /// The ids.
    pub tokens: Vec<u32>,
    /// Fields that had no effect.
    pub ignored: Vec<String>,
}

impl DetokenizeJob {
    /// Parses and checks a body.
    pub fn parse(body: &[u8], limits: &ApiLimits) -> Result<DetokenizeJob, ApiError> {
        let mut fields = Fields::parse(body)?;
        limits.resolve_model(fields.take("model")?)?;
        let sent: Vec<i64> = fields.require("tokens")?;
        let tokens = validate::token_ids("tokens", &sent, limits.vocab_size)?;
        Ok(DetokenizeJob { tokens, ignored: fields.into_ignored() })
    }
}

/// The answer of `/detokenize`.
#[derive(Debug, Serialize)]
pub struct DetokenizeResponse {
    /// The text.
    pub prompt: String,
}

#[cfg(test)]
mod tests {
    use super::super::validate::limits_for_tests;
    use super::*;

    fn parse(body: &str) -> Result<TokenizeJob, ApiError> {
        TokenizeJob::parse(body.as_bytes(), &limits_for_tests())
    }

    #[test]
    fn a_text_and_a_conversation_are_both_accepted() {
        let text = parse(r#"{"prompt": "a"}"#).expect("valid");
        assert!(matches!(text.prompt, Prompt::Text { add_special_tokens: true, .. }));
        let chat = parse(r#"{"messages": [{"role": "user", "content": "a"}]}"#).expect("valid");
        assert!(matches!(chat.prompt, Prompt::Chat(prompt) if !prompt.add_special_tokens));
        assert!(parse("{}").is_err_and(|error| error.param.as_deref() == Some("prompt")));
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        let body = br#"{"tokens": [0, 300]}"#;
        let error = DetokenizeJob::parse(body, &limits_for_tests()).expect_err("refused");
        assert_eq!(error.param.as_deref(), Some("tokens[1]"));
    }
}
