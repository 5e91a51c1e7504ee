//! How the process of a job is started, and how it leaves: `ingot job FOLDER`.

use super::Folder;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use tokio::process::{Child, ChildStdin, Command};

/// Exit codes: it has an outcome;
pub const DONE: u8 = 0;
/// it was told to stop, and goes on from its last checkpoint when started again;
pub const STOPPED: u8 = 75;
/// the disk is full: the same, once there is room.
pub const DISK_FULL: u8 = 74;

/// A started process; killed when it is dropped.
pub struct Process {
    pub child: Child,
    /// It leaves when this is closed; waiting for the child would close it.
    _leash: Option<ChildStdin>,
}

/// Starts the process. `link` is its connection to somebody who answers (see `link.rs`).
///
/// # Errors
/// If it cannot be started.
pub fn spawn(folder: &Folder, threads: usize, link: Option<OwnedFd>) -> io::Result<Process> {
    let log = OpenOptions::new().append(true).create(true).open(folder.log())?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("ingot")
        .arg("job")
        .arg(folder.path())
        .env("RAYON_NUM_THREADS", threads.to_string())
        // Ours is the pool that counts; candle's spins at a barrier after every small operation.
        .env("CANDLE_NUM_THREADS", "1")
        // A step's buffers are those of the step before: giving pages back costs a fifth of its time.
        .env("MIMALLOC_PURGE_DELAY", "-1")
        .stdin(Stdio::piped())
        .stdout(link.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::from(log))
        // Ctrl-C in a terminal is for whoever started us: it says SIGTERM when it wants us to stop.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let _leash = child.stdin.take();
    Ok(Process { child, _leash })
}
