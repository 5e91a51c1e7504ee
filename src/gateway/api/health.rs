//! `GET /health`, `/ready`, `/version` and `/metrics`: for operators. These routes need no key:
//! they disclose nothing about requests, and probes and scrapers should not hold a key. `/metrics`
//! names the loaded models; if the server has a public address, its proxy should block `/metrics`.

use crate::build_info::{BUILD, BuildInfo};
use crate::gateway::app::App;
use crate::isa::isa;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /health`: the gateway is running.
pub async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /ready`: 200 if every loaded model accepts requests, otherwise 503 with the reasons.
pub async fn ready(State(app): State<Arc<App>>) -> Response {
    let mut reasons: Vec<Value> = app
        .registry
        .not_ready()
        .into_iter()
        // Engine logs are for the operator: only the admin route returns the whole text.
        .map(|(model, reason)| {
            let state = reason.split(':').next().unwrap_or_default();
            json!({"model": model, "reason": state})
        })
        .collect();
    if app.life.is_draining() {
        reasons.push(json!({"reason": "draining"}));
    } else if !app.life.is_started() {
        reasons.push(json!({"reason": "starting"}));
    }
    let ready = reasons.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({"ready": ready, "reasons": reasons}))).into_response()
}

/// `GET /version`.
pub async fn version() -> Json<Version> {
    Json(Version { build: BUILD, isa: isa().name() })
}

/// The answer to `GET /version`.
#[derive(serde::Serialize)]
pub struct Version {
    #[serde(flatten)]
    build: BuildInfo,
    /// The instruction set of the kernels.
    isa: &'static str,
}

/// `GET /metrics`, in Prometheus' text format.
pub async fn metrics(State(app): State<Arc<App>>) -> Response {
    if let Ok(disk) = rustix::fs::statvfs(app.registry.store().folder()) {
        app.metrics.disk([disk.f_bavail, disk.f_blocks].map(|n| n.saturating_mul(disk.f_frsize)));
    }
    let text = app.metrics.render(&app.registry.samples(), &app.jobs.samples());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
