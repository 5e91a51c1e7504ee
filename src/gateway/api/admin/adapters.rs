//! `/admin/adapters`: loading and unloading adapters at run time.

use super::{Answer, json_fields, ok, path_name, upload};
use crate::gateway::api::wire::{MAX_NAME, form};
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{AdapterSpec, AdapterVersion};
use crate::gateway::store::hex;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /admin/adapters`: loaded adapters, and adapters in the data folder.
///
/// # Errors
/// 500 if the data folder cannot be read.
pub async fn list(State(app): State<Arc<App>>) -> Answer {
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
/// As [`crate::gateway::registry::Registry::load_adapter`]; 409 if a published name stands for the
/// adapter and `source` is another one.
pub async fn load(State(app): State<Arc<App>>, request: Request) -> Answer {
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
        if source != name {
            // A restart would load the adapter of the data folder that has this name.
            app.registry.check_unpublished(&name)?;
        }
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
/// 404 if the adapter is not loaded, 409 if a published name stands for it.
pub async fn unload(
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
