//! The whole binary under test, as one more binary: linked once.
//!
//! | module | what |
//! |---|---|
//! | `support.rs`, `http.rs`, `models_made.rs` | servers, requests, tiny models |
//! | `reliability.rs`, `drain.rs`, `loading.rs` | death of engines and gateways, draining, slow clients, broken models |
//! | `requests.rs` | requests as clients in use send them |
//! | `lora.rs` | adapters: right, and swapped under load |
//! | `models.rs` | several models, embeddings, keys and limits |
//! | `oracle.rs` | greedy text against a plain llama.cpp loop |
//! | `templates.rs` | chat templates against jinja2 |
//! | `draft.rs` | `--draft-model` |
//! | `jobs.rs` | training jobs that are killed, or have no room |
//! | `verify.rs` | `ingot verify` |
//! | `layers.rs` | who may import whom, where `unsafe` may stand |
//! | `metrics.rs` | the series, and the transcript of a stream |
//! | `hostile.rs` | malformed requests by the thousand |
//!
//! Tests that need a real model find it in `INGOT_TEST_MODEL`; templates in `INGOT_TEST_TEMPLATES`.

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
