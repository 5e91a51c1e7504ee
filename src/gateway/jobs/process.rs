//! Runs one process of a job, and watches it until it exits.

use super::throttle::Throttle;
use super::{JobConnection, Jobs, LEAVE_PATIENCE, Live, lock};
use crate::config::ByteSize;
use crate::gateway::memory::available;
use crate::job::{self, Entry, Failure, Folder, Follower, JobEvent, JobOrder};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::ExitStatus;
use std::time::{Duration, Instant};
use tokio::process::Child;

/// Interval of checks whether requests are running.
const COURTESY_EVERY: Duration = Duration::from_millis(5);
/// Interval of reading events and checking memory.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Bytes at the end of the log in which the cause of a process's death is looked for.
const LAST_WORDS: u64 = 2_000;

/// The desired state of a job's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DesiredState {
    Run,
    /// Write a checkpoint and exit.
    Leave,
    Die,
}

/// How a process ended.
#[derive(Debug)]
pub(super) enum End {
    /// The job has an outcome.
    Done,
    /// It exited because it was asked to.
    Left,
    DiskFull,
    /// It waits for something outside of it.
    Waits(Failure),
    /// Memory was low, so it was asked to exit.
    Short(String),
    Died(String),
}

impl Jobs {
    pub(super) async fn run_process(self: &std::sync::Arc<Self>, id: &str, live: &Live) -> End {
        let folder = self.folder(id);
        let order = folder.order().ok();
        let training = order.as_ref().and_then(JobOrder::training);
        let threads = training.and_then(|order| order.spec.train.threads).unwrap_or(1);
        // Read before the process writes: these events were already handled.
        let mut follower = Follower::new(folder.events(), 0);
        lock(&live.progress).take(&follower.read().unwrap_or_default());
        let base = training.and_then(|order| order.spec.model.clone());
        let socket = match base.map(|base| self.connect(id, base)).transpose() {
            Ok(socket) => socket,
            Err(error) => return End::Died(format!("it could not be connected: {error}")),
        };
        let mut process = match job::spawn(&folder, threads, socket) {
            Ok(process) => process,
            Err(error) => return End::Died(format!("it could not be started: {error}")),
        };
        let mut short = None;
        let status = self.watch(id, live, &mut process.child, &mut follower, &mut short).await;
        self.read_events(id, live, &mut follower);
        match (status, short) {
            (Ok(status), None) => end_of(status, &folder),
            (Ok(status), Some(why)) => match end_of(status, &folder) {
                End::Done => End::Done,
                _ => End::Short(why),
            },
            (Err(error), _) => End::Died(error.to_string()),
        }
    }

    /// Sends one end of a new socket pair to those who answer the job's calls; the other end is for
    /// the process.
    fn connect(&self, job: &str, base: String) -> std::io::Result<OwnedFd> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let socket = tokio::net::UnixStream::from_std(ours)?;
        // Nobody answers when the server stops, and then the process is stopped too.
        let _ = self.connections.send(JobConnection { job: job.to_owned(), base, socket });
        Ok(theirs.into())
    }

    async fn watch(
        self: &std::sync::Arc<Self>,
        id: &str,
        live: &Live,
        child: &mut Child,
        follower: &mut Follower,
        short: &mut Option<String>,
    ) -> std::io::Result<ExitStatus> {
        let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
        let signal = |signal| {
            // A process that has exited cannot receive signals.
            pid.map(|pid| kill_process(pid, signal));
        };
        let mut wish = live.wish.subscribe();
        let mut throttle = Throttle::new(Instant::now());
        let mut each = tokio::time::interval(COURTESY_EVERY);
        each.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut looked, mut leaves) = (Instant::now(), None::<Instant>);
        loop {
            tokio::select! {
                status = child.wait() => return status,
                _ = each.tick() => {}
            }
            let now = Instant::now();
            let told = *wish.borrow_and_update();
            if told == DesiredState::Die || leaves.is_some_and(|since| now - since > LEAVE_PATIENCE)
            {
                child.start_kill()?;
            } else if told == DesiredState::Leave || short.is_some() {
                if leaves.is_none() {
                    leaves = Some(now);
                    signal(Signal::TERM);
                    signal(Signal::CONT);
                }
            } else if let Some(runs) = throttle.look(self.registry.is_busy(), now) {
                signal(if runs { Signal::CONT } else { Signal::STOP });
            }
            if now - looked > LOOK_EVERY {
                looked = now;
                self.read_events(id, live, follower);
                let available = available();
                if available < self.config.jobs.memory_reserve {
                    *short = Some(format!(
                        "Memory is short ({} available): the job was paused before the system \
                         had to kill somebody. Resume it when there is more, or train with a \
                         smaller max_length or micro_batch, or with activation_checkpointing.",
                        ByteSize(available)
                    ));
                }
            }
        }
    }

    fn read_events(self: &std::sync::Arc<Self>, id: &str, live: &Live, follower: &mut Follower) {
        let entries = match follower.read() {
            Ok(entries) => entries,
            Err(error) => return tracing::warn!(job = id, "events cannot be read: {error}"),
        };
        lock(&live.progress).take(&entries);
        let is_checkpoint = |entry: &Entry| matches!(entry.event, JobEvent::Checkpoint { .. });
        if entries.iter().any(is_checkpoint) {
            self.list_checkpoints(id);
        }
    }
}

fn end_of(status: ExitStatus, folder: &Folder) -> End {
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(job::DONE) => End::Done,
        Some(job::STOPPED) => End::Left,
        Some(job::DISK_FULL) => End::DiskFull,
        Some(job::WAITS) => match folder.waits_for() {
            Ok(what) => End::Waits(what),
            Err(error) => End::Died(format!("what it waits for cannot be read: {error}")),
        },
        _ => End::Died(format!("{status}{}", last_words(folder))),
    }
}

fn last_words(folder: &Folder) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(folder.log())?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS)))?;
        let mut bytes = Vec::new();
        file.take(LAST_WORDS).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let last = text.lines().rev().find(|line| !line.trim().is_empty());
    last.map_or_else(String::new, |line| format!("; its last words: {}", line.trim()))
}
