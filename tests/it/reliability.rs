//! Engines and gateways killed by signals; clients that disconnect, stall, or arrive in large
//! numbers.

use crate::http::{Client, Events, Transcript};
use crate::support::{Options, Server, completion, eventually, exists, later, send, streamed};
use rustix::process::Signal;
use std::io::Write;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// The gateway notices an engine's death at once; users are promised one second.
const AT_ONCE: Duration = Duration::from_secs(1);
const RESTART: Duration = Duration::from_secs(10);

/// A stream that has sent its first event.
fn running_stream(client: &Client, model: &str, prompt: &str, tokens: u32) -> Events {
    let mut events = client.stream("/v1/completions", &streamed(model, prompt, tokens)).events();
    events.next().expect("an event").expect("the stream runs");
    events
}

fn read_later(events: Events) -> std::thread::JoinHandle<(Transcript, Instant)> {
    std::thread::spawn(move || (events.transcript(), Instant::now()))
}

/// Sends `signal` to the engine while requests run, and checks every guarantee.
fn engine_death(server: &Server, model: &str, signal: Signal, within: Duration) {
    let (gateway, engine) = (server.pid, server.engine());
    let restarts = server.metric("ingot_engine_restarts_total", &[]);
    let streams: Vec<_> = (0..3)
        .map(|i| running_stream(&server.client, model, &format!("stream {i}"), 4000))
        .map(read_later)
        .collect();
    let whole: Vec<_> = (0..3)
        .map(|i| {
            let (client, body) =
                (server.client.clone(), completion(model, &format!("whole {i}"), 4000));
            later(move || client.try_post("/v1/completions", &body))
        })
        .collect();
    eventually(Duration::from_secs(5), "six requests run", || {
        server.metric("ingot_requests_running", &[]) >= 6.0
    });
    let struck = Instant::now();
    send(engine, signal);
    for stream in streams {
        let (transcript, at) = stream.join().expect("no panic");
        let Some(error) = &transcript.error else {
            panic!("a broken stream ends with an error event: {transcript:?}");
        };
        assert!(error.contains("engine"), "the error says what happened: {error}");
        assert!(!transcript.done && !transcript.broken, "no [DONE], and a proper end of the body");
        assert!(at - struck < within, "the stream failed after {:?}", at - struck);
    }
    for request in whole {
        let (answer, at) = request.join();
        let error = answer.error(503);
        assert!(error.contains("engine"), "the error says what happened: {error}");
        assert!(answer.header("retry-after").is_some(), "a client may try again");
        assert!(at - struck < within, "the request failed after {:?}", at - struck);
    }
    eventually(RESTART, "the engine is restarted", || {
        let engines = server.engines();
        server.client.get("/ready").status == 200 && engines.len() == 1 && engines != [engine]
    });
    assert!(!exists(engine), "the old engine is gone");
    assert!(!server.complete(model, "again", 8).is_empty());
    assert_eq!(server.pid, gateway);
    assert!(exists(gateway), "the gateway stays");
    assert_eq!(server.metric("ingot_engine_restarts_total", &[]), restarts + 1.0);
}

#[test]
fn a_killed_engine_is_restarted_and_its_requests_fail_clearly() {
    let server = Options::mock(2000).start();
    engine_death(&server, "mock", Signal::KILL, AT_ONCE);
    assert_eq!(server.metric("ingot_engine_restarts_total", &[("model", "mock")]), 1.0);
}

#[test]
fn an_aborted_engine_is_restarted() {
    let server = Options::mock(2000).start();
    engine_death(&server, "mock", Signal::ABORT, AT_ONCE);
    // A second time in a row gives the same result.
    engine_death(&server, "mock", Signal::ABORT, AT_ONCE);
    assert_eq!(server.metric("ingot_engine_restarts_total", &[("model", "mock")]), 2.0);
}

#[test]
fn the_watchdog_replaces_a_stopped_engine() {
    let server = Options::mock(2000).flag("--watchdog", "2s").start();
    // The engine may have answered a ping just before.
    engine_death(&server, "mock", Signal::STOP, Duration::from_secs(4));
}

#[test]
fn requests_while_the_engine_is_away_get_a_503() {
    let server = Options::mock(1000).start();
    for _ in 0..3 {
        send(server.engine(), Signal::KILL);
        eventually(RESTART, "the engine's death is seen", || {
            server.client.get("/ready").status == 503
        });
        let answer = server.client.post("/v1/completions", &completion("mock", "now", 4));
        if answer.status != 200 {
            assert!(answer.error(503).contains("restart"), "{}", answer.body);
        }
        eventually(RESTART, "the engine comes back", || server.client.get("/ready").status == 200);
    }
    assert_eq!(server.metric("ingot_engine_restarts_total", &[]), 3.0);
}

#[test]
fn an_engine_ends_with_its_gateway() {
    let mut server = Options::mock(2000).start();
    let engine = server.engine();
    let stream = running_stream(&server.client, "mock", "orphan", 4000);
    server.signal(Signal::KILL);
    server.wait(Duration::from_secs(5));
    eventually(AT_ONCE, "the engine is gone", || !exists(engine));
    assert!(stream.transcript().broken);
}

#[test]
fn a_full_queue_is_a_429_with_retry_after() {
    let server = Options::mock(5000).flag("--max-sequences", 2).flag("--queue-limit", 4).start();
    let streams: Vec<_> =
        (0..2).map(|i| running_stream(&server.client, "mock", &format!("r{i}"), 4000)).collect();
    let ask = |i: usize| {
        let (client, body) = (server.client.clone(), streamed("mock", &format!("q{i}"), 4000));
        std::thread::spawn(move || client.stream("/v1/completions", &body))
    };
    // Accepted requests get the response head at once, and wait in the queue.
    let answers: Vec<_> = (0..12).map(ask).map(|thread| thread.join().expect("no panic")).collect();
    let (queued, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|a| a.status == 200);
    assert_eq!((queued.len(), refused.len()), (4, 8));
    for answer in refused {
        let answer = answer.whole().expect("a whole answer");
        answer.error(429);
        assert_eq!(answer.json()["error"]["code"], "queue_full");
        let seconds: u32 = answer.header("retry-after").expect("Retry-After").parse().expect("s");
        assert!(seconds >= 1);
    }
    assert_eq!(server.metric("ingot_requests_rejected_total", &[("reason", "queue_full")]), 8.0);
    drop((streams, queued));
    eventually(Duration::from_secs(5), "there is room again", || {
        server.client.post("/v1/completions", &completion("mock", "later", 2)).status == 200
    });
}

#[test]
fn a_client_that_leaves_frees_its_pages() {
    let server = Options::mock(2000).start();
    let used = || server.metric("ingot_kv_pages", &[("state", "used")]);
    let streams: Vec<_> = (0..4)
        .map(|i| running_stream(&server.client, "mock", &format!("{i}").repeat(300), 4000))
        .collect();
    eventually(Duration::from_secs(2), "four requests hold pages", || used() >= 40.0);
    drop(streams);
    eventually(AT_ONCE, "the pages are free", || used() == 0.0);
    let aborted = || server.metric("ingot_request_success_total", &[("finish_reason", "abort")]);
    eventually(AT_ONCE, "the requests count as aborted", || aborted() == 4.0);
    assert_eq!(server.metric("ingot_requests_running", &[]), 0.0);

    // The same for a client that waits for a non-streamed response.
    let body = completion("mock", "impatient", 4000).to_string();
    let mut socket = TcpStream::connect(server.client.address).expect("connects");
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.write_all(head.as_bytes()).expect("sent");
    eventually(Duration::from_secs(2), "it runs", || used() > 0.0);
    drop(socket);
    eventually(AT_ONCE, "its pages are free", || used() == 0.0);
}

#[test]
fn a_slow_reader_is_paused_then_dropped_and_slows_nobody() {
    let server = Options::mock(500).flag("--slow-client-timeout", "3s").start();
    let steps = || server.metric("ingot_engine_steps_total", &[]);
    let used = || server.metric("ingot_kv_pages", &[("state", "used")]);
    let mut body = streamed("mock", "slow", 7000);
    body["n"] = 4.into();
    let begun = Instant::now();
    let stalled = server
        .client
        .open_on(
            narrow_socket(&server.client),
            "POST",
            "/v1/completions",
            "application/json",
            body.to_string().as_bytes(),
        )
        .expect("the head arrives");
    assert_eq!(stalled.status, 200);

    // Paused: there are no other requests, and the engine makes no steps.
    let mut before = steps();
    eventually(Duration::from_secs(10), "the request is paused", || {
        std::thread::sleep(Duration::from_millis(150));
        let now = steps();
        std::mem::replace(&mut before, now) == now
    });
    assert!(before < 7000.0, "it was paused before its end, after {before} steps");
    assert!(used() > 0.0, "a paused request keeps its pages");

    // Other requests run at full speed meanwhile.
    let others: Vec<_> = (0..4)
        .map(|i| running_stream(&server.client, "mock", &format!("fast {i}"), 400))
        .map(read_later)
        .collect();
    for other in others {
        let (transcript, _) = other.join().expect("no panic");
        assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
    }

    eventually(Duration::from_secs(10), "the slow client is dropped", || used() == 0.0);
    assert!(begun.elapsed() > Duration::from_secs(3), "it had its time");
    let aborted = server.metric("ingot_request_success_total", &[("finish_reason", "abort")]);
    assert!(aborted >= 1.0, "dropped, not finished");
    drop(stalled);
}

/// A connection whose receive buffer is minimal.
fn narrow_socket(client: &Client) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, connect, socket, sockopt};
    let fd: OwnedFd = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    sockopt::set_socket_recv_buffer_size(&fd, 2048).expect("a small buffer");
    connect(&fd, &client.address).expect("connects");
    TcpStream::from(fd)
}
