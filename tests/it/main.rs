//! Integration tests of the whole binary. All of them are one test binary, so that it is linked
//! once.
//!
//! | module | content |
//! |---|---|
//! | `support.rs`, `http.rs`, `models_made.rs` | helpers: servers, requests, tiny models |
//! | `reliability.rs`, `drain.rs`, `loading.rs` | death of engines and gateways, draining, slow clients, broken models |
//! | `requests.rs` | requests as clients in use send them |
//! | `lora.rs` | adapters: correct results, and replacement under load |
//! | `models.rs` | several models, embeddings, keys and limits |
//! | `oracle.rs` | greedy text compared with a plain llama.cpp loop |
//! | `templates.rs` | chat templates compared with jinja2 |
//! | `draft.rs` | `--draft-model` |
//! | `jobs.rs` | training jobs that are killed, or whose disk is full |
//! | `verify.rs` | `ingot verify` |
//! | `layers.rs` | allowed imports between modules, allowed `unsafe`, length of files |
//! | `documents.rs` | what README, docs and examples show is accepted |
//! | `metrics.rs` | the metrics, and the exact bytes of a stream |
//! | `hostile.rs` | thousands of malformed requests |
//!
//! Tests that need a real model find it in `INGOT_TEST_MODEL`; templates in `INGOT_TEST_TEMPLATES`.

mod documents;
mod draft;
mod drain;
mod hostile;
mod http;
mod jobs;
mod layers;
mod loading;
mod lora;
mod metrics;
mod models;
mod models_made;
mod oracle;
mod reliability;
mod requests;
mod support;
mod templates;
mod verify;
