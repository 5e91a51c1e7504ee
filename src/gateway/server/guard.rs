//! What every request passes on its way in and out.

use crate::gateway::app::{App, RequestTag};
use crate::gateway::error::ApiError;
use crate::gateway::limits::GuardedBody;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, Version, header};
use http_body_util::BodyExt;
use std::fmt::Write;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tracing::Instrument;

/// Longest request target, in bytes; more is a 414.
const MAX_URI: usize = 8 << 10;
/// Routes that answer at every time, to everyone, and hold nothing up.
const OPEN: &[&str] = &["/health", "/ready", "/version", "/metrics", "/openapi.json"];
/// A body that was refused is read on for so long, so that the client sees the answer instead of a
/// reset connection.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 20;
/// Bodies that may be held at the same time, in bytes over all requests.
const ALL_BODIES: usize = 256 << 20;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The outermost middleware: id, log, panic net, then everything that is refused without looking
/// at the route.
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

    let answered = AssertUnwindSafe(answer(&app, request, next, is_open)).catch_unwind();
    let mut response = answered.instrument(span.clone()).await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let reason = text.as_deref().unwrap_or("no message");
        ApiError::internal(format!("a handler panicked: {reason}")).into_response()
    });
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let status = response.status().as_u16();
    let milliseconds = started.elapsed().as_secs_f64() * 1e3;
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

/// Every name that the request calls us by: of the `Host` header, and of an absolute target.
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
        // HTTP/1.0 knows no hosts, and no browser speaks it.
        (None, _) if version == Version::HTTP_10 => {}
        _ => return Err(ApiError::bad_request("The request must carry one Host header.")),
    }
    Ok(hosts)
}

/// Middleware of every route that takes JSON: reads the body, within limits of type, size and time,
/// before the handler runs.
pub(super) async fn json_body(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    check_content_type(&parts.headers)?;
    let limit = app.config.limits.body_limit;
    let patience = app.config.listen.body_timeout;
    let mut held = Held(0);
    let read = tokio::time::timeout(patience, read_body(body, &parts.headers, limit, &mut held));
    let bytes = read.await.unwrap_or_else(|_| {
        Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            "timeout_error",
            format!("The request's body did not arrive within {} seconds.", patience.as_secs_f32()),
        ))
    })?;
    let response = next.run(Request::from_parts(parts, Body::from(bytes))).await;
    drop(held);
    Ok(response)
}

fn check_content_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused = |message: &str| {
        Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message))
    };
    let identity = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"identity");
    if headers.get_all(header::CONTENT_ENCODING).iter().any(|value| !identity(value)) {
        return refused("Compressed bodies are not supported: send plain JSON.");
    }
    let essence = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .map(|value| value.split(';').next().unwrap_or_default().trim());
    match essence {
        Some(essence) if essence.eq_ignore_ascii_case("application/json") => Ok(()),
        _ => refused("The body must be JSON: send the header `Content-Type: application/json`."),
    }
}

async fn read_body(
    mut body: Body,
    headers: &HeaderMap,
    limit: usize,
    held: &mut Held,
) -> Result<Bytes, ApiError> {
    let too_large =
        || ApiError::too_large(format!("The request's body is larger than {limit} bytes."));
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok())
        .unwrap_or(0);
    if announced > limit {
        linger(body).await;
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(announced.min(64 << 10));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad_request("The request's body broke off."))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            drop(bytes);
            linger(body).await;
            return Err(too_large());
        }
        held.add(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.into())
}

/// Reads the rest of a body that nobody wants, for a while.
pub(in crate::gateway) async fn linger(mut body: Body) {
    let rest = async {
        let mut seen = 0;
        while let Some(Ok(frame)) = body.frame().await {
            seen += frame.data_ref().map_or(0, |data| data.len());
            if seen > LINGER_BYTES {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, rest).await;
}

/// Bytes of bodies that are held now, over all requests.
static BODIES: AtomicUsize = AtomicUsize::new(0);

/// One request's share of [`BODIES`].
struct Held(usize);

impl Held {
    fn add(&mut self, bytes: usize) -> Result<(), ApiError> {
        self.0 += bytes;
        if BODIES.fetch_add(bytes, Ordering::Relaxed) + bytes > ALL_BODIES {
            return Err(ApiError::unavailable(
                "The server holds too many large requests at the moment; try again soon.",
            ));
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        BODIES.fetch_sub(self.0, Ordering::Relaxed);
    }
}

/// A fresh id: `req-` and 128 random bits.
pub(super) fn new_request_id() -> String {
    let mut id = String::with_capacity(36);
    let _ = write!(id, "req-{:032x}", rand::random::<u128>());
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_json_is_taken() {
        let with = |name: HeaderName, value: &str| {
            HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
        };
        for good in ["application/json", "Application/JSON; charset=utf-8"] {
            assert!(check_content_type(&with(header::CONTENT_TYPE, good)).is_ok(), "{good}");
        }
        for bad in ["text/plain", "", "application/jsonx", "multipart/form-data"] {
            let error = check_content_type(&with(header::CONTENT_TYPE, bad)).unwrap_err();
            assert_eq!(error.status, 415, "{bad}");
        }
        let mut compressed = with(header::CONTENT_TYPE, "application/json");
        compressed.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        assert_eq!(check_content_type(&compressed).unwrap_err().status, 415);
    }

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

    #[tokio::test]
    async fn bodies_are_bounded() {
        let read = async |body: Vec<u8>, limit| {
            read_body(Body::from(body), &HeaderMap::new(), limit, &mut Held(0)).await
        };
        assert_eq!(read(vec![b'a'; 10], 10).await.unwrap().len(), 10);
        assert_eq!(read(vec![b'a'; 11], 10).await.unwrap_err().status, 413);
    }

    #[test]
    fn ids_differ() {
        assert_ne!(new_request_id(), new_request_id());
        assert_eq!(new_request_id().len(), 36);
    }
}
