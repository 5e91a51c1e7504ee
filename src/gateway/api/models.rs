//! `GET /v1/models` and `GET /v1/models/{id}`: names that requests may use as `model`.

use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::ModelCard;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;
use std::sync::Arc;

/// A list of models. There is only one page.
#[derive(Debug, Serialize)]
pub struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

/// `GET /v1/models`: models, then adapters.
pub async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    Json(ModelList { object: "list", data: app.registry.list() })
}

/// `GET /v1/models/{id}`. Ids may contain slashes and colons.
///
/// # Errors
/// 404 `model_not_found`.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelCard>, ApiError> {
    let Path(id) = id.map_err(|_| ApiError::bad_request("The model's name is not valid UTF-8."))?;
    app.registry.card(&id).map(Json)
}
