//! What a client is told when a request cannot be served.

use std::fmt::Display;

use serde::Serialize;

/// The classes of failure a client can tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is wrong; sending it again will not help.
    BadRequest,
    /// No key, or a wrong one.
    Unauthorized,
    /// No such route or model.
    NotFound,
    /// The route exists, but not for this method.
    MethodNotAllowed,
    /// The body is larger than the server reads.
    PayloadTooLarge,
    /// The server failed.
    Internal,
    /// The server cannot take the request now; sending it again later may help.
    Unavailable,
}

impl ErrorKind {
    /// The HTTP status, which is also the `code` in the body.
    pub fn status(self) -> u16 {
        match self {
            ErrorKind::BadRequest => 400,
            ErrorKind::Unauthorized => 401,
            ErrorKind::NotFound => 404,
            ErrorKind::MethodNotAllowed => 405,
            ErrorKind::PayloadTooLarge => 413,
            ErrorKind::Internal => 500,
            ErrorKind::Unavailable => 503,
        }
    }

    /// The `type` in the body.
    pub fn type_name(self) -> &'static str {
        match self {
            ErrorKind::BadRequest | ErrorKind::PayloadTooLarge => "BadRequestError",
            ErrorKind::Unauthorized => "AuthenticationError",
            ErrorKind::NotFound => "NotFoundError",
            ErrorKind::MethodNotAllowed => "MethodNotAllowedError",
            ErrorKind::Internal => "InternalServerError",
            ErrorKind::Unavailable => "ServiceUnavailable",
        }
    }
}

/// One failure, in the client's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Which class.
    pub kind: ErrorKind,
    /// What is wrong and what would be right.
    pub message: String,
    /// The parameter at fault, as a path into the body: `messages[0].role`.
    pub param: Option<String>,
}

impl ApiError {
    /// A failure with no parameter to blame.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> ApiError {
        ApiError { kind, message: message.into(), param: None }
    }

    /// A wrong parameter.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        let param = Some(param.into());
        ApiError { kind: ErrorKind::BadRequest, message: message.into(), param }
    }

    /// A value outside its range: names parameter, value and range.
    pub fn out_of_range(param: &str, value: impl Display, expected: &str) -> ApiError {
        ApiError::invalid(param, format!("`{param}` is {value}, but must be {expected}."))
    }

    /// A feature that would change the answer and that this server does not have.
    pub fn unsupported(param: &str, advice: &str) -> ApiError {
        ApiError::invalid(param, format!("`{param}` is not supported: {advice}."))
    }

    /// A model that is not served here.
    pub fn unknown_model(name: &str) -> ApiError {
        ApiError {
            kind: ErrorKind::NotFound,
            message: format!("The model `{name}` does not exist. GET /v1/models lists what does."),
            param: Some("model".to_owned()),
        }
    }

    /// The body: `{"error": {"message", "type", "param", "code"}}`.
    pub fn body(&self) -> ErrorBody<'_> {
        ErrorBody {
            error: ErrorDetail {
                message: &self.message,
                kind: self.kind.type_name(),
                param: self.param.as_deref(),
                code: self.kind.status(),
            },
        }
    }
}

/// The error object on the wire.
#[derive(Debug, Serialize)]
pub struct ErrorBody<'a> {
    error: ErrorDetail<'a>,
}

#[derive(Debug, Serialize)]
struct ErrorDetail<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_body_has_the_shape_that_openai_clients_read() {
        let error = ApiError::out_of_range("top_p", 2, "above 0 and at most 1");
        let body = serde_json::to_value(error.body()).expect("serialises");
        assert_eq!(
            body,
            serde_json::json!({"error": {
                "message": "`top_p` is 2, but must be above 0 and at most 1.",
                "type": "BadRequestError", "param": "top_p", "code": 400,
            }})
        );
    }
}
