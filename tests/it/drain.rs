//! SIGTERM: new requests are rejected, running ones finish, and the gateway exits in time.

use crate::support::{Options, Server, completion, eventually, exists, streamed};
use rustix::process::Signal;
use std::time::{Duration, Instant};

/// Waits until the server reports that it is draining.
fn draining(server: &Server) {
    eventually(Duration::from_secs(1), "the server is not ready any more", || {
        let answer = server.client.get("/ready");
        answer.status == 503 && answer.body.contains("draining")
    });
}

#[test]
fn sigterm_lets_running_requests_finish() {
    let mut server = Options::mock(2000).flag("--grace-time", "20s").start();
    let engine = server.engine();
    let body = streamed("mock", "last words", 500);
    let mut events = server.client.stream("/v1/completions", &body).events();
    events.next().expect("an event").expect("the stream runs");
    let asked = Instant::now();
    server.signal(Signal::TERM);
    draining(&server);
    assert_eq!(server.client.get("/health").status, 200, "it still lives");
    let answer = server.client.post("/v1/completions", &completion("mock", "too late", 4));
    assert!(answer.error(503).contains("shutting down"), "{}", answer.body);
    let transcript = events.transcript();
    assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
    assert!(transcript.text.len() > 400, "all of the answer came: {}", transcript.text.len());
    assert_eq!(server.wait(Duration::from_secs(5)).code(), Some(0), "{}", server.log());
    assert!(asked.elapsed() < Duration::from_secs(15), "it did not wait for the grace time");
    assert!(!exists(engine));
}

#[test]
fn an_idle_server_ends_at_once() {
    let mut server = Options::mock(0).start();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(Duration::from_secs(2)).code(), Some(0), "{}", server.log());
}

#[test]
fn sigint_drains_as_well() {
    let mut server = Options::mock(0).start();
    server.signal(Signal::INT);
    assert_eq!(server.wait(Duration::from_secs(2)).code(), Some(0), "{}", server.log());
}

#[test]
fn the_grace_time_ends() {
    let mut server = Options::mock(5000).flag("--grace-time", "1s").start();
    let body = streamed("mock", "endless", 8000);
    let mut events = server.client.stream("/v1/completions", &body).events();
    events.next().expect("an event").expect("the stream runs");
    let asked = Instant::now();
    server.signal(Signal::TERM);
    let transcript = events.transcript();
    let error = transcript.error.expect("it is told that it was cut off");
    assert!(!error.is_empty() && !transcript.done);
    let status = server.wait(Duration::from_secs(5));
    assert_eq!(status.code(), Some(0));
    let took = asked.elapsed();
    assert!((Duration::from_millis(900)..Duration::from_secs(4)).contains(&took), "{took:?}");
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Options::mock(5000).flag("--grace-time", "60s").start();
    let engine = server.engine();
    let body = streamed("mock", "endless", 8000);
    let mut events = server.client.stream("/v1/completions", &body).events();
    events.next().expect("an event").expect("the stream runs");
    server.signal(Signal::TERM);
    draining(&server);
    server.signal(Signal::TERM);
    let status = server.wait(Duration::from_secs(1));
    assert_ne!(status.code(), Some(0), "requests were cut off");
    eventually(Duration::from_secs(1), "the engine is gone", || !exists(engine));
}
