//! `GET /v1/models` and `GET /v1/models/{model}`.

use axum::Json;
use axum::extract::{Path, State};

use super::error::ServerError;
use super::state::App;
use crate::api::ApiError;
use crate::api::models::{ModelCard, ModelList};

/// One card per public name.
pub(super) async fn list_models(State(app): State<App>) -> Json<ModelList> {
    let cards = app.limits.served_model_names.iter().map(|name| card(&app, name));
    Json(ModelList::new(cards.collect()))
}

/// The card of one name.
pub(super) async fn show_model(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<ModelCard>, ServerError> {
    if app.limits.served_model_names.contains(&name) {
        Ok(Json(card(&app, &name)))
    } else {
        Err(ApiError::unknown_model(&name).into())
    }
}

fn card(app: &App, name: &str) -> ModelCard {
    let model = app.engine.model();
    ModelCard::new(name, &model.root, model.created, model.max_model_len)
}
