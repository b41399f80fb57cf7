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
        let echo = echo.then(|| Echo::of(&request));
        let generation = app.submit(request, reply.shrinks_to_fit).await?;
        prompts.push(SubmittedPrompt::new(&app, &generation, echo));
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
    fn new(app: &App, generation: &Generation, echo: Option<Echo>) -> SubmittedPrompt {
        let token_ids = generation.prompt_token_ids.to_vec();
        let echo = echo.map(|echo| match echo {
            Echo::Text(text) => text,
            Echo::Decoded { skip_special_tokens } => {
                app.engine.text().tokenizer().decode(&token_ids, skip_special_tokens)
            }
        });
        SubmittedPrompt { token_ids, echo }
    }
}

/// Where the text of an echoed prompt comes from.
enum Echo {
    /// From the request, to the letter.
    Text(String),
    /// From the tokens, because there was no text or not all of it was used.
    Decoded { skip_special_tokens: bool },
}

impl Echo {
    fn of(request: &GenerateRequest) -> Echo {
        match &request.prompt {
            Prompt::Text { text, .. } if request.truncate_prompt_tokens.is_none() => {
                Echo::Text(text.clone())
            }
            _ => Echo::Decoded { skip_special_tokens: request.output.skip_special_tokens },
        }
    }
}
