//! The job process: `ingot job FOLDER`.
//!
//! | file | content |
//! |---|---|
//! | `run.rs` | from the order to the outcome |
//! | `data.rs`, `init.rs` | the training data, and the initial weights |
//! | `policy.rs` | the served model that a job with a grader trains |
//! | `gateway_client.rs` | the connection to the gateway, which samples completions and queries grader models |
//! | `reporter.rs`, `artifacts.rs` | events while the job runs, files at its end |

mod artifacts;
mod data;
mod gateway_client;
mod init;
mod policy;
mod reporter;
mod run;
#[cfg(test)]
mod tests;

pub use run::{JobError, run};

use crate::job::{Control, DISK_FULL, DONE, Folder, STOPPED, WAITS};
use rustix::process::{getpid, setpriority_process};
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use tokio::signal::unix::{SignalKind, signal};

/// Lowest CPU priority, so that serving comes first.
const NICE: i32 = 19;
/// Highest OOM score, so that the system kills the job first when memory runs out.
const OOM_SCORE: &str = "1000";

/// Entry point of the job process.
pub fn main(folder: &Path) -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_target(false).with_ansi(false).init();
    // Both calls are optional: a container may forbid them.
    let _ = setpriority_process(Some(getpid()), NICE);
    let _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let folder = Folder::new(folder);
    let control = Arc::new(Control::new(&folder));
    if let Err(error) = listen(&control) {
        tracing::error!("signals cannot be received: {error}");
        return ExitCode::FAILURE;
    }
    match run(&folder, &control) {
        Ok(true) => ExitCode::from(DONE),
        Ok(false) => ExitCode::from(STOPPED),
        Err(error) => {
            tracing::error!("{error}");
            match error {
                JobError::DiskFull(_) => ExitCode::from(DISK_FULL),
                JobError::Waits(_) => ExitCode::from(WAITS),
                JobError::Busy | JobError::Folder(_) => ExitCode::FAILURE,
            }
        }
    }
}

/// Stops the job at SIGTERM, and when standard input is closed.
fn listen(control: &Arc<Control>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut terminate = {
        let _inside = runtime.enter();
        signal(SignalKind::terminate())?
    };
    let told = control.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(terminate.recv());
        told.stop();
    })?;
    let alone = control.clone();
    std::thread::Builder::new().name("starter".into()).spawn(move || {
        let mut input = io::stdin().lock();
        while matches!(input.read(&mut [0; 64]), Ok(1..)) {}
        alone.stop();
    })?;
    Ok(())
}
