//! Middleware that identifies clients by their keys.

use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::limits::GuardedBody;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use std::sync::Arc;

/// Middleware of the API routes: it identifies the client, counts the request against the limits
/// of the key until the response body has ended, and adds the [`Identity`](crate::gateway::auth::Identity) to the request. The
/// operator (admin key) is not limited.
pub(super) async fn require_key(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let identity = app
        .auth
        .identify(request.headers())
        .inspect_err(|_| app.metrics.rejected("unauthorized"))?;
    request.extensions_mut().insert(identity);
    if identity.admin {
        return Ok(next.run(request).await);
    }
    let permit = app.auth.admit(identity).inspect_err(|error| {
        app.metrics.rejected(error.code.as_deref().unwrap_or("rate_limit_exceeded"));
    })?;
    let response = next.run(request).await;
    Ok(response.map(|body| GuardedBody::wrap(body, permit)))
}

/// Middleware of the admin routes.
pub(super) async fn require_admin(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let identity = app.auth.identify_admin(request.headers()).inspect_err(|error| {
        if error.status == http::StatusCode::UNAUTHORIZED {
            app.metrics.rejected("unauthorized");
        }
    })?;
    request.extensions_mut().insert(identity);
    Ok(next.run(request).await)
}
