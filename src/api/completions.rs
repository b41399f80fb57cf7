//! `POST /v1/completions`: the request as sent, and its validation.

use serde::Deserialize;
use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use super::options::{GenerationFields, ReplyOptions};
use super::unsupported;
use super::validate::{self, ApiLimits, EndpointOptions};
use crate::request::{GenerateRequest, Prompt};

/// Output length of completions that do not give one.
const DEFAULT_MAX_TOKENS: u32 = 16;
/// Most prompts per request.
const MAX_PROMPTS: usize = 1024;

/// The four spellings of a prompt.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a string, a list of strings, a list of token ids or a list of lists of \
                 token ids"
)]
pub enum PromptField {
    /// `"text"`
    Text(String),
    /// `[1, 2]`
    Tokens(Vec<i64>),
    /// `["a", "b"]`
    Texts(Vec<String>),
    /// `[[1, 2], [3]]`
    TokenLists(Vec<Vec<i64>>),
}

impl PromptField {
    /// One prompt per entry.
    fn into_prompts(
        self,
        add_special_tokens: bool,
        vocab_size: usize,
    ) -> Result<Vec<Prompt>, ApiError> {
        let text = |text| Prompt::Text { text, add_special_tokens };
        match self {
            PromptField::Text(sent) => Ok(vec![text(sent)]),
            PromptField::Texts(list) => Ok(list.into_iter().map(text).collect()),
            // An empty list reads as a list of ids; it holds no prompt either way.
            PromptField::Tokens(ids) if ids.is_empty() => Ok(Vec::new()),
            PromptField::Tokens(ids) => {
                Ok(vec![Prompt::Tokens(validate::token_ids("prompt", &ids, vocab_size)?)])
            }
            PromptField::TokenLists(lists) => {
                let tokens = |(i, ids): (usize, &Vec<i64>)| {
                    validate::token_ids(&format!("prompt[{i}]"), ids, vocab_size)
                        .map(Prompt::Tokens)
                };
                lists.iter().enumerate().map(tokens).collect()
            }
        }
    }
}

/// The body of `POST /v1/completions`, as sent.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    generation: GenerationFields,
    prompt: PromptField,
    add_special_tokens: bool,
    logprobs: Option<i64>,
    echo: bool,
    best_of: Option<i64>,
    ignored: Vec<String>,
}

/// A validated completion.
#[derive(Clone, Debug)]
pub struct CompletionJob {
    /// One per prompt, for the engine.
    pub requests: Vec<GenerateRequest>,
    /// How to answer.
    pub reply: ReplyOptions,
    /// Put the prompt before the output.
    pub echo: bool,
}

impl CompletionRequest {
    /// Parses a body.
    pub fn parse(body: &[u8]) -> Result<CompletionRequest, ApiError> {
        let mut fields = Fields::parse(body)?;
        unsupported::refuse_everywhere(&mut fields)?;
        unsupported::refuse_in_completions(&mut fields)?;
        Ok(CompletionRequest {
            generation: GenerationFields::take(&mut fields)?,
            prompt: take_prompt(&mut fields)?,
            add_special_tokens: fields.take_or("add_special_tokens", true)?,
            logprobs: fields.take("logprobs")?,
            echo: fields.take_or("echo", false)?,
            best_of: fields.take("best_of")?,
            ignored: fields.into_ignored(),
        })
    }

    /// Checks every value. `transport_tag` names the request unless the body does.
    pub fn validate(
        self,
        limits: &ApiLimits,
        transport_tag: &str,
    ) -> Result<CompletionJob, ApiError> {
        let scores_prompt = self.echo || self.generation.prompt_logprobs.is_some();
        let endpoint = EndpointOptions {
            prefix: "cmpl",
            default_max_tokens: Some(DEFAULT_MAX_TOKENS),
            allows_no_output: scores_prompt,
            logprobs: validate::num_logprobs("logprobs", self.logprobs, limits)?,
            echo: self.echo,
        };
        let tag = validate::request_tag(self.generation.request_id.as_deref(), transport_tag)?;
        let mut validated = validate::validate(&self.generation, &endpoint, limits, &tag)?;
        validated.reply.ignored = self.ignored;
        if self.best_of.is_some_and(|best_of| best_of != i64::from(validated.reply.n)) {
            return Err(ApiError::unsupported("best_of", "ask for `n` continuations instead"));
        }
        let prompts = self.prompt.into_prompts(self.add_special_tokens, limits.vocab_size)?;
        if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
            let message = format!(
                "`prompt` holds {} prompts, but must hold from 1 to {MAX_PROMPTS}.",
                prompts.len()
            );
            return Err(ApiError::invalid("prompt", message));
        }
        let requests = prompts.into_iter().enumerate();
        let requests = requests.map(|(i, prompt)| validated.request(i, prompt)).collect();
        Ok(CompletionJob { requests, reply: validated.reply, echo: self.echo })
    }
}

/// Takes `prompt`, and says which element is wrong when a list is mixed.
fn take_prompt(fields: &mut Fields) -> Result<PromptField, ApiError> {
    let Some(value) = fields.take_value("prompt") else {
        return Err(ApiError::invalid("prompt", "`prompt` is required, but missing."));
    };
    let param = match &value {
        Value::Array(list) => {
            first_odd_one(list).map_or("prompt".to_owned(), |i| format!("prompt[{i}]"))
        }
        _ => "prompt".to_owned(),
    };
    PromptField::deserialize(value).map_err(|error| {
        ApiError::invalid(param.as_str(), format!("`{param}` has a wrong value: {error}."))
    })
}

/// The first element of another kind than the first one.
fn first_odd_one(list: &[Value]) -> Option<usize> {
    let kind = |value: &Value| std::mem::discriminant(value);
    let first = kind(list.first()?);
    list.iter().position(|value| kind(value) != first)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::validate::limits_for_tests;
    use super::*;

    fn job(body: &Value) -> Result<CompletionJob, ApiError> {
        let request = CompletionRequest::parse(body.to_string().as_bytes())?;
        request.validate(&limits_for_tests(), "tag")
    }

    fn prompts(prompt: &Value) -> Vec<Prompt> {
        let job = job(&json!({"prompt": prompt})).expect("valid");
        job.requests.into_iter().map(|request| request.prompt).collect()
    }

    #[test]
    fn every_spelling_of_a_prompt_is_understood() {
        assert!(
            matches!(&prompts(&json!("a"))[..], [Prompt::Text { text, add_special_tokens: true }] if text == "a")
        );
        assert_eq!(prompts(&json!(["a", "b"])).len(), 2);
        assert!(matches!(&prompts(&json!([1, 2]))[..], [Prompt::Tokens(ids)] if ids == &[1, 2]));
        assert!(
            matches!(&prompts(&json!([[1], [2, 3]]))[1], Prompt::Tokens(ids) if ids == &[2, 3])
        );
    }

    #[test]
    fn wrong_prompts_name_their_place() {
        for (prompt, param) in [
            (json!([]), "prompt"),
            (json!(null), "prompt"),
            (json!(3), "prompt"),
            (json!([1, "a"]), "prompt[1]"),
            (json!([5, 300]), "prompt[1]"),
            (json!([[5], [-1]]), "prompt[1][0]"),
            (json!(vec!["x"; 1025]), "prompt"),
        ] {
            let error = job(&json!({"prompt": prompt})).expect_err("refused");
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
    }

    #[test]
    fn sixteen_tokens_is_the_default_length() {
        let job = job(&json!({"prompt": "a", "max_tokens": null})).expect("valid");
        assert_eq!(job.requests[0].stop.max_tokens, Some(16));
    }

    #[test]
    fn scoring_a_prompt_may_generate_nothing() {
        assert!(job(&json!({"prompt": "a", "max_tokens": 0})).is_err());
        let scored = job(&json!({"prompt": "a", "max_tokens": 0, "echo": true, "logprobs": 2}));
        let scored = scored.expect("valid");
        assert_eq!(scored.requests[0].sampling.prompt_logprobs, Some(2));
        assert_eq!(scored.requests[0].stop.max_tokens, Some(0));
    }

    #[test]
    fn parameters_that_cannot_be_honoured_are_refused() {
        for (name, value) in
            [("suffix", json!("x")), ("best_of", json!(2)), ("logprobs", json!(21))]
        {
            let error = job(&json!({"prompt": "a", name: value})).expect_err(name);
            assert_eq!(error.param.as_deref(), Some(name));
        }
    }

    #[test]
    fn each_prompt_has_its_own_engine_id() {
        let job = job(&json!({"prompt": ["a", "b"], "request_id": "r"})).expect("valid");
        assert_eq!(job.reply.id, "cmpl-r");
        assert!(job.requests[0].id.0.starts_with("cmpl-r-0-"));
        assert!(job.requests[1].id.0.starts_with("cmpl-r-1-"));
    }
}
