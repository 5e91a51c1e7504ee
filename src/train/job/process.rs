//! The process of a job: `ingot job FOLDER`.

use super::{Folder, JobError, run};
use rustix::process::{getpid, setpriority_process};
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::process::{Child, ChildStdin, Command};
use tokio::signal::unix::{SignalKind, signal};

/// Exit codes: it has an outcome;
pub const DONE: u8 = 0;
/// it was told to stop, and goes on from its last checkpoint when started again;
pub const STOPPED: u8 = 75;
/// the disk is full: the same, once there is room.
pub const DISK_FULL: u8 = 74;

/// Behind everybody else in line for a core.
const NICE: i32 = 19;
/// First in line when the system runs out of memory.
const OOM_SCORE: &str = "1000";

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

/// The role.
pub fn main(folder: &Path) -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_target(false).with_ansi(false).init();
    // Neither is vital: a container may forbid them.
    let _ = setpriority_process(Some(getpid()), NICE);
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let stop = Arc::new(AtomicBool::new(false));
    if let Err(error) = listen(&stop) {
        tracing::error!("signals cannot be received: {error}");
        return ExitCode::FAILURE;
    }
    let folder = Folder::new(folder);
    match run(&folder, &stop) {
        Ok(true) => ExitCode::from(DONE),
        Ok(false) => ExitCode::from(STOPPED),
        Err(error @ JobError::DiskFull(_)) => {
            tracing::error!("{error}");
            ExitCode::from(DISK_FULL)
        }
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Sets `stop` at SIGTERM, and when standard input ends.
fn listen(stop: &Arc<AtomicBool>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut terminate = {
        let _inside = runtime.enter();
        signal(SignalKind::terminate())?
    };
    let told = stop.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(terminate.recv());
        told.store(true, Ordering::Relaxed);
    })?;
    let alone = stop.clone();
    std::thread::Builder::new().name("starter".into()).spawn(move || {
        let mut input = io::stdin().lock();
        while matches!(input.read(&mut [0; 64]), Ok(1..)) {}
        alone.store(true, Ordering::Relaxed);
    })?;
    Ok(())
}
