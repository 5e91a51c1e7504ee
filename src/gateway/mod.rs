//! The gateway process: HTTP, keys, the registry of models, metrics, supervision of
//! engines. No model code runs here, and no more of a model file is read than its header.
//!
//! | file | what |
//! |---|---|
//! | `server.rs`, `server/` | accept loop, limits, time-outs, drain |
//! | `api/` | one file per family of endpoints, wire types beside their handler |
//! | `app.rs` | what every handler shares |
//! | `auth.rs`, `limits.rs` | who asks, and how much of it is allowed |
//! | `registry.rs`, `registry/` | loaded models and adapters by name |
//! | `jobs/` | training jobs: the queue, their processes, what they made |
//! | `lifecycle.rs` | starting, running, draining |
//! | `header.rs` | what a model's header tells before it is loaded |
//! | `memory.rs` | what a model will take, planned before it is loaded |
//! | `supervisor.rs` | one engine process, kept alive |
//! | `stream.rs` | engine events to server-sent events |
//! | `metrics.rs`, `metrics/` | Prometheus |
//! | `store/` | files and their digests in the data folder |
//! | `error.rs` | the one mapping to OpenAI's error body |

pub mod api;
pub mod app;
pub mod auth;
pub mod error;
pub mod header;
pub mod jobs;
pub mod lifecycle;
pub mod limits;
pub mod memory;
pub mod metrics;
pub mod registry;
pub mod server;
pub mod store;
pub mod stream;
pub mod supervisor;

pub use server::{ServeError, serve};
