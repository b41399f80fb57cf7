//! What operators and probes ask: health, readiness, load, version, metrics.

use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Value, json};

use super::error::ServerError;
use super::state::App;
use crate::engine::{EngineError, EngineStatus};

/// 200 while the engine lives, 503 once it has failed: restart me.
pub(super) async fn health(State(app): State<App>) -> Result<(), ServerError> {
    match app.engine.status() {
        EngineStatus::Ready | EngineStatus::Draining => Ok(()),
        EngineStatus::Dead(reason) => Err(EngineError::Dead(reason).into()),
    }
}

/// 200 while new requests are taken: send me traffic.
pub(super) async fn ready(State(app): State<App>) -> Result<(), ServerError> {
    match app.engine.status() {
        EngineStatus::Ready => Ok(()),
        EngineStatus::Draining => Err(EngineError::Draining.into()),
        EngineStatus::Dead(reason) => Err(EngineError::Dead(reason).into()),
    }
}

/// Requests being answered, this one not counted.
pub(super) async fn load(State(app): State<App>) -> Json<Value> {
    let load = app.load.load(Ordering::Relaxed).saturating_sub(1);
    Json(json!({"server_load": load}))
}

/// The version of this program.
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// The Prometheus exposition.
pub(super) async fn metrics(State(app): State<App>) -> impl IntoResponse {
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], app.engine.metrics().render())
}
