//! The gateway process: HTTP, keys, the registry of models, metrics, supervision of engines. No
//! model code runs here, and of a model file only the header is read.
//!
//! | file | content |
//! |---|---|
//! | `server.rs`, `server/` | accept loop, limits, time-outs, drain |
//! | `api/` | one file per family of endpoints, wire types beside their handler |
//! | `app.rs` | state shared by all handlers |
//! | `auth.rs`, `limits.rs` | authentication and limits per key |
//! | `registry.rs`, `registry/` | loaded models and adapters by name |
//! | `remote.rs` | models of other servers, which graders and judges ask |
//! | `jobs/` | training jobs: queue, processes, results |
//! | `lifecycle.rs` | starting, running, draining |
//! | `header.rs` | model properties read from the file header before loading |
//! | `memory.rs` | memory plan of a model, made before loading |
//! | `supervisor.rs` | supervisor of one engine process |
//! | `generate.rs` | starts requests in a model: the way of all that generate text |
//! | `job_calls.rs` | answers the calls of running jobs |
//! | `stream.rs` | engine events to server-sent events |
//! | `metrics.rs`, `metrics/` | Prometheus |
//! | `store/` | files and their digests in the data folder |
//! | `error.rs` | mapping of all errors to OpenAI's error body |

pub mod api;
pub mod app;
pub mod auth;
pub mod error;
pub mod generate;
pub mod header;
pub mod job_calls;
pub mod jobs;
pub mod lifecycle;
pub mod limits;
pub mod memory;
pub mod metrics;
pub mod registry;
pub mod remote;
pub mod server;
pub mod store;
pub mod stream;
pub mod supervisor;

pub use server::{ServeError, serve};
