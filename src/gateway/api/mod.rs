//! The HTTP API.
//!
//! | folder | content |
//! |---|---|
//! | `openai/` | one file per family of endpoints, response types beside their handler |
//! | `admin/` | the operator's endpoints: models, adapters, jobs |
//! | `wire/` | parts of requests and responses that endpoints share |
//! | `health.rs`, `openapi.rs` | endpoints of these names |

pub mod admin;
pub mod health;
pub mod openai;
pub mod openapi;
pub mod wire;

use crate::gateway::error::ApiError;
use http::Uri;

/// Endpoints that other servers have: 404 with a message that says so.
pub async fn later(uri: Uri) -> ApiError {
    ApiError::not_found(format!(
        "{} is not served yet; it comes later. Use /v1/chat/completions or /v1/completions.",
        uri.path().chars().take(100).collect::<String>()
    ))
    .with_code("not_implemented")
}

/// The paths of [`later`].
pub const LATER: [&str; 5] =
    ["/v1/responses", "/v1/messages", "/v1/rerank", "/v1/infill", "/infill"];
