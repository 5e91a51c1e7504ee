//! One streamed request, timed.

use super::super::http::{Connection, HttpError, Server, SseLines, error_message};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::Method;
use std::time::{Duration, Instant};

/// What came of one request.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// From sending to the first token.
    pub first_token: Duration,
    pub total: Duration,
    /// When each piece of text arrived.
    pub arrivals: Vec<Instant>,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
}

impl Sample {
    /// Times between neighbouring pieces of text.
    pub(super) fn gaps(&self) -> impl Iterator<Item = Duration> {
        self.arrivals.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// Sends `body` on the connection in `slot` (or a new one) and reads the stream to its end. The
/// connection goes back into the slot if it can be used again. `on_text` is called at every piece.
pub(super) async fn stream(
    server: &Server,
    slot: &mut Option<Connection>,
    path: &str,
    body: Bytes,
    timeout: Duration,
    on_text: impl FnMut(Instant),
) -> Result<Sample, HttpError> {
    let work = stream_unbounded(server, slot, path, body, on_text);
    tokio::time::timeout(timeout, work).await.unwrap_or(Err(HttpError::Timeout(timeout)))
}

async fn stream_unbounded(
    server: &Server,
    slot: &mut Option<Connection>,
    path: &str,
    body: Bytes,
    mut on_text: impl FnMut(Instant),
) -> Result<Sample, HttpError> {
    let start = Instant::now();
    let mut reusable = slot.take();
    if let Some(open) = &mut reusable
        && !open.ready().await
    {
        reusable = None;
    }
    let (mut connection, reused) = match reusable {
        Some(open) => (open, true),
        None => (server.connect().await?, false),
    };
    let mut sample = Sample::default();
    let response = match connection.send(server, Method::POST, path, Some(body.clone())).await {
        // A server may close an idle connection at any moment: that is no failure of the request.
        Err(HttpError::Lost(_)) if reused => {
            connection = server.connect().await?;
            connection.send(server, Method::POST, path, Some(body)).await?
        }
        answer => answer?,
    };
    let mut frames = response.into_body();
    let mut lines = SseLines::default();
    let mut ended = false;
    let mut failure = None;
    while let Some(frame) = frames.frame().await {
        let frame = frame.map_err(|error| HttpError::Lost(error.to_string()))?;
        let Some(bytes) = frame.data_ref() else { continue };
        let now = Instant::now();
        lines.feed(bytes, |data| match read_chunk(data) {
            Chunk::Text { usage } => {
                if sample.arrivals.is_empty() {
                    sample.first_token = now - start;
                }
                sample.arrivals.push(now);
                on_text(now);
                if usage {
                    take_usage(data, &mut sample);
                }
            }
            Chunk::Usage => take_usage(data, &mut sample),
            Chunk::Done => ended = true,
            Chunk::Error(message) => failure = Some(HttpError::InStream(message)),
            Chunk::Other => {}
        });
    }
    sample.total = start.elapsed();
    if let Some(failure) = failure {
        return Err(failure);
    }
    if !ended {
        return Err(HttpError::Lost("the stream ended without [DONE]".to_owned()));
    }
    if sample.output_tokens == 0 {
        // The server gives no usage: a piece of text is a token, as nearly all servers stream.
        sample.output_tokens = sample.arrivals.len() as u64;
    }
    if sample.arrivals.is_empty() {
        sample.first_token = sample.total;
    }
    *slot = Some(connection);
    Ok(sample)
}

#[derive(Debug, PartialEq)]
enum Chunk {
    Text { usage: bool },
    Usage,
    Done,
    Error(String),
    Other,
}

/// Looks at the bytes only: parsing each chunk as JSON would take the cores from the server.
fn read_chunk(data: &[u8]) -> Chunk {
    if data == b"[DONE]" {
        return Chunk::Done;
    }
    let usage = contains_object(data, b"\"usage\"");
    // Also matches reasoning_content.
    if has_text(data, b"content\"") || has_text(data, b"\"text\"") {
        return Chunk::Text { usage };
    }
    if usage {
        return Chunk::Usage;
    }
    if find(data, b"\"error\"").is_some()
        && let Some(message) = error_message(data)
    {
        return Chunk::Error(message);
    }
    Chunk::Other
}

fn find(data: &[u8], name: &[u8]) -> Option<usize> {
    data.windows(name.len()).position(|window| window == name)
}

/// What follows `name`, a colon and spaces.
fn value_after<'a>(data: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let rest = data[find(data, name)? + name.len()..].trim_ascii_start();
    Some(rest.strip_prefix(b":")?.trim_ascii_start())
}

/// Whether `name` has a string that is not empty.
fn has_text(data: &[u8], name: &[u8]) -> bool {
    let mut rest = data;
    while let Some(at) = find(rest, name) {
        rest = &rest[at..];
        if value_after(rest, name).is_some_and(|v| v.starts_with(b"\"") && !v.starts_with(b"\"\""))
        {
            return true;
        }
        rest = &rest[name.len()..];
    }
    false
}

fn contains_object(data: &[u8], name: &[u8]) -> bool {
    value_after(data, name).is_some_and(|value| value.starts_with(b"{"))
}

fn take_usage(data: &[u8], sample: &mut Sample) {
    let Ok(value) = serde_json::from_slice::<serde_json::Value>(data) else { return };
    let usage = &value["usage"];
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
    sample.prompt_tokens = number(&usage["prompt_tokens"]);
    sample.output_tokens = number(&usage["completion_tokens"]);
    sample.cached_tokens = number(&usage["prompt_tokens_details"]["cached_tokens"]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_told_apart_by_their_bytes() {
        let text = Chunk::Text { usage: false };
        assert_eq!(read_chunk(br#"{"choices":[{"delta":{"content":"a"}}],"usage":null}"#), text);
        assert_eq!(read_chunk(br#"{"choices": [{"delta": {"content": "\""}}]}"#), text);
        assert_eq!(read_chunk(br#"{"delta":{"content":null,"reasoning_content":"x"}}"#), text);
        assert_eq!(read_chunk(br#"{"choices":[{"text":"a"}]}"#), text);
        assert_eq!(read_chunk(br#"{"delta":{"role":"assistant","content":""}}"#), Chunk::Other);
        assert_eq!(read_chunk(br#"{"choices":[],"usage":{"prompt_tokens":1}}"#), Chunk::Usage);
        assert_eq!(read_chunk(b"[DONE]"), Chunk::Done);
        let error = Chunk::Error("no".to_owned());
        assert_eq!(read_chunk(br#"{"error":{"message":"no"}}"#), error);
    }
}
