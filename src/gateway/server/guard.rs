//! Checks that apply to every request and response.

use super::body::Unread;
use crate::gateway::app::{App, RequestTag};
use crate::gateway::error::ApiError;
use crate::gateway::limits::GuardedBody;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, Version, header};
use std::fmt::Write;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use tracing::Instrument;

/// Maximum length of a request target, in bytes; more is a 414.
const MAX_URI: usize = 8 << 10;
/// Routes that are always available and open to everyone; a drain does not wait for them.
const OPEN: &[&str] = &["/health", "/ready", "/version", "/metrics", "/openapi.json"];

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The outermost middleware: assigns the id, logs, catches panics, then makes the checks that do
/// not depend on the route.
pub(super) async fn outer(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = new_request_id();
    request.extensions_mut().insert(RequestTag(id.as_str().into()));
    let span = tracing::info_span!("request", id);
    let method = request.method().clone();
    let path: String = request.uri().path().chars().take(200).collect();
    let is_open = OPEN.contains(&path.as_str());
    let started = std::time::Instant::now();

    let (request, unread) = Unread::watch(request);

    let answered = AssertUnwindSafe(answer(&app, request, next, is_open)).catch_unwind();
    let mut response = answered.instrument(span.clone()).await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let reason = text.as_deref().unwrap_or("no message");
        ApiError::internal(format!("a handler panicked: {reason}")).into_response()
    });
    if unread.finish().await.is_err() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let status = response.status().as_u16();
    let milliseconds = started.elapsed().as_micros() as f64 / 1e3;
    let _entered = span.enter();
    if is_open {
        tracing::debug!(%method, path, status, milliseconds, "answered");
    } else {
        tracing::info!(%method, path, status, milliseconds, "answered");
    }
    response
}

async fn answer(app: &Arc<App>, request: Request, next: Next, is_open: bool) -> Response {
    if let Err(error) = check_target(app, &request) {
        return error.into_response();
    }
    if is_open {
        return next.run(request).await;
    }
    let Some(running) = app.life.enter() else {
        app.metrics.rejected("draining");
        let error = ApiError::unavailable("The server is shutting down.");
        let close = [(header::CONNECTION, HeaderValue::from_static("close"))];
        return (close, error).into_response();
    };
    if !app.life.is_started() {
        app.metrics.rejected("starting");
        return ApiError::unavailable("The server is still starting; try again soon.")
            .into_response();
    }
    let mut response = next.run(request).await;
    if app.life.is_draining() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response.map(|body| GuardedBody::wrap(body, running))
}

fn check_target(app: &App, request: &Request) -> Result<(), ApiError> {
    if request.uri().path_and_query().is_some_and(|target| target.as_str().len() > MAX_URI) {
        return Err(ApiError::new(
            StatusCode::URI_TOO_LONG,
            "invalid_request_error",
            format!("The request's URL is longer than {MAX_URI} bytes."),
        ));
    }
    let hosts = hosts(request.uri(), request.headers(), request.version())?;
    match hosts.iter().find(|host| !app.config.listen.allowed_hosts.allows(host)) {
        None => Ok(()),
        Some(host) => {
            app.metrics.rejected("host_not_allowed");
            let shown: String = host.chars().take(100).collect();
            Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "invalid_request_error",
                format!(
                    "This server does not answer to the name `{shown}`. The operator can allow it \
                     with --allowed-host."
                ),
            )
            .with_code("host_not_allowed"))
        }
    }
}

/// Every host name in the request: from the `Host` header, and from an absolute target.
fn hosts<'a>(
    uri: &'a Uri,
    headers: &'a HeaderMap,
    version: Version,
) -> Result<Vec<&'a str>, ApiError> {
    let mut sent = headers.get_all(header::HOST).iter();
    let mut hosts: Vec<&str> = uri.authority().map(|host| host.as_str()).into_iter().collect();
    match (sent.next(), sent.next()) {
        (Some(host), None) => hosts.push(
            host.to_str().map_err(|_| ApiError::bad_request("The Host header is not valid."))?,
        ),
        // HTTP/1.0 has no `Host` header, and no browser uses HTTP/1.0.
        (None, _) if version == Version::HTTP_10 => {}
        _ => return Err(ApiError::bad_request("The request must carry one Host header.")),
    }
    Ok(hosts)
}

/// A new request id: `req-` and 128 random bits.
pub(super) fn new_request_id() -> String {
    let mut id = String::with_capacity(36);
    let _ = write!(id, "req-{:032x}", rand::random::<u128>());
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_request_is_seen() {
        let uri: Uri = "http://evil.example/x".parse().unwrap();
        let mut headers = HeaderMap::new();
        assert!(hosts(&uri, &headers, Version::HTTP_11).is_err());
        assert_eq!(hosts(&uri, &headers, Version::HTTP_10).unwrap(), ["evil.example"]);
        headers.append(header::HOST, HeaderValue::from_static("localhost:1"));
        assert_eq!(
            hosts(&uri, &headers, Version::HTTP_11).unwrap(),
            ["evil.example", "localhost:1"]
        );
        headers.append(header::HOST, HeaderValue::from_static("other"));
        assert!(hosts(&uri, &headers, Version::HTTP_10).is_err());
    }

    #[test]
    fn ids_differ() {
        assert_ne!(new_request_id(), new_request_id());
        assert_eq!(new_request_id().len(), 36);
    }
}
