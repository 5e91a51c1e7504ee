//! A job: an order in a folder, a process that carries it out, and what the folder then holds.
//!
//! ```text
//! order.json      what to do; written once, before anything else
//! events.jsonl    what happened, a line each
//! log.txt         what the process said on standard error
//! cache/          tokens of the data
//! checkpoints/    step-N/, whole or not there
//! artifacts/      what was made
//! outcome.json    how it ended; written last, whole or not there
//! ```
//!
//! The folder is all that a job and its starter share: whoever dies, and whenever, the other finds
//! everything there. The process takes nothing but SIGTERM (write a checkpoint and leave), and
//! leaves by itself when its standard input ends, which is when its starter is gone.
//!
//! | file | what |
//! |---|---|
//! | `events.rs` | [`EventLog`], [`Follower`]: the lines of `events.jsonl` |
//! | `needs.rs` | memory and disk that a job takes, before it runs |
//! | `plot.rs` | curves of a job as SVG |
//! | `process.rs` | the process: how it is started, what it does first, how it leaves |
//! | `run.rs` | from the order to the outcome: |
//! | `link.rs` | the connection to the gateway, where models are asked |
//! | `data.rs`, `init.rs` | what it is trained on, what it begins with |
//! | `tell.rs`, `make.rs` | what it says on the way, what it leaves |

mod data;
mod events;
mod init;
mod link;
mod make;
mod needs;
mod plot;
mod process;
mod run;
mod tell;
#[cfg(test)]
mod tests;

pub use events::{Entry, EventLog, Follower, JobEvent, Level, Step, Validation, now};
pub use needs::Needs;
pub use plot::plot;
pub use process::{DISK_FULL, DONE, Process, STOPPED, main, spawn};
pub use run::{JobError, run};

use super::checkpoint::write_whole;
use super::spec::Spec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Of [`Order`] and [`Outcome`].
const VERSION: u32 = 1;

/// What a job is to do, with everything looked up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    pub version: u32,
    pub id: String,
    /// With every default filled in.
    pub spec: Spec,
    /// The name of what it makes.
    pub name: String,
    /// The model that is trained further, a GGUF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// SHA-256 of it, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_sha256: Option<String>,
    /// The Hugging Face folder that the model was converted from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PathBuf>,
    pub train: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<PathBuf>,
    /// The adapter to go on from: a PEFT folder or a GGUF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// The model whose tokenizer a fresh model takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// When the job was created, in seconds since 1970: the date that chat templates write, however
    /// often and whenever the job goes on.
    #[serde(default)]
    pub created_at: i64,
}

impl Order {
    /// An order that names only its data.
    pub fn new(id: String, spec: Spec, name: String, train: PathBuf) -> Self {
        Self {
            version: VERSION,
            id,
            spec,
            name,
            model: None,
            model_sha256: None,
            parent: None,
            train,
            validation: None,
            init: None,
            tokenizer: None,
            created_at: now() as i64,
        }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Outcome {
    Succeeded {
        /// Tokens of all steps, context included.
        trained_tokens: u64,
        artifacts: Vec<Artifact>,
    },
    Failed(Failure),
}

/// Why it failed, as OpenAI's job objects say it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub code: String,
    pub message: String,
    /// `training_file` or `validation_file`.
    pub param: Option<String>,
}

/// A file that a job made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    #[serde(rename = "type")]
    pub kind: ArtifactKind,
    /// Below the job's folder.
    pub file: PathBuf,
    pub bytes: u64,
    pub sha256: String,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactKind {
    /// A LoRA adapter as llama.cpp reads it; what is served.
    Adapter,
    /// A file of the same adapter as PEFT reads it.
    Peft,
    /// A model, GGUF.
    Model,
    /// A file of the same model as transformers reads it.
    HuggingFace,
    /// Losses by step, CSV.
    Results,
    /// Where all this comes from.
    Provenance,
}

impl ArtifactKind {
    /// As the API says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Peft => "peft",
            Self::Model => "model",
            Self::HuggingFace => "hugging_face",
            Self::Results => "results",
            Self::Provenance => "provenance",
        }
    }
}

/// `ft:<base>:<organization>:<suffix>:<id>`, or the name that the specification gives.
pub fn name_of(spec: &Spec, id: &str) -> String {
    if let Some(name) = &spec.name {
        return name.clone();
    }
    let base = spec.model.as_deref().unwrap_or_default();
    let suffix = spec.suffix.as_deref().unwrap_or_default();
    let id = &id[id.len().saturating_sub(8)..];
    format!("ft:{base}:ingot:{suffix}:{id}")
}

/// A job's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn events(&self) -> PathBuf {
        self.0.join("events.jsonl")
    }

    pub fn log(&self) -> PathBuf {
        self.0.join("log.txt")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    pub fn artifacts(&self) -> PathBuf {
        self.0.join("artifacts")
    }

    /// The adapter as it was at a checkpoint.
    pub fn checkpoint_adapter(&self, step: u64) -> PathBuf {
        self.0.join("checkpoints").join(format!("adapter-{step}.gguf"))
    }

    /// What the model said of pairs of answers before it was trained.
    pub fn reference(&self) -> PathBuf {
        self.cache().join("reference")
    }

    /// Tokens of the data.
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }

    /// # Errors
    /// If it cannot be read, or is not of this version.
    pub fn order(&self) -> io::Result<Order> {
        let order: Order = read_json(&self.0.join("order.json"))?;
        match order.version {
            VERSION => Ok(order),
            other => Err(io::Error::other(format!("order.json is of version {other}"))),
        }
    }

    /// Makes the folder with its order.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn create(&self, order: &Order) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        write_json(&self.0.join("order.json"), order)
    }

    /// How the job ended, if it has.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn outcome(&self) -> io::Result<Option<Outcome>> {
        match read_json(&self.0.join("outcome.json")) {
            Ok(outcome) => Ok(Some(outcome)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn end(&self, outcome: &Outcome) -> io::Result<()> {
        write_json(&self.0.join("outcome.json"), outcome)
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::from)
}

/// Whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_whole(path, &serde_json::to_vec_pretty(value)?)
}
