//! The folder of a job.

use super::order::{Order, VERSION};
use super::outcome::Outcome;
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

    /// Writes how the job ended; the last file that is written.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn end(&self, outcome: &Outcome) -> io::Result<()> {
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

/// Writes a file that is there whole or not at all.
///
/// # Errors
/// If it cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = path.with_extension("part");
    let mut file = File::create(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&part, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}
