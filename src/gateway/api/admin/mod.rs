//! `/admin/…`: models, adapters and jobs at run time. These routes exist only if an admin key is
//! set. Clients name things by id; no path is ever taken from a request.

pub mod adapters;
pub mod jobs;
pub mod models;
pub mod published;
mod upload;

use crate::gateway::api::wire::fields::Fields;
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use axum::Json;
use axum::body::to_bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request};
use http::StatusCode;
use serde_json::Value;

/// Maximum length of a JSON body of these routes, in bytes.
const MAX_JSON: usize = 64 << 10;

type Answer = Result<(StatusCode, Json<Value>), ApiError>;

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
