//! Models that cannot be loaded: broken files, files that make llama.cpp abort, too large ones.
//! Also uploads to a full disk.

use crate::models_made::{Changes, copy_with, llama, peft, store};
use crate::support::{Options, eventually, streamed};
use ingot::gguf::{Gguf, Value};
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// Writes a broken copy of a model.
type Break = fn(from: &Path, to: &Path);

/// Names of broken models, how each is broken, and a word that the error message must contain.
const BROKEN: &[(&str, Break, &str)] = &[
    ("truncated-header", |from, to| truncate(from, to, 3000), ""),
    ("truncated-data", |from, to| truncate(from, to, u64::MAX), ""),
    ("no-gguf", |_, to| std::fs::write(to, "hello".repeat(1000)).expect("written"), ""),
    ("empty", |_, to| std::fs::write(to, "").expect("written"), ""),
    (
        "missing-tensor",
        |from, to| {
            let without = vec!["blk.1.ffn_up.weight"];
            copy_with(from, to, &Changes { without, ..Changes::default() });
        },
        "blk.1.ffn_up.weight",
    ),
    (
        "no-embedding",
        |from, to| {
            let without = vec!["token_embd.weight"];
            copy_with(from, to, &Changes { without, ..Changes::default() });
        },
        "token_embd.weight",
    ),
    // llama.cpp does not return from this error: it aborts the process.
    ("duplicate-token", duplicate_token, "last words"),
    (
        "bad-vocabulary",
        |from, to| set(from, to, "tokenizer.ggml.model", "no-such-tokenizer"),
        "no-such-tokenizer",
    ),
    (
        "no-merges",
        |from, to| {
            let remove = vec!["tokenizer.ggml.merges"];
            copy_with(from, to, &Changes { remove, ..Changes::default() });
        },
        "merges",
    ),
    ("absurd-layers", |from, to| set(from, to, "llama.block_count", 1_000_000u32), ""),
    ("absurd-width", |from, to| set(from, to, "llama.embedding_length", 2_000_000_000u32), ""),
    ("absurd-feed-forward", |from, to| set(from, to, "llama.feed_forward_length", 1 << 30), ""),
    ("no-heads", |from, to| set(from, to, "llama.attention.head_count", 0u32), ""),
    ("odd-heads", |from, to| set(from, to, "llama.attention.head_count", 7u32), ""),
    ("odd-kv-heads", |from, to| set(from, to, "llama.attention.head_count_kv", 3u32), ""),
    ("absurd-rope", |from, to| set(from, to, "llama.rope.dimension_count", 1_000_000u32), ""),
    ("unknown-architecture", |from, to| set(from, to, "general.architecture", "moonshine"), ""),
];

fn set(from: &Path, to: &Path, key: &str, value: impl Into<Value>) {
    copy_with(from, to, &Changes { set: vec![(key, value.into())], ..Changes::default() });
}

/// Truncates the file; `u64::MAX` removes the last thousand bytes.
fn truncate(from: &Path, to: &Path, length: u64) {
    std::fs::copy(from, to).expect("copied");
    let whole = std::fs::metadata(to).expect("exists").len();
    let file = std::fs::OpenOptions::new().write(true).open(to).expect("opens");
    file.set_len(length.min(whole - 1000)).expect("cut");
}

fn duplicate_token(from: &Path, to: &Path) {
    let gguf = Gguf::open_header(from).expect("readable");
    let tokens = gguf.strings("tokenizer.ggml.tokens").expect("strings").expect("there");
    let mut tokens = tokens.to_vec();
    tokens[100] = tokens[101].clone();
    set(from, to, "tokenizer.ggml.tokens", tokens);
}

#[test]
fn models_that_do_not_load_are_refused_while_others_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = llama(folder.path(), "good", 1);
    let options = Options::models(&[&good]).admin();
    for (name, damage, _) in BROKEN {
        let path = folder.path().join(format!("{name}.gguf"));
        damage(&good, &path);
        store(&options.data(), name, &path);
    }
    let server = options.start();
    let (gateway, engine) = (server.pid, server.engine());
    let expected = server.complete("good", "Once", 8);
    for (name, _, word) in BROKEN {
        let answer = server.admin().post("/admin/models", &json!({"model": name}));
        assert_eq!(answer.status, 422, "{name}: {}", answer.body);
        let reason = answer.error(422);
        assert!(reason.contains(word), "{name}: `{word}` is in the reason: {reason}");
        assert!(!reason.contains('\u{1b}') && reason.len() > 20, "{name}: {reason}");
        assert_eq!(server.complete("good", "Once", 8), expected, "after {name}");
        let answer = server.client.post("/v1/completions", &streamed(name, "x", 1));
        answer.error(404);
    }
    assert_eq!((server.pid, server.engine()), (gateway, engine), "nothing died but what loaded");
    assert_eq!(server.metric("ingot_engine_restarts_total", &[]), 0.0);
    assert_eq!(server.client.get("/ready").status, 200);
}

#[test]
fn a_running_stream_does_not_notice_a_model_that_aborts() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = llama(folder.path(), "good", 1);
    let bad = folder.path().join("bad.gguf");
    duplicate_token(&good, &bad);
    let options = Options::models(&[&good]).admin();
    store(&options.data(), "bad", &bad);
    let server = options.start();
    let mut events =
        server.client.stream("/v1/completions", &streamed("good", "On and on", 450)).events();
    events.next().expect("an event").expect("it runs");
    let reason = server.admin().post("/admin/models", &json!({"model": "bad"})).error(422);
    assert!(reason.contains("could not be loaded"), "{reason}");
    let transcript = events.transcript();
    assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
    assert_eq!(transcript.chunks.last().expect("chunks")["choices"][0]["finish_reason"], "length");
}

#[test]
fn serve_with_a_broken_model_ends_with_a_sentence() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = llama(folder.path(), "good", 1);
    for name in ["truncated-header", "missing-tensor", "duplicate-token", "no-gguf"] {
        let path = folder.path().join(format!("{name}.gguf"));
        let (_, damage, _) = BROKEN.iter().find(|(known, ..)| known == &name).expect("known");
        damage(&good, &path);
        let (status, log) = Options::models(&[&path]).run();
        assert_eq!(status.code(), Some(1), "{name}: {log}");
        let last = log.lines().rfind(|line| line.starts_with("ingot: ")).unwrap_or_default();
        assert!(last.contains(name) && last.len() > 40, "{name}: a sentence, not `{last}`\n{log}");
        assert!(!log.contains("panicked"), "{name}: {log}");
    }
    let missing = folder.path().join("nowhere.gguf");
    let (status, log) = Options::models(&[&missing]).run();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("nowhere.gguf"), "{log}");
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "large", 1);
    let (status, log) = Options::models(&[&model]).flag("--memory-budget", "50MiB").run();
    assert_eq!(status.code(), Some(1), "{log}");
    for word in ["50.0 MiB is available", "for weights", "KV cache", "--memory-budget"] {
        assert!(log.contains(word), "`{word}` is in: {log}");
    }

    // The same for a second model, for which the first one leaves no memory. The first model is
    // busy, so it is not unloaded.
    let options = Options::models(&[&model]).admin().flag("--memory-budget", "200MiB");
    store(&options.data(), "second", &model);
    let server = options.start();
    // A single stream ends within milliseconds; sixteen streams share the steps and take longer.
    let all: Vec<_> = (0..16)
        .map(|_| server.client.stream("/v1/completions", &streamed("large", "On and on", 450)))
        .collect();
    let answer = server.admin().post("/admin/models", &json!({"model": "second"}));
    let reason = answer.error(422);
    assert_eq!(answer.json()["error"]["code"], "insufficient_memory");
    assert!(reason.contains("MiB of memory"), "{reason}");
    for stream in all {
        assert!(stream.events().transcript().done);
    }
}

#[test]
fn an_upload_that_finds_no_room_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    let adapter = peft(folder.path(), "style", &model, 2);
    // No file may grow beyond 512 blocks of 512 bytes: further writes fail, as on a full disk.
    let server = Options::mock(0).admin().shell("trap '' XFSZ; ulimit -f 512").start();
    let config = std::fs::read(adapter.join("adapter_config.json")).expect("there");
    let weights = vec![0u8; 1 << 20];
    let files: [(&str, &[u8]); 2] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights)];
    let answer = server.admin().upload("/admin/adapters", &[("name", "style")], &files);
    assert!(answer.status >= 500, "{}: {}", answer.status, answer.body);
    answer.error(answer.status);
    assert!(!server.complete("mock", "still here", 4).is_empty());
    server.client.post("/v1/completions", &streamed("style", "x", 1)).error(404);
    let left = || {
        let work = server.data().join("run").join(server.pid.to_string());
        std::fs::read_dir(work).map_or(0, |entries| entries.count())
    };
    eventually(Duration::from_secs(1), "the part that was written is removed", || left() == 0);
}
