//! `/admin/models`: loading, unloading and quantizing models at run time.

use super::{Answer, jobs, json_fields, ok, path_name};
use crate::gateway::api::wire::MAX_NAME;
use crate::gateway::api::wire::fields::{Fields, without_mark};
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::registry::ModelStatus;
use crate::job::{JobSpec, QuantizeSpec};
use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, Request, State};
use axum::response::Response;
use http::StatusCode;
use serde_json::{Map, Value, json};
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

/// `POST /admin/models/{name}/quantize`: creates a job that writes the model in another type. The
/// body holds the settings of [`crate::job::QuantizeSettings`] and the `name` of the new model.
///
/// # Errors
/// As [`crate::gateway::jobs::Jobs::create`].
pub async fn of_model(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    path: Result<Path<String>, PathRejection>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let path = path_name(path)?;
    // Names contain slashes, so the route matches all paths below `/admin/models`.
    let Some(model) = path.strip_suffix("/quantize") else {
        let path: String = path.chars().take(200).collect();
        let message = format!("There is no route POST /admin/models/{path}; see /openapi.json.");
        return Err(ApiError::not_found(message));
    };
    // Returns the error if the body is not JSON or not an object.
    Fields::parse(&body)?;
    let wrong = |why: &dyn std::fmt::Display| {
        ApiError::bad_request(format!("The settings are not valid: {why}."))
    };
    let mut settings: Map<String, Value> =
        serde_json::from_slice(without_mark(&body)).map_err(|error| wrong(&error))?;
    let mut spec = json!({"kind": "quantize", "model": model});
    if let Some(name) = settings.remove("name") {
        spec["name"] = name;
    }
    spec["quantize"] = Value::Object(settings);
    let spec: QuantizeSpec = serde_json::from_value(spec).map_err(|error| wrong(&error))?;
    jobs::created(&app, identity, JobSpec::Quantize(spec)).await
}
