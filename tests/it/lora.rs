//! LoRA adapters: their results, loading, and replacement while requests run.

use crate::http::Client;
use crate::models_made::{Changes, copy_with, facts, llama, peft};
use crate::support::{Options, Server, completion, eventually, send, streamed, text_of};
use ingot::gguf::{Gguf, ModelFacts, peft_to_gguf};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

const PROMPT: &str =
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate";

fn load(server: &Server, name: &str, source: &str) -> Value {
    let body = json!({"name": name, "source": source});
    server.admin().post("/admin/adapters", &body).good()
}

#[test]
fn every_way_in_leads_to_the_same_adapter() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    let options = Options::models(&[&model]).admin();
    let adapters = options.data().join("adapters");
    std::fs::create_dir_all(&adapters).expect("made");
    let source = peft(&adapters, "as-peft", &model, 5);
    let base = Gguf::open_header(&model).expect("readable");
    peft_to_gguf(&source, &facts(&model), &base, &adapters.join("as-gguf.gguf")).expect("written");
    let server = options.start();

    let plain = server.complete("tiny", PROMPT, 24);
    load(&server, "from-folder", "as-peft");
    load(&server, "from-gguf", "as-gguf.gguf");
    let read = |file: &str| std::fs::read(source.join(file)).expect("readable");
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let parts: [(&str, &[u8]); 3] = [
        ("adapter_config.json", &config),
        ("adapter_model.safetensors", &weights),
        ("README.md", b"not needed"),
    ];
    let texts = [("name", "from-upload"), ("base", "tiny")];
    let shown = server.admin().upload("/admin/adapters", &texts, &parts).good();
    assert_eq!(shown["info"]["rank"], 4);
    let gguf = std::fs::read(adapters.join("as-gguf.gguf")).expect("readable");
    let texts = [("name", "from-gguf-upload")];
    server.admin().upload("/admin/adapters", &texts, &[("x.gguf", &gguf)]).good();

    let adapted = server.complete("from-folder", PROMPT, 24);
    assert_ne!(adapted, plain, "the adapter changes the output");
    for name in ["from-gguf", "from-upload", "from-gguf-upload"] {
        assert_eq!(server.complete(name, PROMPT, 24), adapted, "{name}");
    }
    assert_eq!(server.complete("tiny", PROMPT, 24), plain, "the base is as it was");
    let chat = json!({"model": "from-upload", "max_tokens": 4,
                      "messages": [{"role": "user", "content": "Hi"}]});
    server.client.post("/v1/chat/completions", &chat).good();

    // With scale 0 the output is the base model's; with twice the scale it differs.
    let body = json!({"name": "off", "source": "as-peft", "scale": 0.0});
    server.admin().post("/admin/adapters", &body).good();
    assert_eq!(server.complete("off", PROMPT, 24), plain);
    let listed = server.client.get("/v1/models").good();
    let card = listed["data"].as_array().expect("a list").iter().find(|c| c["id"] == "off");
    assert_eq!(card.expect("it is listed")["parent"], "tiny");

    // An uploaded adapter is stored: its name can be used as a source.
    load(&server, "again", "from-upload");
    assert_eq!(server.complete("again", PROMPT, 24), adapted);
    server.admin().delete("/admin/adapters/again").good();
    server.client.post("/v1/completions", &completion("again", "x", 1)).error(404);
    server.admin().delete("/admin/adapters/again").error(404);
    eventually(Duration::from_secs(2), "it has left the engine", || {
        server.metric("ingot_adapters_resident", &[]) == 5.0
    });
}

#[test]
fn adapters_outlive_their_engine_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    let options = Options::models(&[&model]).admin();
    let adapters = options.data().join("adapters");
    std::fs::create_dir_all(&adapters).expect("made");
    let source = peft(&adapters, "style", &model, 5);
    let server = options.start();
    load(&server, "style", "style");
    let (plain, adapted) =
        (server.complete("tiny", PROMPT, 24), server.complete("style", PROMPT, 24));
    assert_ne!(adapted, plain);
    // The server loaded its own copy of the adapter.
    std::fs::remove_dir_all(source).expect("removed");
    let engine = server.engine();
    let stream = server.client.stream("/v1/completions", &streamed("style", PROMPT, 400)).events();
    send(engine, Signal::KILL);
    let transcript = stream.transcript();
    assert!(transcript.error.is_some() && !transcript.done, "{transcript:?}");
    eventually(Duration::from_secs(10), "the engine is restarted", || {
        !server.engines().is_empty() && server.client.get("/ready").status == 200
    });
    assert_ne!(server.engine(), engine);
    assert_eq!(server.complete("style", PROMPT, 24), adapted);
    assert_eq!(server.complete("tiny", PROMPT, 24), plain);
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    let options = Options::models(&[&model]).admin();
    let adapters = options.data().join("adapters");
    std::fs::create_dir_all(&adapters).expect("made");
    let broken = peft(&adapters, "broken", &model, 5);
    std::fs::write(broken.join("adapter_model.safetensors"), "nonsense").expect("written");
    std::fs::create_dir(adapters.join("empty")).expect("made");
    std::os::unix::fs::symlink(folder.path(), adapters.join("outside")).expect("linked");
    std::fs::copy(&model, adapters.join("a-model.gguf")).expect("copied");
    let server = options.start();
    let ask = |body: Value| server.admin().post("/admin/adapters", &body);
    for source in ["broken", "empty", "a-model.gguf"] {
        ask(json!({"name": "x", "source": source})).error(422);
    }
    for source in ["nowhere", "outside"] {
        ask(json!({"name": "x", "source": source})).error(404);
    }
    for source in ["../models", "/etc/passwd", "a/b"] {
        ask(json!({"name": "x", "source": source})).error(400);
    }
    ask(json!({"name": "tiny", "source": "broken"})).error(409);
    ask(json!({"name": "x", "source": "broken", "base": "no-such"})).error(404);
    ask(json!({"source": "broken"})).error(400);
    let form = server.admin().upload("/admin/adapters", &[("name", "x")], &[("a.gguf", b"GGUF")]);
    form.error(422);
    server.client.post("/v1/completions", &completion("x", "x", 1)).error(404);
    assert!(!server.complete("tiny", "x", 4).is_empty());
    assert_eq!(server.metric("ingot_engine_restarts_total", &[]), 0.0);
}

// -------------------------------------------------------------------------------------------------
// Merged weights as the oracle

/// The row order that turns Hugging Face's layout into a GGUF's, as `permute` in llama.cpp's
/// `conversion/llama.py`: `reshape(heads, 2, rows / heads / 2).swapaxes(1, 2)`.
fn permute(rows: usize, heads: usize) -> Vec<usize> {
    let half = rows / heads / 2;
    let mut order = Vec::with_capacity(rows);
    for head in 0..heads {
        for i in 0..half {
            for side in 0..2 {
                order.push((head * 2 + side) * half + i);
            }
        }
    }
    order
}

/// `scale * B A` in Hugging Face's layout, row-major `[out, in]`.
fn delta(file: &safetensors::SafeTensors<'_>, module: &str, scale: f32) -> (usize, Vec<f32>) {
    let read = |half: &str| {
        let tensor = file.tensor(&format!("{module}.{half}.weight")).expect("there");
        let (chunks, _) = tensor.data().as_chunks::<4>();
        let values: Vec<f32> = chunks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        (tensor.shape().to_vec(), values)
    };
    let ((a_shape, a), (b_shape, b)) = (read("lora_A"), read("lora_B"));
    let (rank, input, output) = (a_shape[0], a_shape[1], b_shape[0]);
    let mut out = vec![0f32; output * input];
    for row in 0..output {
        for r in 0..rank {
            for column in 0..input {
                out[row * input + column] += scale * b[row * rank + r] * a[r * input + column];
            }
        }
    }
    (output, out)
}

/// Merges a PEFT folder into a model, as PEFT and then llama.cpp's converter would. `permuted`:
/// reorders rows of q and k to the GGUF's order, which is correct.
fn merge(model: &Path, peft: &Path, facts: &ModelFacts, to: &Path, permuted: bool) {
    let bytes = std::fs::read(peft.join("adapter_model.safetensors")).expect("readable");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let config = std::fs::read_to_string(peft.join("adapter_config.json")).expect("readable");
    let config: Value = serde_json::from_str(&config).expect("JSON");
    let number = |key: &str| config[key].as_f64().expect("a number") as f32;
    let scale = number("lora_alpha") / number("r");
    let mut add = Vec::new();
    for layer in 0..facts.n_layer as usize {
        for (theirs, ours, heads) in [
            ("q", "attn_q", Some(facts.n_head as usize)),
            ("k", "attn_k", Some(facts.n_head_kv[layer] as usize)),
            ("v", "attn_v", None),
            ("o", "attn_output", None),
        ] {
            let module = format!("base_model.model.model.layers.{layer}.self_attn.{theirs}_proj");
            let (rows, change) = delta(&file, &module, scale);
            let width = change.len() / rows;
            let order = match heads {
                Some(heads) if permuted => permute(rows, heads),
                _ => (0..rows).collect(),
            };
            let change = order.iter().flat_map(|&row| &change[row * width..][..width]).copied();
            add.push((format!("blk.{layer}.{ours}.weight"), change.collect()));
        }
    }
    copy_with(model, to, &Changes { add, ..Changes::default() });
}

/// Log-probabilities of every prompt token, and the greedy text.
fn scores(server: &Server, model: &str) -> (Vec<f64>, String) {
    let mut body = completion(model, PROMPT, 24);
    body["echo"] = true.into();
    body["logprobs"] = 0.into();
    let answer = server.client.post("/v1/completions", &body).good();
    let logprobs = answer["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("a list");
    (logprobs.iter().filter_map(Value::as_f64).collect(), text_of(&answer))
}

fn farthest(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn an_adapter_computes_what_the_merged_model_does() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    let (merged, wrong) = (folder.path().join("merged.gguf"), folder.path().join("wrong.gguf"));
    let options = Options::models(&[&model, &merged, &wrong]).admin();
    let adapters = options.data().join("adapters");
    std::fs::create_dir_all(&adapters).expect("made");
    let adapter = peft(&adapters, "style", &model, 5);
    merge(&model, &adapter, &facts(&model), &merged, true);
    merge(&model, &adapter, &facts(&model), &wrong, false);
    let server = options.start();
    let body = json!({"name": "style", "base": "tiny"});
    server.admin().post("/admin/adapters", &body).good();

    let (adapted, text) = scores(&server, "style");
    assert!(adapted.len() > 60, "every prompt token but the first has a score: {}", adapted.len());
    let (oracle, oracle_text) = scores(&server, "merged");
    let far = farthest(&adapted[..adapted.len() - 24], &oracle[..oracle.len() - 24]);
    assert!(far < 0.02, "within the f16 of the cache: {far}");
    assert_eq!(text, oracle_text, "greedy text is the same");
    // Checks that the test can fail: without the reordering of q and k, or without the adapter, the
    // scores are far off.
    for other in ["wrong", "tiny"] {
        let (other_scores, _) = scores(&server, other);
        let far = farthest(&adapted[..60], &other_scores[..60]);
        assert!(far > 0.2, "{other} differs: {far}");
    }
}

// -------------------------------------------------------------------------------------------------
// Under load

/// Prompts whose greedy completions under every name do not depend on rounding: batches of other
/// shapes must give the same text.
fn sure_prompts(server: &Server, names: &[&str], tokens: u32, wanted: usize) -> Vec<String> {
    let sure = |prompt: &String| {
        names.iter().all(|name| {
            let mut body = completion(name, prompt, tokens);
            body["logprobs"] = 2.into();
            let answer = server.client.post("/v1/completions", &body).good();
            let top = answer["choices"][0]["logprobs"]["top_logprobs"].clone();
            top.as_array().expect("a list").iter().all(|position| {
                let position = position.as_object().expect("an object");
                let mut likely: Vec<f64> = position.values().filter_map(Value::as_f64).collect();
                likely.sort_by(|a, b| b.total_cmp(a));
                likely.len() >= 2 && likely[0] - likely[1] > 0.02
            })
        })
    };
    let found: Vec<_> =
        (0..400).map(|i| format!("Prompt number {i} of many")).filter(sure).take(wanted).collect();
    assert_eq!(found.len(), wanted, "enough prompts have sure answers");
    found
}

#[test]
fn swaps_under_load_lose_no_request_and_mix_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    let options = Options::models(&[&model]).admin();
    let adapters = options.data().join("adapters");
    std::fs::create_dir_all(&adapters).expect("made");
    peft(&adapters, "old", &model, 5);
    peft(&adapters, "new", &model, 6);
    let server = options.start();
    let tokens = 8;
    load(&server, "old", "old");
    load(&server, "new", "new");
    let prompts = sure_prompts(&server, &["tiny", "old", "new"], tokens, 6);
    let answers = |name: &str| -> Vec<String> {
        prompts.iter().map(|prompt| server.complete(name, prompt, tokens)).collect()
    };
    let (base, old, new) = (answers("tiny"), answers("old"), answers("new"));
    assert!(base != old && old != new && base != new);
    load(&server, "style", "old");

    let (stop, unloaded) = (AtomicBool::new(false), AtomicBool::new(false));
    let (asked, seen_old, seen_new, missing) =
        (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let hammer = |worker: usize| {
        for round in worker.. {
            if stop.load(Ordering::SeqCst) {
                return;
            }
            let at = round % prompts.len();
            let name = if (round / 3) % 3 == 0 { "tiny" } else { "style" };
            let body = completion(name, &prompts[at], tokens);
            let may_miss = unloaded.load(Ordering::SeqCst);
            let answer = server.client.post("/v1/completions", &body);
            asked.fetch_add(1, Ordering::SeqCst);
            let may_miss = may_miss || unloaded.load(Ordering::SeqCst);
            if answer.status == 404 && name == "style" && may_miss {
                missing.fetch_add(1, Ordering::SeqCst);
                continue;
            }
            let text = text_of(&answer.good());
            if name == "tiny" {
                assert_eq!(text, base[at], "the base is never changed");
            } else if text == old[at] {
                seen_old.fetch_add(1, Ordering::SeqCst);
            } else {
                assert_eq!(text, new[at], "either version, whole");
                seen_new.fetch_add(1, Ordering::SeqCst);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..8).map(|worker| scope.spawn(move || hammer(worker))).collect();
        let swaps = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for swap in 0..24 {
                let (source, expected) = if swap % 2 == 0 { ("new", &new) } else { ("old", &old) };
                load(&server, "style", source);
                // After the response, every new request uses the new version.
                assert_eq!(server.complete("style", &prompts[0], tokens), expected[0]);
            }
            unloaded.store(true, Ordering::SeqCst);
            server.admin().delete("/admin/adapters/style").good();
            server.client.post("/v1/completions", &completion("style", "x", 1)).error(404);
            std::thread::sleep(Duration::from_millis(50));
            load(&server, "style", "new");
            assert_eq!(server.complete("style", &prompts[0], tokens), new[0]);
        }));
        stop.store(true, Ordering::SeqCst);
        let worked: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        swaps.expect("the swaps work");
        worked.into_iter().for_each(|worker| worker.expect("the workers see what they should"));
    });
    let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
    assert!(count(&asked) > 50, "there was load: {}", count(&asked));
    assert!(count(&seen_old) > 0 && count(&seen_new) > 0, "both versions were seen");
    assert_eq!(server.metric("ingot_engine_restarts_total", &[]), 0.0);
    // Replaced versions leave the engine: `old`, `new` and the last `style` stay.
    eventually(Duration::from_secs(2), "replaced versions are gone", || {
        server.metric("ingot_adapters_resident", &[]) == 3.0
    });
}

#[test]
fn adapters_take_turns_and_each_gives_its_own_answers() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = llama(folder.path(), "tiny", 1);
    let options = Options::models(&[&model]).admin();
    let adapters = options.data().join("adapters");
    std::fs::create_dir_all(&adapters).expect("made");
    let names = ["a", "b", "c", "d"];
    for (seed, name) in (10..).zip(names) {
        peft(&adapters, name, &model, seed);
    }
    let server = options.start();
    names.iter().for_each(|name| drop(load(&server, name, name)));
    let everyone = ["tiny", "a", "b", "c", "d"];
    let tokens = 8;
    let prompts = sure_prompts(&server, &everyone, tokens, 3);
    let mut expected = HashMap::new();
    for name in everyone {
        for prompt in &prompts {
            expected.insert((name, prompt.as_str()), server.complete(name, prompt, tokens));
        }
    }
    let finished = Mutex::new(HashMap::new());
    let ask = |client: &Client, name: &'static str, prompt: &String| {
        let text =
            text_of(&client.post("/v1/completions", &completion(name, prompt, tokens)).good());
        assert_eq!(text, expected[&(name, prompt.as_str())], "{name}: {prompt}");
        *crate::support::lock(&finished).entry(name).or_insert(0) += 1;
    };
    std::thread::scope(|scope| {
        for worker in 0..15 {
            let (name, ask, prompts) = (everyone[worker % 5], &ask, &prompts);
            let client = &server.client;
            scope.spawn(move || (0..6).for_each(|round| ask(client, name, &prompts[round % 3])));
        }
    });
    let finished = finished.into_inner().expect("no panic");
    assert!(everyone.iter().all(|name| finished[name] == 18), "{finished:?}");
    assert_eq!(server.metric("ingot_adapters_resident", &[]), 4.0);
}
