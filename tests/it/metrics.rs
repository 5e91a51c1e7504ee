//! `/metrics` after known requests, and the exact bytes of a stream.

use crate::models_made::{llama, peft};
use crate::support::{Options, Sample, completion, eventually, samples, send, streamed};
use ingot::engine::runner::mock::Mock;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Every metric family and its type.
const SERIES: &[(&str, &str)] = &[
    ("ingot_requests_running", "gauge"),
    ("ingot_requests_waiting", "gauge"),
    ("ingot_request_queue_seconds", "histogram"),
    ("ingot_time_to_first_token_seconds", "histogram"),
    ("ingot_inter_token_latency_seconds", "histogram"),
    ("ingot_e2e_request_latency_seconds", "histogram"),
    ("ingot_request_prefill_seconds", "histogram"),
    ("ingot_request_decode_seconds", "histogram"),
    ("ingot_prompt_tokens_total", "counter"),
    ("ingot_prompt_tokens_cached_total", "counter"),
    ("ingot_generation_tokens_total", "counter"),
    ("ingot_jobs", "gauge"),
    ("ingot_kv_cache_usage_ratio", "gauge"),
    ("ingot_kv_pages", "gauge"),
    ("ingot_prefix_cache_queries_total", "counter"),
    ("ingot_prefix_cache_hits_total", "counter"),
    ("ingot_preemptions_total", "counter"),
    ("ingot_batch_size", "histogram"),
    ("ingot_requests_rejected_total", "counter"),
    ("ingot_request_success_total", "counter"),
    ("ingot_request_errors_total", "counter"),
    ("ingot_adapters_resident", "gauge"),
    ("ingot_adapters_waiting", "gauge"),
    ("ingot_engine_restarts_total", "counter"),
    ("ingot_engine_steps_total", "counter"),
    ("ingot_process_resident_memory_bytes", "gauge"),
    ("ingot_spec_decode_num_drafts_total", "counter"),
    ("ingot_spec_decode_num_draft_tokens_total", "counter"),
    ("ingot_spec_decode_num_accepted_tokens_total", "counter"),
    ("ingot_build_info", "gauge"),
    ("ingot_data_disk_free_bytes", "gauge"),
    ("ingot_data_disk_size_bytes", "gauge"),
];

/// Suffixes of metric names: a unit, or the noun that is counted (requests, pages, adapters, rows).
const UNITS: &[&str] = &[
    "_seconds",
    "_bytes",
    "_ratio",
    "_total",
    "_info",
    "_pages",
    "_running",
    "_waiting",
    "_resident",
    "_size",
    "_jobs",
];

#[test]
fn every_series_counts_what_happened() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    // Without speculation, because the test counts steps.
    let options = Options::models(&[&model]).admin().flag("--speculate", "off");
    let adapters = options.data().join("adapters");
    std::fs::create_dir_all(&adapters).expect("made");
    peft(&adapters, "style", &model, 2);
    let server = options.start();
    server.admin().post("/admin/adapters", &json!({"name": "style"})).good();

    // Byte-level tokens with a few merges: at least 40 tokens, and a page holds 32.
    let prompt = "0123456789".repeat(4);
    let ask = |model: &str| {
        let answer = server.client.post("/v1/completions", &completion(model, &prompt, 10)).good();
        let count = |key: &str| answer["usage"][key].as_u64().expect("a count");
        let details = &answer["usage"]["prompt_tokens_details"];
        let cached = details["cached_tokens"].as_u64().expect("a count");
        (count("prompt_tokens"), count("completion_tokens"), cached)
    };
    let (length, completed, cached) = ask("tiny");
    assert_eq!((length, completed, cached), (40, 10, 0));
    assert_eq!(ask("tiny"), (40, 10, 32), "the second time a page is cached");
    assert_eq!(ask("style"), (40, 10, 0), "an adapter has pages of its own");
    // Rejected by the engine (prompt too long) and by the gateway (no such model, so no series).
    let long = completion("tiny", &"0".repeat(2000), 4);
    server.client.post("/v1/completions", &long).error(400);
    // Two choices, a stop by a bias on the end token, and a client that disconnects.
    let mut two = completion("tiny", &prompt, 5);
    two["n"] = 2.into();
    server.client.post("/v1/completions", &two).good();
    let ends = json!({"model": "tiny", "prompt": prompt, "max_tokens": 9, "temperature": 0,
                      "logit_bias": {"2": 100}});
    let ended = server.client.post("/v1/completions", &ends).good();
    assert_eq!(ended["choices"][0]["finish_reason"], "stop", "{ended}");
    let mut events =
        server.client.stream("/v1/completions", &streamed("tiny", &prompt, 400)).events();
    events.next().expect("an event").expect("it runs");
    drop(events);
    let metric = |name: &str, labels: &[(&str, &str)]| server.metric(name, labels);
    eventually(Duration::from_secs(3), "the abort is counted", || {
        metric("ingot_request_success_total", &[("finish_reason", "abort")]) == 1.0
            && metric("ingot_requests_running", &[]) == 0.0
    });

    let tiny = [("model", "tiny")];
    let style = [("model", "style")];
    let reason =
        |reason| metric("ingot_request_success_total", &[tiny[0], ("finish_reason", reason)]);
    assert_eq!((reason("length"), reason("stop")), (4.0, 1.0));
    assert_eq!(metric("ingot_request_success_total", &style), 1.0);
    assert_eq!(metric("ingot_request_errors_total", &[("kind", "context_length")]), 1.0);
    assert_eq!(metric("ingot_requests_rejected_total", &[("reason", "context_length")]), 1.0);
    // Five started requests of 40 tokens each; all but the first found a page in the prefix cache.
    assert_eq!(metric("ingot_prompt_tokens_total", &tiny), 200.0);
    assert_eq!(metric("ingot_prompt_tokens_cached_total", &tiny), 128.0);
    assert_eq!(metric("ingot_prompt_tokens_total", &style), 40.0);
    assert_eq!(metric("ingot_generation_tokens_total", &style), 10.0);
    let generated = metric("ingot_generation_tokens_total", &tiny);
    assert!(generated >= 30.0, "twice 10, twice 5, the end and what the client saw: {generated}");
    // Per engine, including requests to adapters.
    assert_eq!(metric("ingot_prefix_cache_queries_total", &tiny), 240.0);
    assert_eq!(metric("ingot_prefix_cache_hits_total", &tiny), 128.0);
    for (name, labels, count) in [
        ("ingot_request_queue_seconds", tiny, 5.0),
        ("ingot_time_to_first_token_seconds", style, 1.0),
        ("ingot_request_prefill_seconds", tiny, 4.0),
        ("ingot_request_decode_seconds", tiny, 4.0),
        ("ingot_e2e_request_latency_seconds", style, 1.0),
        ("ingot_inter_token_latency_seconds", style, 9.0),
    ] {
        let name = format!("{name}_count");
        assert_eq!(metric(&name, &labels), count, "{name} of {labels:?}");
    }
    // The rejected request is counted too.
    assert_eq!(metric("ingot_e2e_request_latency_seconds_count", &tiny), 6.0);
    let steps = metric("ingot_engine_steps_total", &tiny);
    assert!(steps >= 36.0, "three times 10, 5, the end, and the one that was left: {steps}");
    assert_eq!(metric("ingot_batch_size_count", &tiny), steps, "each step has a size");
    let rows = metric("ingot_batch_size_sum", &tiny);
    assert!(rows >= 112.0 + generated - 10.0, "rows are prompt tokens and decoded ones: {rows}");

    assert_eq!(metric("ingot_adapters_resident", &tiny), 1.0);
    let pages = |state| metric("ingot_kv_pages", &[tiny[0], ("state", state)]);
    assert_eq!(pages("used"), 0.0);
    assert!(pages("cached") >= 2.0 && pages("free") > 0.0);
    assert_eq!(metric("ingot_kv_cache_usage_ratio", &tiny), 0.0);
    assert_eq!(metric("ingot_engine_restarts_total", &tiny), 0.0);
    for process in ["gateway", "engine:tiny"] {
        let bytes = metric("ingot_process_resident_memory_bytes", &[("process", process)]);
        assert!((1e6..4e9).contains(&bytes), "{process}: {bytes}");
    }

    send(server.engine(), Signal::KILL);
    eventually(Duration::from_secs(5), "the restart is counted", || {
        metric("ingot_engine_restarts_total", &tiny) == 1.0
    });
    server.wait_ready();
    assert!(metric("ingot_engine_steps_total", &tiny) >= steps, "counters never fall");
    check_format(&server.client.get("/metrics").body);
}

/// Checks that every family has help and type, that names end with units, and that there are no
/// families other than those of the list.
fn check_format(text: &str) {
    let mut kinds = BTreeMap::new();
    let mut helped = BTreeSet::new();
    for line in text.lines().filter(|line| line.starts_with('#')) {
        let mut words = line.splitn(4, ' ').skip(1);
        let (what, name) = (words.next().expect("a word"), words.next().expect("a name"));
        let rest = words.next().unwrap_or_default();
        match what {
            "HELP" => assert!(rest.len() > 5 && helped.insert(name), "help of {name}: `{rest}`"),
            "TYPE" => assert!(kinds.insert(name, rest).is_none(), "two types of {name}"),
            other => panic!("{other} is neither HELP nor TYPE"),
        }
    }
    assert_eq!(kinds.keys().copied().collect::<BTreeSet<_>>(), helped, "each has help and type");
    let expected: BTreeMap<&str, &str> = SERIES.iter().copied().collect();
    assert_eq!(kinds, expected);
    for (name, kind) in kinds {
        assert!(UNITS.iter().any(|unit| name.ends_with(unit)), "{name} names its unit");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
        let of_family = |sample: &Sample| {
            let rest = sample.name.strip_prefix(name);
            rest.is_some_and(|rest| ["", "_bucket", "_sum", "_count"].contains(&rest))
        };
        assert!(samples(text).any(|sample| of_family(&sample)), "{name} has a sample");
    }
}

/// The mock runner's completion, unless it ends before `count` tokens.
fn greedy_text(prompt: &str, count: usize) -> Option<String> {
    const BOS: u32 = 256;
    let mut tokens: Vec<u32> = std::iter::once(BOS).chain(prompt.bytes().map(u32::from)).collect();
    let mut text = String::new();
    for _ in 0..count {
        let next = Mock::next_greedy(&tokens, None);
        text.push(char::from(u8::try_from(next).ok()?));
        tokens.push(next);
    }
    Some(text)
}

#[test]
fn a_stream_is_this_and_nothing_else() {
    let server = Options::mock(100).start();
    // The mock's greedy text is computed directly.
    let (prompt, expected) = (0..)
        .map(|number| format!("Say it {number}"))
        .find_map(|prompt| greedy_text(&prompt, 6).map(|text| (prompt, text)))
        .expect("some text does not end by itself");
    let mut body = streamed("mock", &prompt, 6);
    body["stream_options"] = json!({"include_usage": true});
    let stream = server.client.stream("/v1/completions", &body);
    let header = |name: &str| {
        stream.headers.iter().find(|(header, _)| header == name).map(|(_, value)| value.clone())
    };
    assert_eq!(header("content-type").as_deref(), Some("text/event-stream; charset=utf-8"));
    assert_eq!(header("cache-control").as_deref(), Some("no-cache"));
    assert!(header("x-request-id").is_some_and(|id| id.starts_with("req-")));
    let events: Vec<String> = stream.events().map(|event| event.expect("it runs")).collect();
    let (last, chunks) = events.split_last().expect("events");
    assert_eq!(last, "[DONE]");
    let chunks: Vec<Value> =
        chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("JSON")).collect();
    let first = &chunks[0];
    assert!(first["id"].as_str().is_some_and(|id| id.starts_with("cmpl-")), "{first}");
    let head = |chunk: &Value| ["id", "object", "created", "model"].map(|key| chunk[key].clone());
    assert!(chunks.iter().all(|chunk| head(chunk) == head(first)), "one head for all");
    assert_eq!((&first["object"], &first["model"]), (&json!("text_completion"), &json!("mock")));

    let mut texts = String::new();
    let mut reasons = Vec::new();
    let (usage, with_text) = chunks.split_last().expect("chunks");
    for chunk in with_text {
        assert_eq!(chunk["usage"], Value::Null, "{chunk}");
        assert_eq!(chunk["choices"].as_array().expect("a list").len(), 1);
        let choice = &chunk["choices"][0];
        assert_eq!(choice["index"], 0);
        texts.push_str(choice["text"].as_str().expect("text"));
        reasons.extend(choice["finish_reason"].as_str());
    }
    assert_eq!((texts.as_str(), reasons.as_slice()), (expected.as_str(), &["length"][..]));
    assert_eq!(usage["choices"], json!([]));
    let length = prompt.len() + 1;
    let counts = json!({"prompt_tokens": length, "completion_tokens": 6,
                        "total_tokens": length + 6,
                        "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(usage["usage"], counts);

    // The same as a chat: the role is sent first, and once.
    let chat = json!({"model": "mock", "messages": [{"role": "user", "content": "Hi"}],
                      "max_tokens": 6, "temperature": 0, "ignore_eos": true, "stream": true});
    let events = server.client.stream("/v1/chat/completions", &chat).events();
    let events: Vec<String> = events.map(|event| event.expect("it runs")).collect();
    let (last, chunks) = events.split_last().expect("events");
    assert_eq!(last, "[DONE]");
    let chunks: Vec<Value> =
        chunks.iter().map(|chunk| serde_json::from_str(chunk).expect("JSON")).collect();
    let opening = json!({"role": "assistant", "content": ""});
    assert_eq!(chunks[0]["choices"][0]["delta"], opening);
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    let roles = chunks.iter().filter(|chunk| chunk["choices"][0]["delta"]["role"].is_string());
    assert_eq!(roles.count(), 1);
    let (end, _) = chunks.split_last().expect("chunks");
    assert_eq!(end["choices"][0]["delta"], json!({}));
    assert_eq!(end["choices"][0]["finish_reason"], "length");
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()), "nobody asked for usage");
}
