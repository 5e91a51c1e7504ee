//! A small HTTP/1.1 client over hyper: one connection at a time, nothing parsed twice, so that a load
//! generator leaves the cores to the server.

use crate::config::Secret;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::time::Duration;
use tokio::net::TcpStream;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const JSON: &str = "application/json";
/// Bytes of an error body that are looked at, at most.
const ERROR_LIMIT: usize = 1 << 16;

/// Why a request brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum HttpError {
    #[error("{0} cannot be reached: {1}")]
    Connect(String, String),
    #[error("the server answered {status}: {message}")]
    Status { status: u16, message: String },
    #[error("the connection was lost: {0}")]
    Lost(String),
    #[error("the server reported an error inside the stream: {0}")]
    InStream(String),
    #[error("no end after {0:?}")]
    Timeout(Duration),
}

impl HttpError {
    /// A short name, to count by.
    pub(super) fn kind(&self) -> String {
        match self {
            Self::Connect(..) => "connect".to_owned(),
            Self::Status { status, .. } => format!("status {status}"),
            Self::Lost(_) => "connection lost".to_owned(),
            Self::InStream(_) => "error in stream".to_owned(),
            Self::Timeout(_) => "timeout".to_owned(),
        }
    }
}

/// An OpenAI-compatible server.
#[derive(Debug, Clone)]
pub(super) struct Server {
    authority: String,
    /// Path in front of `/v1`, usually empty.
    prefix: String,
    key: Option<Secret>,
}

impl Server {
    /// From `http://host[:port][/prefix][/v1]`.
    pub(super) fn parse(url: &str, key: Option<Secret>) -> Result<Self, String> {
        let rest = url.trim().strip_prefix("http://").ok_or_else(|| {
            format!(
                "--url takes an address such as http://127.0.0.1:8000 (plain HTTP), not `{url}`."
            )
        })?;
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let path = path.trim_end_matches('/');
        let path = path.strip_suffix("v1").unwrap_or(path).trim_end_matches('/');
        let has_port =
            authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        Ok(Self {
            authority: if has_port { authority.to_owned() } else { format!("{authority}:80") },
            prefix: if path.is_empty() { String::new() } else { format!("/{path}") },
            key,
        })
    }

    /// Opens a connection.
    pub(super) async fn connect(&self) -> Result<Connection, HttpError> {
        let failed =
            |reason: String| HttpError::Connect(format!("http://{}", self.authority), reason);
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.authority))
            .await
            .map_err(|_| failed("no answer within 5 s".to_owned()))?
            .map_err(|error| failed(error.to_string()))?;
        let _ = stream.set_nodelay(true);
        let (sender, driver) =
            handshake(TokioIo::new(stream)).await.map_err(|error| failed(error.to_string()))?;
        tokio::spawn(async move {
            // The request in flight sees the same error.
            let _ = driver.await;
        });
        Ok(Connection { sender })
    }

    /// A whole JSON answer, over a connection of its own.
    pub(super) async fn json(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<serde_json::Value, HttpError> {
        self.json_of(method, path, body.map(|body| (JSON, body))).await
    }

    /// The same for a body of any type.
    pub(super) async fn json_of(
        &self,
        method: Method,
        path: &str,
        body: Option<(&str, Bytes)>,
    ) -> Result<serde_json::Value, HttpError> {
        let mut connection = self.connect().await?;
        let response = connection.send_of(self, method, path, body).await?;
        let bytes = response
            .into_body()
            .collect()
            .await
            .map_err(|error| HttpError::Lost(error.to_string()))?
            .to_bytes();
        serde_json::from_slice(&bytes)
            .map_err(|error| HttpError::Lost(format!("the answer is no JSON ({error})")))
    }
}

/// An open connection; requests follow each other on it.
#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Connection {
    /// Whether another request may be sent.
    pub(super) async fn ready(&mut self) -> bool {
        self.sender.ready().await.is_ok()
    }

    /// Sends a request; an answer that is no success becomes an error with the server's message.
    pub(super) async fn send(
        &mut self,
        server: &Server,
        method: Method,
        path: &str,
        body: Option<Bytes>,
    ) -> Result<Response<Incoming>, HttpError> {
        self.send_of(server, method, path, body.map(|body| (JSON, body))).await
    }

    /// The same for a body of any type.
    pub(super) async fn send_of(
        &mut self,
        server: &Server,
        method: Method,
        path: &str,
        body: Option<(&str, Bytes)>,
    ) -> Result<Response<Incoming>, HttpError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", server.prefix))
            .header("host", &server.authority)
            .header("user-agent", concat!("ingot/", env!("CARGO_PKG_VERSION")));
        if let Some((content_type, _)) = &body {
            request = request.header("content-type", *content_type);
        }
        if let Some(key) = &server.key {
            request = request.header("authorization", format!("Bearer {}", key.expose()));
        }
        let request = request
            .body(Full::new(body.map(|(_, body)| body).unwrap_or_default()))
            .map_err(|error| HttpError::Lost(error.to_string()))?;
        let response = self
            .sender
            .send_request(request)
            .await
            .map_err(|error| HttpError::Lost(error.to_string()))?;
        match response.status() {
            status if status.is_success() => Ok(response),
            status => Err(error_of(status, response).await),
        }
    }
}

async fn error_of(status: StatusCode, response: Response<Incoming>) -> HttpError {
    let body = http_body_util::Limited::new(response.into_body(), ERROR_LIMIT).collect().await;
    let bytes = body.map(|body| body.to_bytes()).unwrap_or_default();
    let message = error_message(&bytes).unwrap_or_else(|| {
        String::from_utf8_lossy(&bytes).chars().take(200).collect::<String>().trim().to_owned()
    });
    HttpError::Status { status: status.as_u16(), message }
}

/// `error.message` of an OpenAI error body.
pub(super) fn error_message(json: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(json).ok()?;
    let error = value.get("error")?;
    error.get("message").unwrap_or(error).as_str().map(str::to_owned)
}

/// Splits a byte stream into the `data:` lines of server-sent events.
#[derive(Debug, Default)]
pub(super) struct SseLines {
    /// A line that has not ended yet.
    partial: Vec<u8>,
}

impl SseLines {
    /// Calls `data` for each payload that `bytes` completes.
    pub(super) fn feed(&mut self, mut bytes: &[u8], mut data: impl FnMut(&[u8])) {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = bytes.split_at(end);
            bytes = &rest[1..];
            if self.partial.is_empty() {
                payload(line).map(&mut data);
            } else {
                self.partial.extend_from_slice(line);
                payload(&self.partial).map(&mut data);
                self.partial.clear();
            }
        }
        self.partial.extend_from_slice(bytes);
    }
}

fn payload(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let data = line.strip_prefix(b"data:")?;
    Some(data.strip_prefix(b" ").unwrap_or(data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_however_the_bytes_are_cut() {
        let text = b"data: {\"a\":1}\n\n: comment\r\ndata:x\r\n\r\nevent: e\ndata: [DONE]\n\n";
        for cut in 1..text.len() {
            let mut lines = SseLines::default();
            let mut found = Vec::new();
            for piece in text.chunks(cut) {
                lines.feed(piece, |data| found.push(String::from_utf8(data.to_vec()).unwrap()));
            }
            assert_eq!(found, ["{\"a\":1}", "x", "[DONE]"], "cut at {cut}");
        }
    }

    #[test]
    fn urls() {
        let server = |url| Server::parse(url, None).unwrap();
        assert_eq!(server("http://a:1").authority, "a:1");
        assert_eq!(server("http://a/v1/").authority, "a:80");
        assert_eq!(server("http://a/v1/").prefix, "");
        assert_eq!(server("http://[::1]:8/x/v1").prefix, "/x");
        assert!(Server::parse("https://a", None).unwrap_err().contains("plain HTTP"));
    }
}
