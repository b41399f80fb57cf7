//! Reading a JSON body: of the right type, not too large, not forever.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use tokio_stream::StreamExt;

use super::error::ServerError;
use super::state::App;
use crate::api::{ApiError, ErrorKind};

/// A client that sends nothing for this long is not coming back.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// From this size on, parsing moves off the threads that serve connections.
const LARGE_BODY_BYTES: usize = 64 << 10;

/// The bytes of a JSON body.
pub(super) struct JsonBody(Bytes);

impl JsonBody {
    /// Parses the body, large ones on the blocking pool.
    pub async fn parse<T: Send + 'static>(
        self,
        parse: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ServerError> {
        if self.0.len() < LARGE_BODY_BYTES {
            return Ok(parse(&self.0)?);
        }
        let parsed = tokio::task::spawn_blocking(move || parse(&self.0)).await;
        Ok(parsed.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?)
    }
}

impl FromRequest<App> for JsonBody {
    type Rejection = ServerError;

    async fn from_request(request: Request, app: &App) -> Result<JsonBody, ServerError> {
        check_content_type(request.headers())?;
        let limit = app.max_body_bytes;
        let announced = request.headers().get(header::CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if announced.is_some_and(|length| length > limit) {
            return Err(too_large(limit).into());
        }
        let mut body = Vec::with_capacity(announced.unwrap_or(0));
        let mut stream = request.into_body().into_data_stream();
        loop {
            let chunk = tokio::time::timeout(STALL_TIMEOUT, stream.next());
            match chunk.await.map_err(|_| unreadable("no data arrived for 30 seconds"))? {
                None => return Ok(JsonBody(body.into())),
                Some(Err(error)) => return Err(unreadable(&error.to_string()).into()),
                Some(Ok(chunk)) if body.len() + chunk.len() > limit => {
                    return Err(too_large(limit).into());
                }
                Some(Ok(chunk)) => body.extend_from_slice(&chunk),
            }
        }
    }
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let sent = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = sent.unwrap_or("").split(';').next().unwrap_or("").trim();
    let is_json = media_type.eq_ignore_ascii_case("application/json")
        || media_type.to_ascii_lowercase().ends_with("+json");
    if is_json {
        return Ok(());
    }
    let message = "The header `Content-Type` must be `application/json`.";
    Err(ApiError::new(ErrorKind::BadRequest, message))
}

fn too_large(limit: usize) -> ApiError {
    let message =
        format!("The request body is larger than {limit} bytes, the server's --max-body-size.");
    ApiError::new(ErrorKind::PayloadTooLarge, message)
}

fn unreadable(reason: &str) -> ApiError {
    let message = format!("The request body could not be read: {reason}.");
    ApiError::new(ErrorKind::BadRequest, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_media_types_are_told_from_others() {
        for (value, is_json) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("application/vnd.api+json", true),
            ("text/plain", false),
            ("", false),
        ] {
            let headers =
                HeaderMap::from_iter([(header::CONTENT_TYPE, value.parse().expect("a header"))]);
            assert_eq!(check_content_type(&headers).is_ok(), is_json, "{value}");
        }
        assert!(check_content_type(&HeaderMap::new()).is_err());
    }
}
