//! Several models at once, embeddings, and API keys with limits.

use crate::http::Client;
use crate::models_made::{llama, store};
use crate::support::{ADMIN, Options, Server, completion, eventually, exists, streamed};
use ingot::gguf::fixture::tiny_bert;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

fn load(server: &Server, name: &str) -> Value {
    server.admin().post("/admin/models", &json!({"model": name})).good()
}

/// Names of loaded models.
fn loaded(client: &Client) -> Vec<String> {
    let list = client.get("/v1/models").good();
    let cards = list["data"].as_array().expect("a list").iter();
    cards.map(|card| card["id"].as_str().expect("text").to_owned()).collect()
}

/// A server that knows `names` in its data folder and has the first one loaded.
fn known(folder: &Path, names: &[&str]) -> (Options, Vec<std::path::PathBuf>) {
    let paths: Vec<_> = (1..).zip(names).map(|(seed, name)| llama(folder, name, seed)).collect();
    let options = Options::models(&[&paths[0]]).admin();
    for (name, path) in names.iter().zip(&paths) {
        store(&options.data(), name, path);
    }
    (options, paths)
}

#[test]
fn two_models_answer_and_one_can_leave() {
    let folder = tempfile::tempdir().expect("a folder");
    let (options, _) = known(folder.path(), &["one", "two"]);
    let server = options.start();
    let first = server.engine();
    let one = server.complete("one", "Once upon a time", 12);
    server.client.post("/v1/completions", &completion("two", "x", 1)).error(404);
    let shown = load(&server, "two");
    assert_eq!(shown["model"]["id"], "two");
    assert!(shown["memory"]["overhead"].as_u64().is_some_and(|bytes| bytes > 0), "{shown}");
    assert_eq!(server.engines().len(), 2);
    let two = server.complete("two", "Once upon a time", 12);
    assert_ne!(one, two);
    assert_eq!(loaded(&server.client), ["one", "two"]);
    server.admin().post("/admin/models", &json!({"model": "two"})).error(409);
    server.admin().post("/admin/models", &json!({"model": "three"})).error(404);
    server.admin().post("/admin/models", &json!({"model": "two", "nonsense": 1})).error(400);
    let again = json!({"model": "two", "name": "two-again"});
    server.admin().post("/admin/models", &again).good();
    assert_eq!(server.complete("two-again", "Once upon a time", 12), two);

    // Requests to both models, and a stream of the model that is unloaded: the stream finishes
    // first.
    let mut events =
        server.client.stream("/v1/completions", &streamed("two", "On and on", 400)).events();
    events.next().expect("an event").expect("it runs");
    let leaving = {
        let admin = server.admin();
        std::thread::spawn(move || admin.delete("/admin/models/two"))
    };
    eventually(Duration::from_secs(2), "new requests are refused", || {
        server.client.post("/v1/completions", &completion("two", "x", 1)).status == 404
    });
    assert_eq!(server.complete("one", "Once upon a time", 12), one);
    let transcript = events.transcript();
    assert!(transcript.done && transcript.error.is_none(), "{transcript:?}");
    leaving.join().expect("no panic").good();
    server.admin().delete("/admin/models/two").error(404);
    assert_eq!(server.engines().len(), 2);
    assert_eq!(server.complete("two-again", "Once upon a time", 12), two);
    assert!(exists(first));

    // The name can be used again.
    load(&server, "two");
    assert_eq!(server.complete("two", "Once upon a time", 12), two);
    let status = server.admin().get("/admin/models").good();
    let states: Vec<_> = status["data"].as_array().expect("a list").iter().collect();
    assert!(states.len() == 3 && states.iter().all(|model| model["state"] == "ready"), "{status}");
    assert_eq!(status["stored"].as_array().expect("a list").len(), 2);
}

#[test]
fn the_least_recently_used_model_leaves_first() {
    let folder = tempfile::tempdir().expect("a folder");
    let (options, _) = known(folder.path(), &["one", "two", "three", "four"]);
    let server = options.flag("--max-loaded-models", 2).start();
    load(&server, "two");
    server.complete("one", "x", 1);
    load(&server, "three");
    assert_eq!(loaded(&server.client), ["one", "three"], "two was used before one");
    server.client.post("/v1/completions", &completion("two", "x", 1)).error(404);
    server.complete("one", "x", 1);
    load(&server, "four");
    assert_eq!(loaded(&server.client), ["four", "one"]);
    assert_eq!(server.engines().len(), 2);

    // Busy models are not unloaded: the new model is rejected.
    let streams: Vec<_> = ["one", "four"]
        .map(|name| server.client.stream("/v1/completions", &streamed(name, "On and on", 450)))
        .into_iter()
        .map(|stream| {
            let mut events = stream.events();
            events.next().expect("an event").expect("it runs");
            events
        })
        .collect();
    let answer = server.admin().post("/admin/models", &json!({"model": "two"}));
    // A fast machine may have finished one of the streams by now.
    if answer.status != 201 {
        answer.error(422);
        assert_eq!(answer.json()["error"]["code"], "too_many_models");
    }
    streams.into_iter().for_each(|events| assert!(events.transcript().done));
}

#[test]
fn a_memory_budget_unloads_the_least_recently_used() {
    let folder = tempfile::tempdir().expect("a folder");
    let (options, _) = known(folder.path(), &["one", "two", "three"]);
    let server = options.start();
    let status = server.admin().get("/admin/models").good();
    let each = status["data"][0]["memory_total"].as_u64().expect("a number");
    drop(server);
    let (options, _) = known(folder.path(), &["one", "two", "three"]);
    let server = options.flag("--memory-budget", each * 5 / 2).start();
    load(&server, "two");
    server.complete("one", "x", 1);
    load(&server, "three");
    assert_eq!(loaded(&server.client), ["one", "three"]);
    assert_eq!(server.engines().len(), 2);
}

#[test]
fn admin_routes_exist_only_with_the_key() {
    let server = Options::mock(0).start();
    for client in [server.client.clone(), server.client.with_key("sk-any")] {
        client.get("/admin/models").error(404);
        client.post("/admin/models", &json!({"model": "x"})).error(404);
        client.delete("/admin/models/mock").error(404);
        client.get("/admin/adapters").error(404);
        client.post("/admin/adapters", &json!({"name": "x"})).error(404);
        client.delete("/admin/adapters/x").error(404);
    }
    assert!(!server.complete("mock", "x", 1).is_empty());
    drop(server);

    let server = Options::mock(0).admin().flag("--api-key", "sk-user").start();
    for client in ["sk-user", "sk-admin-of-the-test", "wrong"]
        .map(|key| server.client.with_key(key))
        .into_iter()
        .chain([server.client.clone()])
    {
        client.get("/admin/models").error(401);
        client.post("/admin/models", &json!({"model": "x"})).error(401);
        client.delete("/admin/models/mock").error(401);
        client.get("/admin/adapters").error(401);
    }
    let admin = server.client.with_key(ADMIN);
    admin.get("/admin/models").good();
    admin.get("/admin/adapters").good();
    admin.post("/v1/completions", &completion("mock", "x", 1)).good();
}

#[test]
fn keys_open_the_api_and_nothing_else_does() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "sk-three\n\nsk-four\n").expect("written");
    let server = Options::mock(0)
        .flag("--api-key", "sk-one")
        .flag("--api-key", "sk-two")
        .flag("--api-key-file", file.path().display())
        .start();
    let body = completion("mock", "x", 1);
    for key in ["sk-one", "sk-two", "sk-three", "sk-four"] {
        server.client.with_key(key).post("/v1/completions", &body).good();
    }
    for client in [server.client.clone(), server.client.with_key("sk-on")] {
        let answer = client.post("/v1/completions", &body);
        answer.error(401);
        assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
        client.get("/v1/models").error(401);
        client.post("/tokenize", &json!({"model": "mock", "content": "x"})).error(401);
    }
    for open in ["/health", "/ready", "/version", "/metrics", "/openapi.json"] {
        assert_eq!(server.client.get(open).status, 200, "{open}");
    }
    let log = server.log();
    assert!(!log.contains("sk-one") && !log.contains("sk-three"), "keys are never logged");
}

#[test]
fn keys_have_their_own_rate_and_concurrency() {
    let server = Options::mock(2000)
        .flag("--api-key", "sk-one")
        .flag("--api-key", "sk-two")
        .flag("--rate-limit", 20)
        .flag("--max-concurrent-per-key", 2)
        .start();
    let (one, two) = (server.client.with_key("sk-one"), server.client.with_key("sk-two"));
    let body = completion("mock", "x", 1);
    let running: Vec<_> = (0..2)
        .map(|i| {
            let body = streamed("mock", &format!("{i}"), 4000);
            let mut events = one.stream("/v1/completions", &body).events();
            events.next().expect("an event").expect("it runs");
            events
        })
        .collect();
    let answer = one.post("/v1/completions", &body);
    assert!(answer.error(429).contains('2'), "{}", answer.body);
    assert_eq!(answer.json()["error"]["code"], "concurrency_limit_exceeded");
    assert!(answer.header("retry-after").is_some());
    two.post("/v1/completions", &body).good();
    drop(running);
    eventually(Duration::from_secs(2), "there is room again", || {
        one.post("/v1/completions", &body).status == 200
    });

    let answers: Vec<_> = (0..40).map(|_| two.post("/v1/completions", &body)).collect();
    let (good, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(|a| a.status == 200);
    assert!((15..=25).contains(&good.len()), "a minute's worth passes: {}", good.len());
    let answer = refused.last().expect("the rest is refused");
    answer.error(429);
    assert_eq!(answer.json()["error"]["code"], "rate_limit_exceeded");
    let wait: u32 = answer.header("retry-after").expect("Retry-After").parse().expect("seconds");
    assert!((1..=4).contains(&wait), "one request every three seconds: {wait}");
}

// -------------------------------------------------------------------------------------------------
// Embeddings

fn embed(server: &Server, input: &Value) -> Vec<Vec<f64>> {
    let body = json!({"model": "bert", "input": input});
    let answer = server.client.post("/v1/embeddings", &body).good();
    let items = answer["data"].as_array().expect("a list");
    let vectors = items.iter().enumerate().map(|(index, item)| {
        assert_eq!(item["index"], index);
        let numbers = item["embedding"].as_array().expect("a list");
        numbers.iter().map(|number| number.as_f64().expect("a number")).collect()
    });
    vectors.collect()
}

#[test]
fn a_bert_embeds_and_does_not_chat() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bert.gguf");
    tiny_bert(&path).expect("written");
    let server = Options::models(&[&path]).start();
    let texts = ["the cat sat on the mat", "hello world", "a dog", "hello world"];
    let batch = embed(&server, &json!(texts));
    assert_eq!(batch.len(), 4);
    for (text, vector) in texts.iter().zip(&batch) {
        assert_eq!(vector.len(), 32);
        let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
        assert!((norm - 1.0).abs() < 1e-4, "{text}: {norm}");
        let alone = embed(&server, &json!(text));
        assert_eq!(&alone[0], vector, "{text}: alone, in a batch and again");
    }
    let cosine = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert_eq!(batch[1], batch[3]);
    for (a, b) in [(0, 1), (0, 2), (1, 2)] {
        assert!(cosine(&batch[a], &batch[b]) < 0.999, "{a} and {b} are different texts");
    }
    let reversed: Vec<&str> = texts.iter().rev().copied().collect();
    let mut backwards = embed(&server, &json!(reversed));
    backwards.reverse();
    assert_eq!(backwards, batch, "vectors come in the order of their texts");

    let messages = json!([{"role": "user", "content": "hello"}]);
    let chat = json!({"model": "bert", "messages": messages});
    server.client.post("/v1/chat/completions", &chat).error(400);
    server.client.post("/v1/completions", &completion("bert", "hello", 1)).error(400);
    let embedding = |extra: Value| {
        let mut body = json!({"model": "bert", "input": "hello"});
        body.as_object_mut().expect("an object").extend(extra.as_object().expect("one").clone());
        server.client.post("/v1/embeddings", &body)
    };
    embedding(json!({"dimensions": 16})).error(400);
    embedding(json!({"input": "hello ".repeat(200)})).error(400);
    embedding(json!({"dimensions": 32})).good();
    // In parallel: each request gets its own embeddings.
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (server, batch) = (&server, &batch);
            scope.spawn(move || {
                for _ in 0..10 {
                    assert_eq!(embed(server, &json!(texts[worker]))[0], batch[worker]);
                }
            });
        }
    });
}
