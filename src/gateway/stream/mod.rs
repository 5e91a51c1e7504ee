//! Conversion of engine events to server-sent events.
//!
//! A response body polls the engine's events itself: no task and no queue lie between them. All
//! events that are ready at the same time are sent in one chunk. Dropping the body (the client has
//! disconnected) cancels the request. A request is also cancelled if its client reads nothing for
//! too long.

#[cfg(test)]
pub(crate) use running::fake;

mod running;

pub use running::{GenerationStream, Usage, UsageBody};

use crate::gateway::error::ApiError;
use crate::ipc::Event;
use axum::body::Body as AxumBody;
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http::{HeaderValue, StatusCode, header};
use http_body::{Body, Frame};
use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;
use std::convert::Infallible;
use std::future::Future;
use std::io::Write;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep, sleep};

/// After this much silence a comment is sent, so that proxies keep the connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A chunk is sent when it has grown to this many bytes.
const CHUNK: usize = 64 << 10;

/// Format in which an endpoint writes the events of a request.
pub trait EventWriter: Send + 'static {
    /// Writes the output for one event of one prompt; many events have no output.
    fn event(&mut self, prompt: usize, event: Event, out: &mut Sse);

    /// Takes the choice, of the prompt of the last event, that must end now. Returned once.
    fn to_finish(&mut self) -> Option<u32> {
        None
    }

    /// Called when all prompts have ended without error. The caller appends `[DONE]`.
    fn end(&mut self, usage: Usage, out: &mut Sse);
}

/// Buffer of server-sent event frames.
#[derive(Debug, Default)]
pub struct Sse {
    bytes: BytesMut,
}

impl Sse {
    /// Writes one event whose data is JSON text (which has no line breaks).
    pub fn json(&mut self, value: &impl Serialize) {
        self.bytes.extend_from_slice(b"data: ");
        let written = value.serialize(&mut Serializer::with_formatter(&mut *self, OneLine));
        debug_assert!(written.is_ok(), "our own types serialize: {written:?}");
        self.bytes.extend_from_slice(b"\n\n");
    }

    fn done(&mut self) {
        self.bytes.extend_from_slice(b"data: [DONE]\n\n");
    }
}

/// JSON formatter that escapes the characters which some clients (Python's `splitlines`) treat as
/// line ends although JSON and server-sent events do not.
struct OneLine;

impl Formatter for OneLine {
    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> std::io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(['\u{85}', '\u{2028}', '\u{2029}']) {
            let (before, found) = rest.split_at(at);
            writer.write_all(before.as_bytes())?;
            let mut found = found.chars();
            if let Some(c) = found.next() {
                write!(writer, "\\u{:04x}", u32::from(c))?;
            }
            rest = found.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}

/// Serializes a value as JSON on one line for every client (see [`Sse::json`]).
///
/// # Errors
/// If the value does not serialize.
pub fn json_line(value: &impl Serialize) -> serde_json::Result<String> {
    let mut bytes = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut bytes, OneLine))?;
    Ok(String::from_utf8(bytes).expect("JSON is UTF-8"))
}

impl Write for Sse {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A streamed response: status 200 and the events of `running`, written by `transcript`.
///
/// `patience` is the time that a client may leave a chunk unread before its request is dropped.
pub fn respond<T: EventWriter>(
    running: GenerationStream,
    transcript: T,
    patience: Duration,
) -> Response {
    let body = AxumBody::new(EventStream::new(running, transcript, patience, KEEP_ALIVE));
    let mut response = (StatusCode::OK, body).into_response();
    let headers = response.headers_mut();
    let set = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Without this header nginx buffers the events.
        (http::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    for (name, value) in set {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Body of a streamed response.
struct EventStream<T> {
    state: Arc<Mutex<State<T>>>,
    /// Silence after which a comment is sent.
    quiet: Duration,
    keep_alive: Pin<Box<Sleep>>,
    /// Task that detects a client that reads nothing.
    watcher: AbortHandle,
}

struct State<T> {
    /// `None` once the stream has ended, for any reason.
    running: Option<GenerationStream>,
    transcript: T,
    out: Sse,
    /// Time at which a chunk was given to the connection; `None` once it asks for the next chunk.
    untaken_since: Option<Instant>,
}

impl<T: EventWriter> EventStream<T> {
    fn new(running: GenerationStream, transcript: T, patience: Duration, quiet: Duration) -> Self {
        let state = Arc::new(Mutex::new(State {
            running: Some(running),
            transcript,
            out: Sse::default(),
            untaken_since: None,
        }));
        let watcher = tokio::spawn(watch(Arc::downgrade(&state), patience)).abort_handle();
        Self { state, quiet, keep_alive: Box::pin(sleep(quiet)), watcher }
    }
}

impl<T> Drop for EventStream<T> {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

impl<T: EventWriter> State<T> {
    /// Writes all events that are ready into `out`.
    fn fill(&mut self, context: &mut Context<'_>) {
        while self.out.bytes.len() < CHUNK {
            let Some(running) = &mut self.running else { return };
            match running.poll_next(context) {
                Poll::Pending => return,
                Poll::Ready(Some(Ok((prompt, event)))) => {
                    self.transcript.event(prompt, event, &mut self.out);
                    if let Some(choice) = self.transcript.to_finish() {
                        running.finish(prompt, choice);
                    }
                }
                Poll::Ready(Some(Err(error))) => self.fail(&error),
                Poll::Ready(None) => {
                    self.transcript.end(running.usage(), &mut self.out);
                    self.out.done();
                    self.running = None;
                }
            }
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.out.json(&error.body());
        self.running = None;
    }
}

impl<T: EventWriter> Body for EventStream<T> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let mut state = lock(&this.state);
        state.untaken_since = None;
        state.fill(context);
        if state.out.bytes.is_empty() {
            if state.running.is_none() {
                return Poll::Ready(None);
            }
            if this.keep_alive.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            state.out.bytes.extend_from_slice(b": keep-alive\n\n");
        }
        let now = Instant::now();
        state.untaken_since = Some(now);
        let chunk = state.out.bytes.split().freeze();
        drop(state);
        this.keep_alive.as_mut().reset(now + this.quiet);
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }
}

/// Ends the request of a client that leaves a chunk unread for longer than `patience`.
async fn watch<T: EventWriter>(state: Weak<Mutex<State<T>>>, patience: Duration) {
    let mut wait = patience;
    loop {
        sleep(wait).await;
        let Some(state) = state.upgrade() else { return };
        let mut state = lock(&state);
        if state.running.is_none() {
            return;
        }
        wait = patience;
        if let Some(since) = state.untaken_since {
            match patience.checked_sub(since.elapsed()) {
                Some(left) if !left.is_zero() => wait = left,
                _ => {
                    state.fail(&ApiError::timeout("The client read its stream too slowly."));
                    return;
                }
            }
        }
    }
}

/// Locks the state. A poisoned lock means that a transcript panicked; the stream has then ended.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::fake;
    use super::*;
    use crate::ipc::{EngineError, FinishReason};
    use http_body_util::BodyExt;
    use serde_json::json;

    /// Writes texts and the completion tokens.
    struct Plain;

    impl EventWriter for Plain {
        fn event(&mut self, prompt: usize, event: Event, out: &mut Sse) {
            if let Event::Delta { text, .. } = event {
                out.json(&json!({"prompt": prompt, "text": text}));
            }
        }

        fn end(&mut self, usage: Usage, out: &mut Sse) {
            out.json(&json!({"tokens": usage.completion_tokens}));
        }
    }

    const HOUR: Duration = Duration::from_secs(3600);

    async fn frame(body: &mut AxumBody) -> String {
        let frame = body.frame().await.expect("a frame").expect("no error");
        String::from_utf8(frame.into_data().expect("data").to_vec()).expect("UTF-8")
    }

    #[tokio::test]
    async fn what_is_ready_at_once_leaves_in_one_chunk() {
        let (running, senders) = fake::running(1, HOUR);
        let mut body = respond(running, Plain, HOUR).into_body();
        for text in ["a", "b\n"] {
            senders[0].send(fake::delta(0, text)).unwrap();
        }
        let expected =
            "data: {\"prompt\":0,\"text\":\"a\"}\n\ndata: {\"prompt\":0,\"text\":\"b\\n\"}\n\n";
        assert_eq!(frame(&mut body).await, expected);
        senders[0].send(fake::finish(0, FinishReason::Stop, 2)).unwrap();
        senders[0].send(fake::done()).unwrap();
        assert_eq!(frame(&mut body).await, "data: {\"tokens\":2}\n\ndata: [DONE]\n\n");
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn a_failure_is_an_error_event_and_the_end() {
        let events = vec![
            fake::delta(0, "a"),
            Event::Failed(EngineError {
                kind: crate::ipc::EngineErrorKind::Unavailable,
                message: "the engine died".into(),
                param: None,
            }),
        ];
        let body = respond(fake::recorded(events), Plain, HOUR).into_body();
        let text = body.collect().await.unwrap().to_bytes();
        let text = String::from_utf8(text.to_vec()).unwrap();
        assert!(text.contains("data: {\"error\":{\"message\":\"the engine died\""), "{text}");
        assert!(text.ends_with("}}\n\n") && !text.contains("[DONE]"), "{text}");
    }

    #[tokio::test]
    async fn dropping_the_body_cancels() {
        let (running, senders) = fake::running(1, HOUR);
        let body = respond(running, Plain, HOUR).into_body();
        assert!(!senders[0].is_closed());
        drop(body);
        assert!(senders[0].is_closed());
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_dropped() {
        let (running, senders) = fake::running(1, HOUR);
        let mut body = respond(running, Plain, Duration::from_millis(40)).into_body();
        // Waiting for the engine does not count as a slow client.
        tokio::time::sleep(Duration::from_millis(120)).await;
        assert!(!senders[0].is_closed());
        senders[0].send(fake::delta(0, "a")).unwrap();
        frame(&mut body).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(senders[0].is_closed());
        assert!(frame(&mut body).await.contains("too slowly"));
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn silence_is_filled_with_comments() {
        let (running, _senders) = fake::running(1, HOUR);
        let quiet = Duration::from_millis(20);
        let mut body = AxumBody::new(EventStream::new(running, Plain, HOUR, quiet));
        let before = Instant::now();
        assert_eq!(frame(&mut body).await, ": keep-alive\n\n");
        assert_eq!(frame(&mut body).await, ": keep-alive\n\n");
        assert!(before.elapsed() >= quiet * 2);
    }
}
