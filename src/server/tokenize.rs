//! `POST /tokenize` and `POST /detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};

use super::error::ServerError;
use super::limits::JsonBody;
use super::router::with_ignored;
use super::state::App;
use crate::api::tokenize::{DetokenizeJob, DetokenizeResponse, TokenizeJob, TokenizeResponse};

/// Shows the token ids of a text or a conversation.
pub(super) async fn tokenize(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Response, ServerError> {
    let limits = Arc::clone(&app.limits);
    let job = body.parse(move |bytes| TokenizeJob::parse(bytes, &limits)).await?;
    let text = Arc::clone(app.engine.text());
    let max_model_len = app.limits.max_model_len;
    let TokenizeJob { prompt, return_token_strs, ignored } = job;
    let answer = blocking(move || {
        let tokens = text.prompt_token_ids(&prompt)?;
        let strings = |id: &u32| text.tokenizer().token(*id).unwrap_or_default();
        let token_strs = return_token_strs.then(|| tokens.iter().map(strings).collect());
        Ok(TokenizeResponse { count: tokens.len(), max_model_len, tokens, token_strs })
    });
    Ok(with_ignored(Json(answer.await?).into_response(), &ignored))
}

/// Shows the text of token ids.
pub(super) async fn detokenize(
    State(app): State<App>,
    body: JsonBody,
) -> Result<Response, ServerError> {
    let limits = Arc::clone(&app.limits);
    let job = body.parse(move |bytes| DetokenizeJob::parse(bytes, &limits)).await?;
    let text = Arc::clone(app.engine.text());
    let DetokenizeJob { tokens, ignored } = job;
    let prompt = blocking(move || Ok(text.tokenizer().decode(&tokens, false))).await?;
    Ok(with_ignored(Json(DetokenizeResponse { prompt }).into_response(), &ignored))
}

/// Runs text work on the blocking pool.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ServerError> + Send + 'static,
) -> Result<T, ServerError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}
