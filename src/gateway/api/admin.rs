//! `/admin/…`: models and adapters at run time. These routes exist only if an admin key is set.
//! Clients name things by id; no path is ever taken from a request.

mod upload;

use super::fields::Fields;
use super::{MAX_NAME, form};
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{AdapterSpec, AdapterVersion, ModelStatus};
use crate::gateway::store::hex;
use axum::Json;
use axum::body::to_bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// Maximum length of a JSON body of these routes, in bytes.
const MAX_JSON: usize = 64 << 10;

type Answer = Result<(StatusCode, Json<Value>), ApiError>;

/// `GET /admin/models`: loaded models with their engines and memory plans, models that are being
/// loaded, and models in the data folder.
///
/// # Errors
/// 500 if the data folder cannot be read.
pub async fn list_models(State(app): State<Arc<App>>) -> Answer {
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
pub async fn load_model(State(app): State<Arc<App>>, request: Request) -> Answer {
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
pub async fn unload_model(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer {
    let name = path_name(name)?;
    app.registry.unload_model(&name).await?;
    ok(json!({"id": name, "object": "model", "deleted": true}))
}

/// `GET /admin/adapters`: loaded adapters, and adapters in the data folder.
///
/// # Errors
/// 500 if the data folder cannot be read.
pub async fn list_adapters(State(app): State<Arc<App>>) -> Answer {
    let store = app.registry.store().clone();
    let stored = tokio::task::spawn_blocking(move || store.adapters())
        .await
        .map_err(ApiError::internal)?
        .map_err(ApiError::internal)?;
    let stored: Vec<_> = stored
        .into_iter()
        .map(|adapter| {
            json!({
                "source": adapter.name,
                "base": adapter.base_model,
                "format": adapter.format,
                "sha256": adapter.sha256,
                "bytes": adapter.bytes,
            })
        })
        .collect();
    let loaded: Vec<_> = app.registry.adapters().iter().map(|version| show(version)).collect();
    ok(json!({"object": "list", "data": loaded, "stored": stored}))
}

/// `POST /admin/adapters`: loads an adapter, or atomically replaces the one of the same name.
///
/// As JSON: `name`, `base`, `source` (an id in the adapters folder; `name` if absent), `scale`. As
/// `multipart/form-data`: the same fields, and either the file `adapter_config.json` with
/// `adapter_model.safetensors`, or one `.gguf`; they are kept in the adapters folder.
///
/// # Errors
/// As [`crate::gateway::registry::Registry::load_adapter`].
pub async fn load_adapter(State(app): State<Arc<App>>, request: Request) -> Answer {
    let mut upload = None;
    let (spec, source) = if form::is_form(&request) {
        let form = form::open(request).await?;
        let (spec, files) = upload::receive(&app, form).await?;
        upload = Some(files);
        let source = spec.name.clone();
        (spec, source)
    } else if form::essence(&request).eq_ignore_ascii_case("application/json") {
        let mut fields = json_fields(&app, request).await?;
        let name = fields.string("name", MAX_NAME)?.ok_or_else(|| fields.missing("name"))?;
        let base = fields.string("base", MAX_NAME)?;
        let source = fields.string("source", MAX_NAME)?.unwrap_or_else(|| name.clone());
        let scale = fields.number("scale", -100.0..=100.0)?.unwrap_or(1.0);
        fields.finish()?;
        let path = app.registry.adapter_path(&source).await?;
        (AdapterSpec { name, base, path, scale, check: false }, source)
    } else {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            "Send JSON that names an adapter in the data folder, or multipart/form-data with its \
             files.",
        ));
    };
    let version = app.registry.load_adapter(spec).await?;
    if let Some(upload) = upload {
        let (store, version) = (app.registry.store().clone(), version.clone());
        tokio::task::spawn_blocking(move || upload.keep(&store, &version))
            .await
            .map_err(ApiError::internal)??;
    }
    let mut shown = show(&version);
    shown["source"] = source.into();
    Ok((StatusCode::CREATED, Json(shown)))
}

/// `DELETE /admin/adapters/{name}`: running requests finish with the adapter, new ones get a 404.
///
/// # Errors
/// 404 if the adapter is not loaded.
pub async fn unload_adapter(
    State(app): State<Arc<App>>,
    name: Result<Path<String>, PathRejection>,
) -> Answer {
    let name = path_name(name)?;
    app.registry.unload_adapter(&name)?;
    ok(json!({"id": name, "object": "adapter", "deleted": true}))
}

fn show(version: &AdapterVersion) -> Value {
    json!({
        "id": version.name,
        "object": "adapter",
        "base": version.base(),
        "version": version.id.0,
        "created": version.created,
        "scale": version.scale,
        "sha256": hex(&version.digest),
        "info": version.info,
    })
}

fn ok(body: Value) -> Answer {
    Ok((StatusCode::OK, Json(body)))
}

fn path_name(name: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    name.map(|Path(name)| name)
        .map_err(|_| ApiError::bad_request("The name in the path is not valid UTF-8."))
}

async fn json_fields(app: &App, request: Request) -> Result<Fields, ApiError> {
    let read = to_bytes(request.into_body(), MAX_JSON);
    let body = tokio::time::timeout(app.config.listen.body_timeout, read)
        .await
        .map_err(|_| {
            let message = "The request's body did not arrive in time.";
            ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", message)
        })?
        .map_err(|_| ApiError::too_large(format!("The body is larger than {MAX_JSON} bytes.")))?;
    Fields::parse(&body)
}
