//! `POST /v1/chat/completions`.

use axum::extract::{Extension, State};
use axum::response::Response;

use super::chat_collect;
use super::chat_stream::ChatStream;
use super::error::ServerError;
use super::limits::JsonBody;
use super::observe::{Exchange, RequestTag};
use super::outputs::Outputs;
use super::router::with_ignored;
use super::sse;
use super::state::App;
use crate::api::chat::{ChatCompletionRequest, ChatJob};

/// Answers a conversation, whole or as a stream.
pub(super) async fn chat_completions(
    State(app): State<App>,
    Extension(tag): Extension<RequestTag>,
    Extension(exchange): Extension<Exchange>,
    body: JsonBody,
) -> Result<Response, ServerError> {
    let request = body.parse(ChatCompletionRequest::parse).await?;
    let ChatJob { request, mut answer } = request.validate(&app.limits, &tag.0)?;
    let ignored = std::mem::take(&mut answer.reply.ignored);
    let generation = app.submit(request, answer.reply.shrinks_to_fit).await;
    let generation = generation.map_err(ServerError::in_chat)?;
    let prompt_token_ids = generation.prompt_token_ids.clone();
    let outputs = Outputs::new(vec![generation], answer.reply.n);
    let response = if answer.reply.stream {
        sse::respond(outputs, ChatStream::new(answer, &prompt_token_ids), exchange)
    } else {
        chat_collect::collect(outputs, answer, &prompt_token_ids).await?
    };
    Ok(with_ignored(response, &ignored))
}
