use super::super::http::{HttpError, Server};
use super::prompts::Prompts;
use super::report::{Report, Times};
use super::*;
use clap::Parser;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug, Parser)]
struct Bench {
    #[command(flatten)]
    options: BenchServeOptions,
}

fn options(url: &str, more: &[&str]) -> BenchServeOptions {
    let arguments = ["bench", "--url", url, "--warmup", "0"].into_iter();
    let arguments = arguments.chain(more.iter().copied());
    Bench::try_parse_from(arguments).unwrap().options
}

#[derive(Default)]
struct Fake {
    requests: AtomicUsize,
    connections: AtomicUsize,
    running: AtomicUsize,
    most_running: AtomicUsize,
    /// Every so many requests are answered with 429; 0 never.
    refuse_every: usize,
    /// While a prompt of more than 1000 bytes is read, streams stand still.
    stall: std::sync::RwLock<()>,
}

/// An OpenAI-compatible server: each word of the prompt is a token, tokens come every 2 ms.
fn fake(server: Arc<Fake>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (server, stream) = (server.clone(), stream.unwrap());
            stream.set_nodelay(true).unwrap();
            server.connections.fetch_add(1, Ordering::SeqCst);
            std::thread::spawn(move || while serve_one(&stream, &server) {});
        }
    });
    url
}

fn serve_one(stream: &TcpStream, server: &Fake) -> bool {
    let mut reader = BufReader::new(stream);
    let (mut first, mut length) = (String::new(), 0);
    if reader.read_line(&mut first).unwrap_or(0) == 0 {
        return false;
    }
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let mut out = stream;
    let whole = |status: &str, text: &str| {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{text}", text.len())
    };
    if first.starts_with("GET /v1/models") {
        return out.write_all(whole("200 OK", r#"{"data":[{"id":"fake"}]}"#).as_bytes()).is_ok();
    }
    let request: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let prompt = request["messages"][0]["content"].as_str().unwrap().to_owned();
    let prompt_tokens = prompt.split_whitespace().count() + 7;
    let usage = format!("{{\"prompt_tokens\":{prompt_tokens},\"completion_tokens\":COUNT}}");
    let count = request["max_tokens"].as_u64().unwrap();
    let usage = usage.replace("COUNT", &count.to_string());
    if request["stream"] == false {
        let text = format!("{{\"usage\":{usage}}}");
        return out.write_all(whole("200 OK", &text).as_bytes()).is_ok();
    }
    let number = server.requests.fetch_add(1, Ordering::SeqCst) + 1;
    if server.refuse_every > 0 && number.is_multiple_of(server.refuse_every) {
        let text = r#"{"error":{"message":"busy"}}"#;
        return out.write_all(whole("429 Too Many Requests", text).as_bytes()).is_ok();
    }
    let running = server.running.fetch_add(1, Ordering::SeqCst) + 1;
    server.most_running.fetch_max(running, Ordering::SeqCst);
    if prompt.len() > 1_000 {
        let _still = server.stall.write().unwrap();
        std::thread::sleep(Duration::from_millis(150));
    }
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut alive = out.write_all(head.as_bytes()).is_ok();
    let mut event = |text: &str| {
        let text = format!("data: {text}\n\n");
        out.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).is_ok()
    };
    for _ in 0..count {
        std::thread::sleep(Duration::from_millis(2));
        drop(server.stall.read());
        alive = alive && event(r#"{"choices":[{"delta":{"content":"x"}}],"usage":null}"#);
        if !alive {
            break;
        }
    }
    alive = alive && event(&format!("{{\"choices\":[],\"usage\":{usage}}}")) && event("[DONE]");
    server.running.fetch_sub(1, Ordering::SeqCst);
    alive && out.write_all(b"0\r\n\r\n").is_ok()
}

fn bench(server: &Arc<Fake>, more: &[&str]) -> Report {
    let options = options(&fake(server.clone()), more);
    let parsed = Server::parse(&options.url, None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(measure(&options, parsed)).unwrap()
}

#[test]
fn closed_loop_counts_tokens_and_reuses_connections() {
    let server = Arc::new(Fake::default());
    let more = ["--concurrency", "3", "--requests", "9", "--output-tokens", "5"];
    let report = bench(&server, &more);
    let run = report.median.as_ref().unwrap();
    assert_eq!((run.succeeded, run.output_tokens, run.prompt_tokens), (9, 45, 9 * 87));
    assert_eq!(run.inter_token_latency_ms.count, 9 * 4);
    assert!(run.inter_token_latency_ms.mean >= 1.5 && run.time_to_first_token_ms.p50 >= 2.0);
    assert!(run.end_to_end_ms.p50 >= 10.0 && run.output_tokens_per_second > 0.0);
    assert_eq!(server.most_running.load(Ordering::SeqCst), 3);
    // One for the list of models, one for each client.
    assert_eq!(server.connections.load(Ordering::SeqCst), 4);
    let table = report.table();
    assert!(table.contains("9 ok, 0 failed") && table.contains("inter-token"), "{table}");
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["settings"]["concurrency"], 3);
    assert!(json["median"]["end_to_end_ms"]["p99"].as_f64().unwrap() > 0.0);
}

#[test]
fn failures_are_counted_by_kind() {
    let server = Arc::new(Fake { refuse_every: 2, ..Fake::default() });
    let report = bench(&server, &["--concurrency", "1", "--requests", "4", "--output-tokens", "1"]);
    let run = report.median.as_ref().unwrap();
    assert_eq!((run.succeeded, run.errors["status 429"]), (2, 2));
    assert!(report.any_success() && report.table().contains("busy"));
    let server = Arc::new(Fake { refuse_every: 1, ..Fake::default() });
    let report = bench(&server, &["--requests", "2"]);
    assert!(!report.any_success());
}

#[test]
fn waves_and_open_loop() {
    let server = Arc::new(Fake::default());
    let more = ["--arrive-together", "--concurrency", "4", "--requests", "8", "--repeat", "2"];
    let report = bench(&server, &more);
    assert_eq!(report.runs.len(), 2);
    assert_eq!(server.most_running.load(Ordering::SeqCst), 4);
    let server = Arc::new(Fake::default());
    let more = ["--rate", "200", "--requests", "20", "--output-tokens", "2", "--adapters", "a,b"];
    let report = bench(&server, &more);
    let run = report.median.as_ref().unwrap();
    assert_eq!(run.succeeded, 20);
    assert!(run.seconds < 10.0, "{}", run.seconds);
}

#[test]
fn lengths_in_tokens_are_measured() {
    let server = Arc::new(Fake::default());
    let more = ["--prompt-tokens", "40", "--shared-prefix-tokens", "100", "--requests", "1"];
    let report = bench(&server, &more);
    assert_eq!(report.median.as_ref().unwrap().prompt_tokens, 147);
}

#[test]
fn the_probe_sees_what_a_long_prompt_does_to_streams() {
    let server = Arc::new(Fake::default());
    let more = [
        "--probe-prompt-tokens",
        "500",
        "--prompt-words",
        "10",
        "--concurrency",
        "2",
        "--output-tokens",
        "4000",
    ];
    let report = bench(&server, &more);
    let probe = report.median_probe.as_ref().unwrap();
    assert_eq!((probe.streams, probe.probe_prompt_tokens), (2, 507));
    assert!(probe.before_ms.p50 < 50.0 && probe.during_ms.max >= 100.0, "{probe:?}");
    assert!(probe.probe_time_to_first_token_ms >= 150.0 && report.table().contains("507"));
}

#[test]
fn prompts_are_repeatable_and_differ() {
    let options =
        options("http://x", &["--shared-prefix-words", "50", "--shared-prefix-share", "0.5"]);
    let server = Server::parse("http://x", None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let prompts = runtime.block_on(Prompts::prepare(&options, &server, "m")).unwrap();
    let text = |repetition, index| {
        let value: serde_json::Value =
            serde_json::from_slice(&prompts.body("m", repetition, index)).unwrap();
        value["messages"][0]["content"].as_str().unwrap().to_owned()
    };
    assert_eq!(text(0, 1), text(0, 1));
    assert_ne!(text(0, 0), text(0, 2));
    assert_ne!(text(0, 1), text(1, 1));
    let words = |index| text(0, index).split(' ').count();
    assert_eq!((0..4).map(words).collect::<Vec<_>>(), [80, 130, 80, 130]);
    assert_eq!(text(0, 1)[..100], text(0, 3)[..100]);
    assert_ne!(text(0, 1)[..100], text(1, 3)[..100]);
}

#[test]
fn percentiles_are_by_nearest_rank() {
    let times = Times::of((1..=100).map(Duration::from_millis));
    assert_eq!((times.p50, times.p90, times.p99, times.max), (50.0, 90.0, 99.0, 100.0));
    assert_eq!(Times::of([]), Times::default());
    assert_eq!(HttpError::Status { status: 429, message: String::new() }.kind(), "status 429");
}
