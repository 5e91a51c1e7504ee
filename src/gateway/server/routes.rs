//! Table of routes, each group with its access rule. A route that is not listed is a 404.

use super::body::json_body;
use super::guard::outer;
use super::keys::{require_admin, require_key};
use crate::gateway::api::openai::{
    chat, completions, embeddings, files, fine_tuning, graders, models, score, tokenize,
};
use crate::gateway::api::wire::query;
use crate::gateway::api::{self, admin, health, openapi};
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{any, delete, get, post};
use http::{Method, StatusCode, Uri};
use std::sync::Arc;

/// All routes of the server.
pub fn router(app: Arc<App>) -> Router {
    let json = || from_fn_with_state(app.clone(), json_body);
    let key = || from_fn_with_state(app.clone(), require_key);
    let admin = || from_fn_with_state(app.clone(), require_admin);
    let known_query = || from_fn(query::known_only);
    // The layer added last runs first: authentication comes before any byte of the body is read.
    let api = Router::new()
        .route("/v1/chat/completions", post(chat::handle))
        .route("/v1/completions", post(completions::handle))
        .route("/v1/embeddings", post(embeddings::handle))
        .route("/v1/score", post(score::handle))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/apply-template", post(tokenize::apply_template))
        .route("/v1/fine_tuning/jobs", post(fine_tuning::create))
        .route("/v1/fine_tuning/alpha/graders/validate", post(graders::validate))
        .route("/v1/fine_tuning/alpha/graders/run", post(graders::run))
        .route_layer(json())
        .route_layer(known_query())
        .route_layer(key());
    let listing = Router::new()
        .route("/tokenizer_info", get(tokenize::tokenizer_info))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve).delete(models::delete))
        .route("/v1/files", get(files::list).post(files::upload))
        .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/fine_tuning/jobs", get(fine_tuning::list))
        .route("/v1/fine_tuning/jobs/{id}", get(fine_tuning::retrieve))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(fine_tuning::cancel))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(fine_tuning::pause))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(fine_tuning::resume))
        .route("/v1/fine_tuning/jobs/{id}/events", get(fine_tuning::events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(fine_tuning::checkpoints))
        .route_layer(known_query())
        .route_layer(key());
    let admin_json = Router::new()
        .route("/admin/models", post(admin::models::load))
        .route("/admin/models/{*path}", post(admin::models::of_model))
        .route("/admin/published", post(admin::published::publish))
        .route("/admin/jobs", post(admin::jobs::create))
        .route_layer(json());
    let admin_routes = Router::new()
        .route("/admin/models", get(admin::models::list))
        .route("/admin/models/{*path}", delete(admin::models::unload))
        .route("/admin/adapters", get(admin::adapters::list).post(admin::adapters::load))
        .route("/admin/adapters/{*name}", delete(admin::adapters::unload))
        .route("/admin/published", get(admin::published::list))
        .route(
            "/admin/published/{*path}",
            post(admin::published::of_name).delete(admin::published::remove),
        )
        .route("/admin/jobs", get(admin::jobs::list))
        .route("/admin/jobs/{id}", get(admin::jobs::retrieve))
        .route("/admin/jobs/{id}/cancel", post(admin::jobs::cancel))
        .route("/admin/jobs/{id}/pause", post(admin::jobs::pause))
        .route("/admin/jobs/{id}/resume", post(admin::jobs::resume))
        .route("/admin/jobs/{id}/finish", post(admin::jobs::finish))
        .route("/admin/jobs/{id}/events", get(admin::jobs::events))
        .route("/admin/jobs/{id}/rollouts", get(admin::jobs::rollouts))
        .route("/admin/jobs/{id}/plot.svg", get(admin::jobs::curves))
        .route("/admin/jobs/{id}/report", get(admin::jobs::html_report))
        .route("/admin/jobs/{id}/artifacts", get(admin::jobs::artifacts))
        .route("/admin/jobs/{id}/artifacts/{artifact}", get(admin::jobs::artifact))
        .merge(admin_json)
        .route_layer(known_query())
        .route_layer(admin());
    let open = Router::new()
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/version", get(health::version))
        .route("/metrics", get(health::metrics))
        .route("/openapi.json", get(openapi::document));
    let later =
        api::LATER.iter().fold(Router::new(), |routes, path| routes.route(path, any(api::later)));
    let routes = api
        .merge(listing)
        .merge(later)
        .merge(admin_routes)
        .merge(open)
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::disable())
        .with_state(app.clone());
    // The outermost layer wraps a service that already holds the fallbacks.
    Router::new()
        .fallback_service(routes)
        .layer(from_fn(absolute_path))
        .layer(from_fn_with_state(app, outer))
}

async fn not_found(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    if uri.path() == "/" {
        return ApiError::not_found(
            "This is an Ingot server. Its API is described in /openapi.json.",
        );
    }
    ApiError::not_found(format!("There is no route {method} {path}; see /openapi.json."))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let message = format!("{path} does not answer to the method {method}.");
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
}

/// Refuses targets without a path (`CONNECT host:port`, `OPTIONS *`), which match no route.
async fn absolute_path(
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Result<Response, ApiError> {
    let path = request.uri().path();
    if !path.starts_with('/') {
        return Err(wrong_method(request.method().clone(), request.uri().clone()).await);
    }
    if !decodes(path) {
        let message = "The path is not UTF-8: check its percent-encoded bytes.";
        return Err(ApiError::bad_request(message));
    }
    Ok(next.run(request).await)
}

/// Whether a path is UTF-8 after its percent-encoded bytes are decoded.
fn decodes(path: &str) -> bool {
    let (mut bytes, mut rest) = (Vec::with_capacity(path.len()), path.as_bytes());
    while let [first, behind @ ..] = rest {
        let hex = |at: usize| behind.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        match (first, hex(0), hex(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push((high * 16 + low) as u8);
                rest = &behind[2..];
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    std::str::from_utf8(&bytes).is_ok()
}
