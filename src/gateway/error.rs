//! Error type of the HTTP layer. Every refusal and failure becomes OpenAI's error body here.

use crate::ipc::{EngineError, EngineErrorKind};
use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

/// Seconds that a client is asked to wait when the engine's queue is full.
const RETRY_AFTER_OVERLOAD: u32 = 1;
/// Seconds that a client is asked to wait while an engine loads or restarts.
const RETRY_AFTER_UNAVAILABLE: u32 = 2;
/// Maximum length of a message in bytes. Messages quote client input, which may be long.
const MAX_MESSAGE: usize = 4000;

/// An error as the client receives it: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub status: StatusCode,
    /// Field `type` of OpenAI's error body.
    pub kind: &'static str,
    pub code: Option<String>,
    /// Message for the person who sent the request.
    pub message: String,
    /// Name of the invalid request field.
    pub param: Option<String>,
    /// Value of the `Retry-After` header, in seconds.
    pub retry_after: Option<u32>,
}

impl ApiError {
    /// An error without code and parameter.
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_MESSAGE {
            message.truncate(message.floor_char_boundary(MAX_MESSAGE));
            message.push('…');
        }
        Self { status, kind, code: None, message, param: None, retry_after: None }
    }

    #[must_use]
    pub fn with_code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }

    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// 400: the value of one parameter is invalid.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::bad_request(message).with_param(param)
    }

    /// 400: the request as a whole is invalid.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// 404 with OpenAI's code for an unknown model.
    pub fn model_not_found(name: &str) -> Self {
        let shown: String = name.chars().take(200).collect();
        Self::not_found(format!("The model `{shown}` does not exist or is not loaded."))
            .with_param("model")
            .with_code("model_not_found")
    }

    /// 401.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
            .with_code("invalid_api_key")
    }

    /// 429; `code` names the limit that was reached (`rate_limit_exceeded`, `queue_full`, …).
    pub fn too_many(message: impl Into<String>, retry_after: u32, code: &str) -> Self {
        let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded", message)
            .with_code(code);
        error.retry_after = Some(retry_after);
        error
    }

    /// 503: the client may retry soon.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let mut error =
            Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable_error", message);
        error.retry_after = Some(RETRY_AFTER_UNAVAILABLE);
        error
    }

    /// 422: the request is valid but cannot be carried out (for example, a model does not load).
    pub fn unprocessable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_request_error", message)
    }

    /// 413.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// 504: the request ran longer than the server allows.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message).with_code("timeout")
    }

    /// 500. The reason is logged; the client receives no internal details.
    pub fn internal(reason: impl std::fmt::Display) -> Self {
        tracing::error!("internal error: {reason}");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            "The server had an error while processing the request.",
        )
    }

    /// 507 if the disk is full, otherwise the same as [`ApiError::internal`].
    pub fn disk(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Self::new(
                StatusCode::INSUFFICIENT_STORAGE,
                "server_error",
                "The disk of the data folder is full: make room, or start the server with another \
                 --data-dir.",
            )
            .with_code("disk_full"),
            _ => Self::internal(error),
        }
    }

    /// The JSON error body, also used as the error event of a stream.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let EngineError { kind, message, param } = error;
        let mut mapped = match kind {
            EngineErrorKind::Invalid => Self::bad_request(message),
            EngineErrorKind::ContextLength => {
                Self::bad_request(message).with_code("context_length_exceeded")
            }
            EngineErrorKind::Overloaded => {
                Self::too_many(message, RETRY_AFTER_OVERLOAD, "queue_full")
            }
            EngineErrorKind::Unavailable => Self::unavailable(message),
            EngineErrorKind::Internal => Self::internal(message),
        };
        mapped.param = param;
        mapped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engine_errors_keep_their_meaning() {
        let cases = [
            (EngineErrorKind::Invalid, 400, None, None),
            (EngineErrorKind::ContextLength, 400, Some("context_length_exceeded"), None),
            (EngineErrorKind::Overloaded, 429, Some("queue_full"), Some(1)),
            (EngineErrorKind::Unavailable, 503, None, Some(2)),
            (EngineErrorKind::Internal, 500, None, None),
        ];
        for (kind, status, code, retry_after) in cases {
            let error = EngineError { kind, message: "why".into(), param: Some("prompt".into()) };
            let error = ApiError::from(error);
            assert_eq!(error.status.as_u16(), status, "{kind:?}");
            assert_eq!(error.code.as_deref(), code, "{kind:?}");
            assert_eq!(error.retry_after, retry_after, "{kind:?}");
            assert_eq!(error.message.contains("why"), status != 500, "{kind:?}");
        }
    }

    #[test]
    fn the_body_has_all_four_fields() {
        let error = ApiError::invalid("temperature", "temperature must be a number");
        assert_eq!(
            error.body().to_string(),
            r#"{"error":{"message":"temperature must be a number","type":"invalid_request_error","param":"temperature","code":null}}"#
        );
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let error = ApiError::bad_request("é".repeat(4000));
        assert!(error.message.len() <= MAX_MESSAGE + 4);
    }
}
