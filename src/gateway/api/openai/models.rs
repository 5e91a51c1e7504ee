//! `/v1/models`: names that requests may use as `model`.

use super::files::seen_by;
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::registry::ModelCard;
use crate::gateway::store::StoredJob;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State};
use serde::Serialize;
use serde_json::{Value, json};
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

/// `DELETE /v1/models/{id}`: deletes a model that a job made, with the models of the job's
/// checkpoints, or one checkpoint model alone. Running requests finish with the model. Checkpoint
/// models that published names need are kept, and listed as `kept`.
///
/// # Errors
/// 404 if the model does not exist, 403 if it was not made by a job of this key, 409 if a published
/// name needs it.
pub async fn delete(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) =
        name.map_err(|_| ApiError::bad_request("The model's name is not valid UTF-8."))?;
    let owner = seen_by(&app, identity);
    let jobs = app.jobs.store().jobs(owner.as_deref()).map_err(ApiError::internal)?;
    let made = |job: &StoredJob| {
        job.makes_model() && job.name == name
            || name.strip_prefix(&*job.name).is_some_and(|n| n.starts_with(":ckpt-step-"))
    };
    let Some(job) = jobs.iter().find(|job| made(job)) else {
        app.registry.card(&name)?;
        return Err(ApiError::new(
            http::StatusCode::FORBIDDEN,
            "invalid_request_error",
            "Only models that your fine-tuning jobs made can be deleted.",
        )
        .with_param("model"));
    };
    let _no_publication = app.registry.pause_publications().await;
    app.registry.check_deletable(&name)?;
    if !app.jobs.forget(job, &name).await? {
        return Err(ApiError::model_not_found(&name));
    }
    let mut deleted = json!({"id": name, "object": "model", "deleted": true});
    if name == job.name {
        let kept = app.jobs.forget_checkpoints(job)?;
        if !kept.is_empty() {
            deleted["kept"] = json!(kept);
        }
    }
    Ok(Json(deleted))
}
