//! Request bodies: JSON within limits, and draining of bodies that no handler read.

use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;

/// Maximum size of all bodies held at the same time, in bytes over all requests.
const ALL_BODIES: usize = 256 << 20;
/// Limits for draining an unread body: time and bytes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 20;

/// Middleware of routes that take JSON: reads the body, within limits of type, size and time,
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
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(announced.min(64 << 10));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::bad_request("The request's body broke off."))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > limit {
            return Err(too_large());
        }
        held.add(data.len())?;
        bytes.extend_from_slice(&data);
    }
    Ok(bytes.into())
}

/// Size of the bodies held now, in bytes over all requests.
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

/// Body of a request, recovered if the response was made without reading it.
///
/// If a request is answered before its body has arrived, the rest of the body stays on the
/// connection, which then cannot serve another request. A client that sees no `Connection: close`
/// sends one anyway and gets a reset. A client that is still sending its body gets the reset
/// before it has read the response (RFC 9112, 9.6).
pub(super) struct Unread {
    rest: oneshot::Receiver<Body>,
    awaits_continue: bool,
}

/// Error: unread bytes remain, so the connection cannot be reused.
pub(super) struct LeftOver;

impl Unread {
    /// Wraps the body of a request, so that an unread rest can be recovered.
    pub(super) fn watch(request: Request) -> (Request, Self) {
        let (back, rest) = oneshot::channel();
        let awaits_continue = request.headers().contains_key(header::EXPECT);
        let request = request.map(|body| match body.is_end_stream() {
            true => body,
            false => Body::new(Lent { body, back: Some(back) }),
        });
        (request, Self { rest, awaits_continue })
    }

    /// Drains the unread rest of the body after the response was made.
    ///
    /// # Errors
    /// [`LeftOver`] if the rest is too large or too slow, or if the client sends it only after a
    /// `100 Continue`.
    pub(super) async fn finish(mut self) -> Result<(), LeftOver> {
        let Ok(mut body) = self.rest.try_recv() else { return Ok(()) };
        if self.awaits_continue {
            return Err(LeftOver);
        }
        let rest = async {
            let mut seen = 0;
            while let Some(frame) = body.frame().await {
                seen += frame.map_err(|_| LeftOver)?.data_ref().map_or(0, Bytes::len);
                if seen > LINGER_BYTES {
                    return Err(LeftOver);
                }
            }
            Ok(())
        };
        tokio::time::timeout(LINGER, rest).await.unwrap_or(Err(LeftOver))
    }
}

/// A body that is returned to [`Unread`] if it is dropped before its end.
struct Lent {
    body: Body,
    back: Option<oneshot::Sender<Body>>,
}

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            self.back = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(back) = self.back.take().filter(|_| !self.body.is_end_stream()) {
            let _ = back.send(std::mem::take(&mut self.body));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderName;

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

    #[tokio::test]
    async fn bodies_are_bounded() {
        let read = async |body: Vec<u8>, limit| {
            read_body(Body::from(body), &HeaderMap::new(), limit, &mut Held(0)).await
        };
        assert_eq!(read(vec![b'a'; 10], 10).await.unwrap().len(), 10);
        assert_eq!(read(vec![b'a'; 11], 10).await.unwrap_err().status, 413);
    }
}
