//! The folder of a job.

use super::JobOrder;
use super::order::VERSION;
use super::outcome::{Failure, Outcome};
use serde::{Serialize, de::DeserializeOwned};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

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

    /// The completions that a policy was trained on ([`super::rollout_table`]).
    pub fn rollouts(&self) -> PathBuf {
        self.0.join("rollouts.jsonl")
    }

    /// Files of examples that the job made, and reports about them.
    pub fn made(&self) -> PathBuf {
        self.0.join("made")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.0.join("checkpoints")
    }

    pub fn artifacts(&self) -> PathBuf {
        self.0.join("artifacts")
    }

    /// The file that asks the job to finish ([`Folder::ask_to_finish`]).
    pub(super) fn finish(&self) -> PathBuf {
        self.0.join("finish")
    }

    /// Asks the job to end training after the current step and to keep what it has learned.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn ask_to_finish(&self) -> io::Result<()> {
        write_whole(&self.finish(), b"")
    }

    /// The adapter as it was at a checkpoint.
    pub fn checkpoint_adapter(&self, step: u64) -> PathBuf {
        self.0.join("checkpoints").join(format!("adapter-{step}.gguf"))
    }

    /// The reference model's log-probabilities of the chosen and rejected completions (DPO).
    pub fn reference(&self) -> PathBuf {
        self.cache().join("reference")
    }

    /// A new model with its initial, random weights.
    pub fn fresh(&self) -> PathBuf {
        self.0.join("fresh.gguf")
    }

    /// Folder with the tokenized data.
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }

    /// # Errors
    /// If the order cannot be read, or has another version.
    pub fn order(&self) -> io::Result<JobOrder> {
        let order: JobOrder = read_json(&self.0.join("order.json"))?;
        match order.version() {
            VERSION => Ok(order),
            other => Err(io::Error::other(format!("order.json is of version {other}"))),
        }
    }

    /// Creates the folder and writes the order into it.
    ///
    /// # Errors
    /// If the folder or the order cannot be written.
    pub fn create(&self, order: &JobOrder) -> io::Result<()> {
        fs::create_dir_all(&self.0)?;
        write_json(&self.0.join("order.json"), order)
    }

    /// The outcome of the job; `None` while it has not ended.
    ///
    /// # Errors
    /// If the outcome cannot be read.
    pub fn outcome(&self) -> io::Result<Option<Outcome>> {
        match read_json(&self.0.join("outcome.json")) {
            Ok(outcome) => Ok(Some(outcome)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes what the job waits for outside of it, before its process exits with
    /// [`WAITS`](super::WAITS).
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn wait_for(&self, what: &Failure) -> io::Result<()> {
        write_json(&self.0.join("waits.json"), what)
    }

    /// What the job's last process waited for.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn waits_for(&self) -> io::Result<Failure> {
        read_json(&self.0.join("waits.json"))
    }

    /// Writes the outcome of the job. This is the last file that a job writes.
    ///
    /// # Errors
    /// If the outcome cannot be written.
    pub fn end(&self, outcome: &Outcome) -> io::Result<()> {
        write_json(&self.0.join("outcome.json"), outcome)
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::from)
}

/// Writes JSON atomically ([`write_whole`]).
fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    write_whole(path, &serde_json::to_vec_pretty(value)?)
}

/// Writes a file atomically: the path holds either the complete new content or its previous state.
///
/// # Errors
/// If the file cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    let mut file = File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&part, path)?;
    // The parent of a plain file name is empty.
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}
