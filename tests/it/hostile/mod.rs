//! Thousands of malformed requests, generated from a seed, against a live server.
//!
//! The server must respond to every request within the target's patience: with a success, with an
//! error in OpenAI's format that is not the server's own fault (no 500, no 503), or by closing the
//! connection. Valid requests in between must succeed.
//!
//! The server should be started with short time-outs, so that slow senders do not slow the test,
//! and a short context, so that a mutated request that happens to be valid ends soon:
//! `--header-timeout 500ms --body-timeout 500ms --context-length 512 --body-limit 1MiB
//! --request-timeout 5s`.

mod cases;

use cases::{Attempt, Random, make, request};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The server to test.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub address: SocketAddr,
    /// A loaded model that generates text.
    pub model: String,
    pub api_key: Option<String>,
    /// If given, the admin routes are attacked too.
    pub admin_key: Option<String>,
    /// A response that takes longer counts as a hang.
    pub patience: Duration,
}

/// The results of an attack.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub answered: usize,
    pub closed: usize,
    /// Failures, each with the request that caused it; empty if there are none.
    pub failures: Vec<String>,
}

/// Sends `count` malformed requests, generated from `seed`, on eight connections in parallel, with
/// valid requests in between. Case `i` depends only on `(seed, i)`.
pub(crate) fn attack(target: &Target, seed: u64, count: usize) -> Outcome {
    let next = AtomicUsize::new(0);
    let parts = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let mut outcome = Outcome::default();
                    loop {
                        let case = next.fetch_add(1, Ordering::Relaxed);
                        if case >= count || outcome.failures.len() >= 5 {
                            return outcome;
                        }
                        one(target, seed, case, &mut outcome);
                    }
                })
            })
            .collect();
        let join =
            |worker: std::thread::ScopedJoinHandle<Outcome>| worker.join().expect("no panic");
        workers.into_iter().map(join).collect::<Vec<_>>()
    });
    let mut all = Outcome::default();
    for part in parts {
        all.answered += part.answered;
        all.closed += part.closed;
        all.failures.extend(part.failures);
    }
    if let Err(reason) = good_request(target) {
        all.failures.push(format!("a good request at the end: {reason}"));
    }
    all
}

fn one(target: &Target, seed: u64, case: usize, outcome: &mut Outcome) {
    let mut random = Random(seed ^ (case as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let attempt = make(target, &mut random, case);
    match send(target, &attempt) {
        Ok(Some(_)) => outcome.answered += 1,
        Ok(None) => outcome.closed += 1,
        Err(reason) => outcome.failures.push(format!(
            "case {case} of seed {seed} ({}): {reason}\nsent {} bytes: {}",
            attempt.kind,
            attempt.bytes.len(),
            attempt.bytes[..attempt.bytes.len().min(600)].escape_ascii()
        )),
    }
    if case.is_multiple_of(250)
        && let Err(reason) = good_request(target)
    {
        outcome.failures.push(format!("a good request after case {case}: {reason}"));
    }
}

/// A request that must always succeed.
pub(crate) fn good_request(target: &Target) -> Result<(), String> {
    let body = json!({"model": target.model, "prompt": "Hello", "max_tokens": 2}).to_string();
    let attempt = Attempt::whole("good", request(target, "POST /v1/completions", &[], &body));
    match send(target, &attempt)? {
        Some(answer) if answer.status == 200 && answer.body["choices"].is_array() => Ok(()),
        Some(answer) => Err(format!("status {}: {}", answer.status, answer.body)),
        None => Err("the connection was closed".to_owned()),
    }
}

/// A complete response.
struct Answer {
    status: u16,
    /// `null` if the body is not JSON.
    body: Value,
}

/// Sends an attempt; `None` if the connection was closed without a response.
fn send(target: &Target, attempt: &Attempt) -> Result<Option<Answer>, String> {
    let deadline = Instant::now() + target.patience;
    let mut stream = TcpStream::connect_timeout(&target.address, target.patience)
        .map_err(|error| format!("no connection: {error}"))?;
    let _ = stream.set_nodelay(true);
    let _ = stream.set_write_timeout(Some(target.patience));
    // The server may respond and close the connection before it has read the whole request, so
    // write errors are ignored.
    let (first, second) = attempt.bytes.split_at(attempt.bytes.len() / 2);
    let _ = stream.write_all(first);
    std::thread::sleep(attempt.pause);
    let _ = stream.write_all(second);
    if attempt.half_close {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let is_head = attempt.bytes.starts_with(b"HEAD ");
    let mut got = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    loop {
        if let Some(answer) = parse(&got, is_head, false) {
            return check(answer).map(Some);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("no end within {:?}; so far: {}", target.patience, show(&got)));
        }
        let _ = stream.set_read_timeout(Some(left));
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => got.extend_from_slice(&chunk[..read]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    match parse(&got, is_head, true) {
        Some(answer) => check(answer).map(Some),
        // No response, or a response that was cut short by a connection reset.
        None => Ok(None),
    }
}

/// Checks that an error has OpenAI's format and is not the server's fault.
fn check(answer: (u16, Vec<u8>, bool)) -> Result<Answer, String> {
    let (status, bytes, has_body) = answer;
    let body: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    if (200..300).contains(&status) {
        return Ok(Answer { status, body });
    }
    let shown = show(&bytes);
    if !(400..500).contains(&status) && status != 504 {
        return Err(format!("status {status}: {shown}"));
    }
    let error = &body["error"];
    let text = |key: &str| error[key].is_string();
    let text_or_null = |key: &str| error.get(key).is_some_and(|v| v.is_string() || v.is_null());
    let shaped = text("message") && text("type") && text_or_null("param") && text_or_null("code");
    if has_body && !shaped {
        return Err(format!("status {status} without OpenAI's error body: {shown}"));
    }
    Ok(Answer { status, body })
}

/// Status, body, and whether a body is expected, of the first final response in `bytes`; `None`
/// while it is incomplete. `at_end`: no more bytes follow.
fn parse(bytes: &[u8], is_head: bool, at_end: bool) -> Option<(u16, Vec<u8>, bool)> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let status: u16 = head.split(' ').nth(1)?.parse().ok()?;
    let rest = &bytes[end + 4..];
    if (100..200).contains(&status) {
        return parse(rest, is_head, at_end);
    }
    if is_head {
        return Some((status, Vec::new(), false));
    }
    let header = |name: &str| {
        head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
    };
    if header("transfer-encoding") == Some("chunked") {
        return dechunk(rest).map(|body| (status, body, true));
    }
    match header("content-length").and_then(|length| length.parse::<usize>().ok()) {
        Some(length) => Some((status, rest.get(..length)?.to_vec(), true)),
        None => at_end.then(|| (status, rest.to_vec(), true)),
    }
}

fn dechunk(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|window| window == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).ok()?, 16).ok()?;
        let data = bytes.get(line + 2..line + 2 + size + 2)?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(&data[..size]);
        bytes = &bytes[line + 2 + size + 2..];
    }
}

fn show(bytes: &[u8]) -> String {
    bytes[..bytes.len().min(500)].escape_ascii().to_string()
}

#[test]
fn hostile_requests_are_answered_and_do_no_harm() {
    let mut server = crate::support::Options::mock(0)
        .admin()
        .flag("--header-timeout", "500ms")
        .flag("--body-timeout", "500ms")
        .flag("--body-limit", "1MiB")
        .flag("--request-timeout", "5s")
        .start();
    let engine = server.engine();
    let target = Target {
        address: server.client.address,
        model: "mock".to_owned(),
        api_key: None,
        admin_key: Some(crate::support::ADMIN.to_owned()),
        patience: Duration::from_secs(20),
    };
    let outcome = attack(&target, 1, 4_000);
    assert!(outcome.failures.is_empty(), "{}", outcome.failures.join("\n\n"));
    // Most requests get a response: a server that closes every connection must not pass.
    assert!(outcome.answered > outcome.closed * 4, "{outcome:?}");
    assert!(server.lives() && server.engine() == engine, "nothing was restarted");
    assert_eq!(server.metric("ingot_engine_restarts_total", &[]), 0.0);
    let resident = [("process", "gateway")];
    let bytes = server.metric("ingot_process_resident_memory_bytes", &resident);
    assert!(bytes < 256e6, "the gateway holds {bytes} bytes");
}
