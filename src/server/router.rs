//! Every route, and the layers around them.

use axum::Router;
use axum::http::{HeaderName, HeaderValue, Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::response::Response;
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{Any, CorsLayer};

use super::auth::require_key;
use super::chat::chat_completions;
use super::completions::completions;
use super::error::{ServerError, panic_response};
use super::models::{list_models, show_model};
use super::observe::{REQUEST_ID, observe};
use super::state::App;
use super::status::{health, load, metrics, ready, version};
use super::tokenize::{detokenize, tokenize};
use crate::api::{ApiError, ErrorKind};
use crate::config::ServerConfig;
use crate::engine::Engine;

/// Lists parameters that had no effect.
const IGNORED_PARAMS: HeaderName = HeaderName::from_static("x-ignored-params");

/// The whole HTTP interface of an engine.
pub fn router(engine: Engine, config: &ServerConfig) -> Router {
    let app = App::new(engine, config);
    // The innermost layer is listed first.
    guarded(&app)
        .merge(open())
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(CatchPanicLayer::custom(panic_response))
        .layer(from_fn_with_state(app.clone(), observe))
        .layer(cors())
        .with_state(app)
}

/// Routes that need a key.
fn guarded(app: &App) -> Router<App> {
    Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*model}", get(show_model))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route_layer(from_fn_with_state(app.clone(), require_key))
}

/// Routes for probes and scrapers, which hold no keys.
fn open() -> Router<App> {
    Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/ping", get(health).post(health))
        .route("/load", get(load))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
}

/// Browsers may call from anywhere; keys travel in a header, never in cookies.
fn cors() -> CorsLayer {
    CorsLayer::new()
        .allow_origin(Any)
        .allow_methods(Any)
        .allow_headers(Any)
        .expose_headers([REQUEST_ID, IGNORED_PARAMS])
}

async fn unknown_route(method: Method, uri: Uri) -> ServerError {
    let message = format!("There is no route {method} {}.", uri.path());
    ApiError::new(ErrorKind::NotFound, message).into()
}

async fn wrong_method(method: Method, uri: Uri) -> ServerError {
    let message = format!("The route {} does not take {method}.", uri.path());
    ApiError::new(ErrorKind::MethodNotAllowed, message).into()
}

/// Names the parameters that had no effect, as far as a header can carry them.
pub(super) fn with_ignored(mut response: Response, ignored: &[String]) -> Response {
    let printable = |name: &&String| name.bytes().all(|b| b.is_ascii_graphic() && b != b',');
    let names: Vec<&str> = ignored
        .iter()
        .filter(printable)
        .filter(|name| name.len() <= 64)
        .map(String::as_str)
        .collect();
    if let Ok(value) = HeaderValue::from_str(&names.join(","))
        && !names.is_empty()
    {
        response.headers_mut().insert(IGNORED_PARAMS, value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_parameters_are_listed_unless_they_cannot_be_written() {
        let names = ["store", "a b", "é", "x,y", "inner.y"].map(str::to_owned);
        let response = with_ignored(Response::default(), &names);
        assert_eq!(response.headers()[IGNORED_PARAMS], "store,inner.y");
        assert!(with_ignored(Response::default(), &[]).headers().is_empty());
    }
}
