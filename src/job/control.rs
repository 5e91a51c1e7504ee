//! What is asked of a job while it runs.

use super::Folder;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// What the starter of a job asks of it while it runs.
#[derive(Debug, Default)]
pub struct Control {
    stop: AtomicBool,
    /// A file whose presence asks the job to finish: the request outlives the process.
    finish: Option<PathBuf>,
}

impl Control {
    /// The control of a job in `folder`, which does not stop yet.
    pub fn new(folder: &Folder) -> Self {
        Self { stop: AtomicBool::new(false), finish: Some(folder.finish()) }
    }

    /// Asks the job to write a checkpoint and exit.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether the job is asked to write a checkpoint and exit.
    pub fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Whether the job is asked to end training after the current step and to keep what it has
    /// learned.
    pub fn finishes(&self) -> bool {
        self.finish.as_ref().is_some_and(|file| file.exists())
    }
}
