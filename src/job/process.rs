//! Starting the process of a job (`ingot job FOLDER`), and its exit codes.

use super::Folder;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use tokio::process::{Child, ChildStdin, Command};

/// Exit code: the job has an outcome.
pub const DONE: u8 = 0;
/// Exit code: the process was asked to stop. When started again, it resumes from the last
/// checkpoint.
pub const STOPPED: u8 = 75;
/// Exit code: the job needs something that is not available now, such as its grader's model;
/// `waits.json` in its folder names it. It can be resumed as after [`STOPPED`].
pub const WAITS: u8 = 73;
/// Exit code: the disk is full. Once there is space, the job can be resumed as after [`STOPPED`].
pub const DISK_FULL: u8 = 74;

/// A running job process. Dropping it kills the process.
pub struct Process {
    pub child: Child,
    /// The process stops when this pipe is closed. It is kept apart from `child` because waiting
    /// for the child would close it.
    _leash: Option<ChildStdin>,
}

/// Starts the process. Over `socket` it calls the gateway ([`super::rollout`]).
///
/// # Errors
/// If the process cannot be started.
pub fn spawn(folder: &Folder, threads: usize, socket: Option<OwnedFd>) -> io::Result<Process> {
    let log = OpenOptions::new().append(true).create(true).open(folder.log())?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("ingot")
        .arg("job")
        .arg(folder.path())
        .env("RAYON_NUM_THREADS", threads.to_string())
        // Only rayon's pool needs threads; candle's threads spin at a barrier after every small
        // operation.
        .env("CANDLE_NUM_THREADS", "1")
        // Each step reuses the buffers of the previous step: returning pages to the system costs a
        // fifth of the step time.
        .env("MIMALLOC_PURGE_DELAY", "-1")
        .stdin(Stdio::piped())
        .stdout(socket.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::from(log))
        // A separate process group, so that Ctrl-C in a terminal does not reach the job. The parent
        // sends SIGTERM to stop it.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    let _leash = child.stdin.take();
    Ok(Process { child, _leash })
}
