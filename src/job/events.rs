//! What happens in a job, a line of JSON each.
//!
//! Lines are numbered, and a number is never used twice: who follows the file goes on after the last
//! one seen, also when the file was rewritten meanwhile. It is when a job resumes: lines about steps
//! after the checkpoint are taken out, since those steps are done again.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts up from 1, with gaps.
    pub seq: u64,
    /// Seconds since 1970.
    pub at: f64,
    /// For people.
    pub message: String,
    #[serde(flatten)]
    pub event: JobEvent,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum JobEvent {
    Message {
        level: Level,
    },
    /// The data have been read.
    Data {
        train: DataReport,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        validation: Option<DataReport>,
    },
    Step(StepMetrics),
    Validation(Validation),
    /// What the model writes by now (pretraining).
    Sample {
        step: u64,
        text: String,
    },
    Checkpoint {
        step: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Info,
    Warn,
    Error,
}

/// What a file holds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DataReport {
    pub examples: u64,
    pub tokens: u64,
    /// Tokens that have a loss.
    pub trained_tokens: u64,
    pub longest: u64,
    /// Examples that were cut at `max_length`.
    pub truncated: u64,
    /// Examples left out: nothing trained is left within `max_length`, or, of pairs, an answer is
    /// longer, or both are the same, or a prompt is longer.
    pub dropped: u64,
    /// Bytes of text (pretraining).
    #[serde(default)]
    pub bytes: u64,
    /// SHA-256 of the file.
    pub digest: String,
    /// What may surprise: sentences for people.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What a kind of job measures besides the loss, by name.
pub type Metrics = BTreeMap<String, f64>;

/// A step of the optimizer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    pub step: u64,
    pub total_steps: u64,
    pub epoch: f64,
    /// Nats a trained token, or a pair.
    pub loss: f64,
    /// The share of trained tokens that are the most likely ones, or of pairs whose chosen completion has
    /// the higher reward; `None` for policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    pub learning_rate: f64,
    pub grad_norm: f64,
    /// So far, context included.
    pub tokens: u64,
    pub tokens_per_second: f64,
    /// Estimated time until the last step.
    pub eta_seconds: f64,
    /// Resident memory of the process.
    pub memory_bytes: u64,
    /// No step follows. It is not stored.
    #[serde(skip)]
    pub last: bool,
    /// What the kind of job measures besides, beside the other keys.
    #[serde(flatten)]
    pub metrics: Metrics,
}

/// What data that are not trained on say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    pub step: u64,
    /// Nothing of policies, whose rewards are among the metrics; as is the accuracy.
    #[serde(rename = "validation_loss", default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(rename = "validation_accuracy", default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// What a byte of the text costs (pretraining).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// What the kind of job measures besides.
    #[serde(default, skip_serializing_if = "Metrics::is_empty")]
    pub metrics: Metrics,
}

/// What a policy's answers were worth, in the mean: a name among the metrics.
pub const REWARD: &str = "reward_mean";

impl StepMetrics {
    /// Of policies.
    pub fn reward(&self) -> Option<f64> {
        self.metrics.get(REWARD).copied()
    }
}

impl Validation {
    /// Of policies.
    pub fn reward(&self) -> Option<f64> {
        self.metrics.get(REWARD).copied()
    }
}

impl JobEvent {
    /// The step that it is about.
    pub fn step(&self) -> Option<u64> {
        match self {
            Self::Step(step) => Some(step.step),
            Self::Validation(found) => Some(found.step),
            Self::Checkpoint { step } | Self::Sample { step, .. } => Some(*step),
            Self::Message { .. } | Self::Data { .. } => None,
        }
    }
}

/// Seconds since 1970.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The end of the file, where lines are added. One process at a time has it.
#[derive(Debug)]
pub struct EventLog {
    file: File,
    next: u64,
}

impl EventLog {
    /// Opens or makes the file. A last line that was not written whole is taken away.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).truncate(false).open(path)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)?;
        let next = entries(&text[..whole]).last().map_or(1, |entry| entry.seq + 1);
        Ok(Self { file, next })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If there is no room: the file is as before.
    pub fn add(&mut self, event: JobEvent, message: impl Into<String>) -> io::Result<()> {
        let entry = Entry { seq: self.next, at: now(), message: message.into(), event };
        let mut line = serde_json::to_vec(&entry)?;
        line.push(b'\n');
        let before = self.file.metadata()?.len();
        self.file.write_all(&line).inspect_err(|_| {
            let _ = self.file.set_len(before);
        })?;
        self.next += 1;
        Ok(())
    }

    /// Something to tell.
    ///
    /// # Errors
    /// As [`EventLog::add`].
    pub fn say(&mut self, level: Level, message: impl Into<String>) -> io::Result<()> {
        self.add(JobEvent::Message { level }, message)
    }

    /// Takes out what was said of steps after `step`.
    ///
    /// # Errors
    /// If the file cannot be read or written; it is whole then, old or new.
    pub fn cut(path: &Path, step: u64) -> io::Result<Self> {
        let next = Self::open(path)?.next;
        let text = fs::read(path)?;
        let part = path.with_extension("part");
        let mut file = File::create(&part)?;
        for entry in entries(&text) {
            if entry.event.step().is_none_or(|at| at <= step) {
                serde_json::to_writer(&mut file, &entry)?;
                file.write_all(b"\n")?;
            }
        }
        file.sync_all()?;
        fs::rename(&part, path)?;
        Ok(Self { file: OpenOptions::new().append(true).open(path)?, next })
    }

    /// Forces what was added to the disk.
    ///
    /// # Errors
    /// If that fails.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Lines that can be read; others are none of ours.
fn entries(text: &[u8]) -> impl Iterator<Item = Entry> {
    text.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok())
}

/// Reads the lines that were added since the last time.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    /// The file, by its number, and how far it has been read.
    file: Option<(u64, File)>,
    seen: u64,
}

impl Follower {
    /// Begins after line number `seen`.
    pub fn new(path: PathBuf, seen: u64) -> Self {
        Self { path, file: None, seen }
    }

    /// New lines; none if there is no file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(&mut self) -> io::Result<Vec<Entry>> {
        let number = match fs::metadata(&self.path) {
            Ok(file) => file.ino(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        if self.file.as_ref().is_none_or(|(open, _)| *open != number) {
            self.file = Some((number, File::open(&self.path)?));
        }
        let Some((_, file)) = &mut self.file else { return Ok(Vec::new()) };
        let mut at = file.stream_position()?;
        let mut found = Vec::new();
        let mut reader = BufReader::new(&mut *file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line)?;
            if !line.ends_with(b"\n") {
                break;
            }
            at += read as u64;
            if let Ok(entry) = serde_json::from_slice::<Entry>(&line)
                && entry.seq > self.seen
            {
                self.seen = entry.seq;
                found.push(entry);
            }
        }
        // A line that is being written is read again.
        file.seek(SeekFrom::Start(at))?;
        Ok(found)
    }
}
