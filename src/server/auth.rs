//! API keys: `Authorization: Bearer KEY`.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};

use super::error::ServerError;
use super::state::App;
use crate::api::{ApiError, ErrorKind};

/// Digests of the accepted keys; the keys themselves are not kept.
pub(super) struct Keys(Vec<[u8; 32]>);

impl Keys {
    pub fn new(keys: &[String]) -> Keys {
        Keys(keys.iter().map(|key| digest(key.as_bytes())).collect())
    }

    /// True when the headers hold an accepted key, or none is needed.
    fn accept(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Some(presented) = bearer(headers) else { return false };
        let presented = digest(presented);
        // Digests are compared in full, over all keys, so that timing tells nothing.
        self.0.iter().fold(false, |found, key| found | same(key, &presented))
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b))) == 0
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

/// Refuses requests without an accepted key.
pub(super) async fn require_key(
    State(app): State<App>,
    request: Request,
    next: Next,
) -> Result<Response, ServerError> {
    if app.keys.accept(request.headers()) {
        return Ok(next.run(request).await);
    }
    let message = "No valid API key: send the header `Authorization: Bearer KEY`.";
    Err(ApiError::new(ErrorKind::Unauthorized, message).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepts(keys: &[&str], authorization: Option<&'static str>) -> bool {
        let keys: Vec<String> = keys.iter().map(|&key| key.to_owned()).collect();
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(header::AUTHORIZATION, value.parse().expect("a header"));
        }
        Keys::new(&keys).accept(&headers)
    }

    #[test]
    fn without_keys_everyone_is_accepted() {
        assert!(accepts(&[], None));
    }

    #[test]
    fn any_of_the_keys_opens_the_door() {
        for value in ["Bearer one", "Bearer two", "bearer two", "Bearer  two "] {
            assert!(accepts(&["one", "two"], Some(value)), "{value}");
        }
    }

    #[test]
    fn all_else_is_refused() {
        for value in
            [None, Some("Bearer"), Some("Bearer "), Some("Bearer three"), Some("Basic one")]
        {
            assert!(!accepts(&["one", "two"], value), "{value:?}");
        }
    }
}
