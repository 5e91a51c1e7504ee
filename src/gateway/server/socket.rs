//! Wrapper of a connection's TCP socket, used by hyper.
//!
//! It drops clients that do not read their responses. It also gives a body to the errors that hyper
//! answers by itself: for a request that is not HTTP, hyper sends a bare `400` with an empty body
//! before any code of the gateway runs.

use serde_json::json;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// Upper bound of the length of hyper's bare responses, in bytes.
const LONGEST_BARE: usize = 512;

/// A socket whose writes have a time-out.
pub(super) struct Socket<S = TcpStream> {
    inner: S,
    patience: Duration,
    /// Timer that runs while the peer reads nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Unwritten rest of a response that replaces a bare one.
    instead: Vec<u8>,
}

impl<S: AsyncWrite + Unpin> Socket<S> {
    pub(super) fn new(inner: S, patience: Duration) -> Self {
        Self { inner, patience, stalled: None, instead: Vec::new() }
    }

    /// Returns the result of a write; a write that has been pending for too long becomes an error.
    fn timed<T>(
        &mut self,
        cx: &mut Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.stalled = None;
            return outcome;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }

    /// Writes the response that replaces a bare one.
    fn poll_instead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.instead.is_empty() {
            let written = Pin::new(&mut self.inner).poll_write(cx, &self.instead);
            match ready!(self.timed(cx, written))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => drop(self.instead.drain(..written)),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_instead(cx))?;
        if let Some(instead) = dressed(buffer) {
            self.instead = instead;
            // A partial write continues when hyper flushes.
            if let Poll::Ready(Err(error)) = self.poll_instead(cx) {
                return Poll::Ready(Err(error));
            }
            return Poll::Ready(Ok(buffer.len()));
        }
        let written = Pin::new(&mut self.inner).poll_write(cx, buffer);
        self.timed(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = buffers.iter().find(|buffer| !buffer.is_empty());
        if !self.instead.is_empty() || first.is_some_and(|buffer| dressed(buffer).is_some()) {
            return self.poll_write(cx, first.map_or(&[][..], |buffer| buffer));
        }
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, buffers);
        self.timed(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_instead(cx))?;
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.timed(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_instead(cx))?;
        let shut = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.timed(cx, shut)
    }
}

/// The response that replaces `written` if `written` is a bare error of hyper. Responses of the
/// gateway carry `x-request-id`, and their bodies contain no raw line ends, so they are never
/// mistaken for a bare error.
fn dressed(written: &[u8]) -> Option<Vec<u8>> {
    let is_error = written.starts_with(b"HTTP/1.1 4") || written.starts_with(b"HTTP/1.0 4");
    if !is_error || written.len() > LONGEST_BARE || !written.ends_with(b"\r\n\r\n") {
        return None;
    }
    let text = std::str::from_utf8(written).ok()?.to_ascii_lowercase();
    if !text.contains("content-length: 0\r\n") || text.contains("x-request-id") {
        return None;
    }
    let status = std::str::from_utf8(written).ok()?.lines().next()?.get(9..)?;
    let message = match status.get(..3)? {
        "414" => "The request's URL is too long.",
        "431" => "The request's headers are too large.",
        _ => "The request is not valid HTTP/1.1.",
    };
    Some(bare_response(status, message))
}

/// A complete error response as bytes, for a connection without a request.
pub(super) fn bare_response(status: &str, message: &str) -> Vec<u8> {
    let kind =
        if status.starts_with('5') { "service_unavailable_error" } else { "invalid_request_error" };
    let error = json!({"error": {"message": message, "type": kind, "param": null, "code": null}});
    let body = error.to_string();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         x-request-id: {}\r\nconnection: close\r\n\r\n{body}",
        body.len(),
        super::guard::new_request_id(),
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const BARE: &[u8] =
        b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\ndate: x\r\n\r\n";

    #[tokio::test]
    async fn bare_errors_get_a_body() {
        let (ours, mut theirs) = tokio::io::duplex(64);
        let mut socket = Socket::new(ours, Duration::from_secs(5));
        let write = async move {
            socket.write_all(BARE).await.unwrap();
            socket.shutdown().await.unwrap();
        };
        let mut got = String::new();
        let (_, read) = tokio::join!(write, theirs.read_to_string(&mut got));
        read.unwrap();
        assert!(got.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{got}");
        let body: serde_json::Value =
            serde_json::from_str(got.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(body["error"]["type"], "invalid_request_error");
    }

    #[tokio::test]
    async fn everything_else_passes_unchanged() {
        let ours_404 = b"HTTP/1.1 404 Not Found\r\nx-request-id: a\r\ncontent-length: 0\r\n\r\n";
        for bytes in [&b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"[..], ours_404, b"{}"] {
            let (ours, mut theirs) = tokio::io::duplex(1024);
            let mut socket = Socket::new(ours, Duration::from_secs(5));
            socket.write_all(bytes).await.unwrap();
            drop(socket);
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, bytes);
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_dropped() {
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut socket = Socket::new(ours, Duration::from_millis(50));
        let error = socket.write_all(&[b'x'; 1000]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
