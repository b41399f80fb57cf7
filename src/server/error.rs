//! From failures to HTTP answers.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::api::{ApiError, ErrorKind};
use crate::engine::EngineError;
use crate::text::TextError;

/// Seconds after which a refused client may try again.
const RETRY_AFTER_SECONDS: u64 = 1;

/// A failure and what the connection does about it.
#[derive(Debug)]
pub(super) struct ServerError {
    api: ApiError,
    retry_after: Option<u64>,
    /// The client should come back over a new connection, perhaps to another replica.
    close: bool,
}

impl From<ApiError> for ServerError {
    fn from(api: ApiError) -> ServerError {
        ServerError { api, retry_after: None, close: false }
    }
}

impl From<TextError> for ServerError {
    fn from(error: TextError) -> ServerError {
        text_error(&error).into()
    }
}

impl From<EngineError> for ServerError {
    fn from(error: EngineError) -> ServerError {
        let message = sentence(&error.to_string());
        match error {
            EngineError::PromptTooLong { .. }
            | EngineError::EmptyPrompt
            | EngineError::TokenOutOfRange { .. } => ApiError::invalid("prompt", message).into(),
            EngineError::OutputTooLong { .. } => ApiError::invalid("max_tokens", message).into(),
            EngineError::Text(error) => text_error(&error).into(),
            EngineError::QueueFull { .. } => ServerError {
                api: ApiError::new(ErrorKind::Unavailable, message),
                retry_after: Some(RETRY_AFTER_SECONDS),
                close: false,
            },
            EngineError::Draining => ServerError {
                api: ApiError::new(ErrorKind::Unavailable, message),
                retry_after: Some(RETRY_AFTER_SECONDS),
                close: true,
            },
            EngineError::Dead(_) => ApiError::new(ErrorKind::Unavailable, message).into(),
        }
    }
}

impl ServerError {
    /// Blames `messages` instead of `prompt`: what a chat client calls its prompt.
    pub fn in_chat(mut self) -> ServerError {
        if self.api.param.as_deref() == Some("prompt") {
            self.api.param = Some("messages".to_owned());
        }
        self
    }
}

fn text_error(error: &TextError) -> ApiError {
    let message = sentence(&error.to_string());
    if error.is_request_error() {
        ApiError::new(ErrorKind::BadRequest, message)
    } else {
        ApiError::new(ErrorKind::Internal, message)
    }
}

/// `the prompt is empty` becomes `The prompt is empty.`
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars.next().into_iter().flat_map(char::to_uppercase).collect();
    let end = if text.ends_with(['.', '!', '?']) { "" } else { "." };
    format!("{first}{}{end}", chars.as_str())
}

impl IntoResponse for ServerError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.api.kind.status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(status = status.as_u16(), "{}", self.api);
        } else {
            tracing::debug!(status = status.as_u16(), param = self.api.param, "{}", self.api);
        }
        let mut response = (status, Json(self.api.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.api.kind == ErrorKind::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A handler panicked: the connection lives on, the client gets a 500.
pub(super) fn panic_response(panic: Box<dyn std::any::Any + Send>) -> Response {
    let reason = panic
        .downcast_ref::<&str>()
        .map(|reason| (*reason).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    drop(panic);
    tracing::error!(reason, "a handler panicked");
    let message = "The server failed while it answered this request; see its log.";
    ServerError::from(ApiError::new(ErrorKind::Internal, message)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_asks_to_come_back() {
        let response = ServerError::from(EngineError::QueueFull { limit: 2 }).into_response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["retry-after"], "1");
        assert!(!response.headers().contains_key("connection"));
    }

    #[test]
    fn a_draining_server_closes_the_connection() {
        let response = ServerError::from(EngineError::Draining).into_response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()["connection"], "close");
    }

    #[test]
    fn engine_errors_become_sentences_with_a_parameter() {
        let error = EngineError::PromptTooLong { prompt_tokens: 9, max_model_len: 8 };
        let error = ServerError::from(error).in_chat();
        assert_eq!(error.api.param.as_deref(), Some("messages"));
        assert!(error.api.message.starts_with("The prompt has 9 tokens"), "{}", error.api);
        assert!(error.api.message.ends_with('.'));
    }

    #[test]
    fn a_panic_is_an_internal_error_without_details() {
        let response = panic_response(Box::new("secret"));
        assert_eq!(response.status(), 500);
    }
}
