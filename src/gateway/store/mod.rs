//! The data folder: models and adapters with their digests, and the SQLite database that lists them.
//!
//! ```text
//! <data>/ingot.db                  what is there (WAL, synchronous FULL)
//! <data>/models/<folder>/x.gguf    whole, checked models only
//! <data>/adapters/<name>/…         adapters, written by the registry
//! <data>/files/<id>                uploads, and results of jobs
//! <data>/jobs/<id>/…               see [`crate::job`]
//! <data>/downloads/*.part, *.lock  what is still on its way
//! ```
//!
//! | file | what |
//! |---|---|
//! | `database.rs` | [`Store`]: tables, migrations |
//! | `files.rs`, `jobs.rs` | the tables of files, jobs and artifacts |
//! | `reference.rs` | [`ModelRef`]: what people write to name a model; the aliases |
//! | `download.rs` | one file over HTTP: resume by range, SHA-256 |
//! | `pull.rs` | [`pull`], [`ensure`]: from a reference to a model in the folder |
//! | `folder.rs` | Hugging Face folders, converted |
//! | `python.rs` | the file of an alias out of its Python package |

mod database;
mod download;
mod files;
mod folder;
mod jobs;
mod pull;
mod python;
mod reference;
#[cfg(test)]
mod tests;

pub use database::{Store, StoreError, StoredAdapter, StoredModel};
pub use files::StoredFile;
pub use jobs::{JobStatus, Products, StoredArtifact, StoredJob};
pub use pull::{PullError, PullEvent, PulledModel, ensure, pull};
pub use reference::{Alias, BadRef, DEFAULT_MODEL, ModelRef};

/// Lower-case hexadecimal, the form digests are kept and shown in.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
