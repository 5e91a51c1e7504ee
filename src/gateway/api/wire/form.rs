//! Reader of multipart forms, with time limits and size limits.

use crate::gateway::api::wire::MAX_NAME;
use crate::gateway::error::ApiError;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request};
use http::header;
use std::time::Duration;

/// Maximum size of an unused part, in bytes.
const MAX_SKIPPED: u64 = 64 << 20;

/// Whether a request's body is a form.
pub(in crate::gateway::api) fn is_form(request: &Request) -> bool {
    essence(request).eq_ignore_ascii_case("multipart/form-data")
}

/// The content type without its parameters.
pub(in crate::gateway::api) fn essence(request: &Request) -> &str {
    let content_type = request.headers().get(header::CONTENT_TYPE);
    let content_type = content_type.and_then(|value| value.to_str().ok()).unwrap_or_default();
    content_type.split(';').next().unwrap_or_default().trim()
}

pub(in crate::gateway::api) async fn open(request: Request) -> Result<Multipart, ApiError> {
    Multipart::from_request(request, &()).await.map_err(|rejection| {
        ApiError::bad_request(format!("The form cannot be read: {}.", rejection.body_text()))
    })
}

pub(in crate::gateway::api) async fn next_field(
    form: &mut Multipart,
    patience: Duration,
) -> Result<Option<Field<'_>>, ApiError> {
    tokio::time::timeout(patience, form.next_field()).await.map_err(|_| slow())?.map_err(broken)
}

pub(in crate::gateway::api) async fn next_chunk(
    field: &mut Field<'_>,
    patience: Duration,
) -> Result<Option<axum::body::Bytes>, ApiError> {
    tokio::time::timeout(patience, field.chunk()).await.map_err(|_| slow())?.map_err(broken)
}

pub(in crate::gateway::api) async fn skip(
    mut field: Field<'_>,
    patience: Duration,
) -> Result<(), ApiError> {
    let mut size = 0;
    while let Some(chunk) = next_chunk(&mut field, patience).await? {
        size += chunk.len() as u64;
        if size > MAX_SKIPPED {
            return Err(ApiError::too_large("The form holds a large file that is not needed."));
        }
    }
    Ok(())
}

/// A short text field.
pub(in crate::gateway::api) async fn text(
    mut field: Field<'_>,
    patience: Duration,
) -> Result<String, ApiError> {
    let name = field.name().unwrap_or_default().to_owned();
    let mut text = Vec::new();
    while let Some(chunk) = next_chunk(&mut field, patience).await? {
        text.extend_from_slice(&chunk);
        if text.len() > MAX_NAME {
            let message = format!("{name} is longer than {MAX_NAME} bytes.");
            return Err(ApiError::invalid(name, message));
        }
    }
    String::from_utf8(text).map_err(|_| {
        let message = format!("{name} is not valid UTF-8.");
        ApiError::invalid(name, message)
    })
}

fn broken(error: MultipartError) -> ApiError {
    ApiError::bad_request(format!("The form cannot be read: {}.", error.body_text()))
}

fn slow() -> ApiError {
    ApiError::new(
        http::StatusCode::REQUEST_TIMEOUT,
        "timeout_error",
        "The form did not arrive in time.",
    )
}
