//! `/admin/models`: loading and unloading models at run time.

use super::{Answer, json_fields, ok, path_name};
use crate::gateway::api::wire::MAX_NAME;
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::ModelStatus;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use http::StatusCode;
use serde_json::json;
use std::sync::Arc;

/// `GET /admin/models`: loaded models with their engines and memory plans, models that are being
/// loaded, and models in the data folder.
///
/// # Errors
/// 500 if the data folder cannot be read.
pub async fn list(State(app): State<Arc<App>>) -> Answer {
    let store = app.registry.store().clone();
    let stored = tokio::task::spawn_blocking(move || store.models())
        .await
        .map_err(ApiError::internal)?
        .map_err(ApiError::internal)?;
    let stored: Vec<_> = stored
        .into_iter()
        .map(|model| {
            json!({
                "name": model.name,
                "source": model.source,
                "sha256": model.sha256,
                "bytes": model.bytes,
            })
        })
        .collect();
    let loaded: Vec<ModelStatus> = app.registry.status();
    let loading = app.registry.loading();
    ok(json!({"object": "list", "data": loaded, "loading": loading, "stored": stored}))
}

/// `POST /admin/models`: loads `model`, a name or reference that the data folder knows, and serves
/// it as `name`. Responds once the model accepts requests.
///
/// # Errors
/// As [`crate::gateway::registry::Registry::load_model`].
pub async fn load(State(app): State<Arc<App>>, request: Request) -> Answer {
    let mut fields = json_fields(&app, request).await?;
    let reference = fields.string("model", MAX_NAME)?.ok_or_else(|| fields.missing("model"))?;
    let name = fields.string("name", MAX_NAME)?;
    fields.finish()?;
    let model = app.registry.load_model(&reference, name.as_deref()).await?;
    let card = app.registry.card(&model.name)?;
    Ok((StatusCode::CREATED, Json(json!({"model": card, "memory": model.plan}))))
}

/// `DELETE /admin/models/{name}`: new requests get a 404 at once, running ones finish. Responds
/// once the engine process has ended.
///
/// # Errors
/// 404 if the model is not loaded.
pub async fn unload(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer {
    let name = path_name(name)?;
    app.registry.unload_model(&name).await?;
    ok(json!({"id": name, "object": "model", "deleted": true}))
}
