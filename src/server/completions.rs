//! `POST /v1/completions`.

use axum::extract::{Extension, State};
use axum::response::Response;

use super::completion_collect;
use super::completion_stream::CompletionStream;
use super::error::ServerError;
use super::limits::JsonBody;
use super::observe::{Exchange, RequestTag};
use super::outputs::Outputs;
use super::router::with_ignored;
use super::sse;
use super::state::App;
use crate::api::completions::{CompletionJob, CompletionRequest};
use crate::engine::Generation;
use crate::request::{GenerateRequest, Prompt};

/// Continues one or more prompts, whole or as a stream.
pub(super) async fn completions(
    State(app): State<App>,
    Extension(tag): Extension<RequestTag>,
    Extension(exchange): Extension<Exchange>,
    body: JsonBody,
) -> Result<Response, ServerError> {
    let request = body.parse(CompletionRequest::parse).await?;
    let CompletionJob { requests, mut reply, echo } = request.validate(&app.limits, &tag.0)?;
    let ignored = std::mem::take(&mut reply.ignored);
    let mut generations = Vec::with_capacity(requests.len());
    let mut prompts = Vec::with_capacity(requests.len());
    for request in requests {
        let generation = app.submit(request.clone(), reply.shrinks_to_fit).await?;
        prompts.push(SubmittedPrompt::new(&app, request, &generation, echo));
        generations.push(generation);
    }
    let outputs = Outputs::new(generations, reply.n);
    let response = if reply.stream {
        sse::respond(outputs, CompletionStream::new(reply, prompts), exchange)
    } else {
        completion_collect::collect(outputs, reply, prompts).await?
    };
    Ok(with_ignored(response, &ignored))
}

/// What the answer needs to know about a prompt.
pub(super) struct SubmittedPrompt {
    /// The prompt as the model sees it.
    pub token_ids: Vec<u32>,
    /// Its text, when it is to come before the output.
    pub echo: Option<String>,
}

impl SubmittedPrompt {
    fn new(
        app: &App,
        request: GenerateRequest,
        generation: &Generation,
        echo: bool,
    ) -> SubmittedPrompt {
        let token_ids = generation.prompt_token_ids.to_vec();
        let skips_special = request.output.skip_special_tokens;
        let echo = echo.then(|| match request.prompt {
            Prompt::Text { text, .. } if request.truncate_prompt_tokens.is_none() => text,
            _ => app.engine.text().tokenizer().decode(&token_ids, skips_special),
        });
        SubmittedPrompt { token_ids, echo }
    }
}
