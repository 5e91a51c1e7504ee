//! The job queue: the oldest job first, as many at once as the configuration allows, each one once
//! there is enough memory for it.

use super::process::{DesiredState, End};
use super::{Jobs, Live, now};
use crate::config::ByteSize;
use crate::gateway::memory::available;
use crate::gateway::store::{JobStatus, StoredJob};
use crate::job::{Failure, Level, ResourceEstimate};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Interval at which the queue is checked even without a wake-up.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A job fails if its process dies this many times without completing a step in between.
const DEATHS: u32 = 5;
const MAX_BACK_OFF: Duration = Duration::from_secs(10);

impl Jobs {
    /// Recovers the jobs of an earlier gateway, and starts running the queue.
    pub fn start(self: &Arc<Self>) {
        if let Err(error) = self.recover() {
            tracing::error!("the jobs of before cannot be taken up: {error}");
        }
        let jobs = self.clone();
        tokio::spawn(async move {
            let mut stopping = jobs.stopping.subscribe();
            let mut waiting = HashSet::new();
            loop {
                jobs.fill(&mut waiting);
                tokio::select! {
                    () = jobs.look.notified() => {}
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                    _ = stopping.wait_for(|stopping| *stopping) => return,
                }
            }
        });
    }

    fn recover(self: &Arc<Self>) -> Result<(), crate::gateway::store::StoreError> {
        let store = self.store();
        for job in store.jobs_in(JobStatus::Running)? {
            store.move_job(&job.id, &[JobStatus::Running], JobStatus::Queued, None, now())?;
            self.say(&job.id, Level::Info, "The server was restarted; the job goes on.");
        }
        for job in store.jobs_in(JobStatus::Validating)? {
            self.validate(&job.id);
        }
        Ok(())
    }

    /// Starts the jobs that can start. `waiting` holds the jobs for which low memory was already
    /// logged.
    fn fill(self: &Arc<Self>, waiting: &mut HashSet<String>) {
        let queued = match self.store().jobs_in(JobStatus::Queued) {
            Ok(queued) => queued,
            Err(error) => return tracing::error!("the queue cannot be read: {error}"),
        };
        for job in queued {
            if self.live().len() >= self.config.jobs.max_running as usize {
                return;
            }
            // The job's earlier process may still be writing its checkpoint.
            if self.live().contains_key(&job.id) {
                continue;
            }
            if let Err(short) = self.fits_now(&job) {
                if waiting.insert(job.id.clone()) {
                    self.say(&job.id, Level::Warn, &short);
                }
                // Jobs behind it do not start first, or a large job would wait forever.
                return;
            }
            waiting.remove(&job.id);
            self.begin(job);
        }
    }

    fn fits_now(&self, job: &StoredJob) -> Result<(), String> {
        // If the order cannot be read, the job starts, and fails with the reason.
        let Ok(order) = self.folder(&job.id).order() else { return Ok(()) };
        let Ok(needs) = ResourceEstimate::of_order(&order) else { return Ok(()) };
        let available = available();
        match needs.memory <= available {
            true => Ok(()),
            false => Err(format!(
                "The job waits: it needs about {} of memory, and {} is available now.",
                ByteSize(needs.memory),
                ByteSize(available)
            )),
        }
    }

    fn begin(self: &Arc<Self>, job: StoredJob) {
        let id = job.id.clone();
        let wish = watch::Sender::new(DesiredState::Run);
        let live = Arc::new(Live { kind: job.kind.clone(), wish, progress: Default::default() });
        // Inserted before the status changes, so that a request to cancel a running job finds it
        // here.
        self.live().insert(id.clone(), live.clone());
        let moved =
            self.store().move_job(&id, &[JobStatus::Queued], JobStatus::Running, None, now());
        if !matches!(moved, Ok(true)) {
            self.live().remove(&id);
            return;
        }
        let jobs = self.clone();
        tokio::spawn(async move {
            jobs.drive(&job, &live).await;
            jobs.live().remove(&id);
            jobs.look.notify_one();
        });
    }

    /// Runs one process after another until the job has ended or should no longer run.
    async fn drive(self: &Arc<Self>, job: &StoredJob, live: &Arc<Live>) {
        let id = job.id.as_str();
        self.say(id, Level::Info, "The job started.");
        let (mut deaths, mut furthest) = (0, None);
        loop {
            let end = self.run_process(id, live).await;
            let step = super::lock(&live.progress).step.as_ref().map(|step| step.step);
            if step > furthest {
                (deaths, furthest) = (0, step);
            }
            let wish = *live.wish.borrow();
            match end {
                End::Done => return self.publish(job).await,
                _ if wish == DesiredState::Die => return self.cancelled(id),
                _ if *self.stopping.borrow() => return,
                // Also if the process was killed before it had written its checkpoint: the job
                // resumes from the previous one.
                _ if wish == DesiredState::Leave => {
                    return self.say(id, Level::Info, "The job was paused.");
                }
                End::Left => {}
                End::Died(why) if deaths + 1 >= DEATHS => {
                    let message = format!("The job's process died {DEATHS} times: {why}");
                    return self.fail(id, "process_died", &message);
                }
                End::DiskFull => {
                    let message = "The disk of the data folder is full: make room, then resume \
                                   the job; it goes on from its last checkpoint.";
                    return self.pause_for(id, "disk_full", message);
                }
                End::Waits(what) => return self.pause_for(id, &what.code, &what.message),
                End::Short(why) => return self.pause_for(id, "insufficient_memory", &why),
                End::Died(why) => {
                    deaths += 1;
                    tracing::warn!(job = id, "a job's process died: {why}");
                    let message = format!("The process died and is started again: {why}");
                    self.say(id, Level::Warn, &message);
                    let pause = Duration::from_millis(100) * 2u32.pow(deaths);
                    let mut stopping = self.stopping.subscribe();
                    tokio::select! {
                        () = tokio::time::sleep(pause.min(MAX_BACK_OFF)) => {}
                        _ = stopping.wait_for(|stopping| *stopping) => return,
                    }
                }
            }
        }
    }

    /// Pauses a job until a user resolves the problem and resumes it.
    fn pause_for(&self, id: &str, code: &str, message: &str) {
        let failure = Failure { code: code.into(), message: message.into(), param: None };
        let error = serde_json::to_string(&failure).unwrap_or_default();
        let (from, to) = ([JobStatus::Running], JobStatus::Paused);
        match self.store().move_job(id, &from, to, Some(&error), now()) {
            Ok(true) => self.say(id, Level::Error, message),
            // A client has changed the status in the meantime.
            Ok(false) => {
                let job = self.store().job(id).ok().flatten();
                if job.is_some_and(|job| job.status == JobStatus::Cancelled) {
                    self.cancelled(id);
                }
            }
            Err(error) => tracing::error!(job = id, "its status cannot be written: {error}"),
        }
    }

    pub(super) fn fail(&self, id: &str, code: &str, message: &str) {
        self.failed(id, &Failure { code: code.into(), message: message.into(), param: None });
    }

    pub(super) fn failed(&self, id: &str, failure: &Failure) {
        use JobStatus::{Failed, Paused, Queued, Running, Validating};
        let error = serde_json::to_string(failure).unwrap_or_default();
        let from = [Validating, Queued, Running, Paused];
        match self.store().move_job(id, &from, Failed, Some(&error), now()) {
            Ok(true) => {
                self.say(id, Level::Error, &format!("The job failed: {}", failure.message));
                self.tidy(id);
            }
            // The job was cancelled first.
            Ok(false) => {}
            Err(error) => tracing::error!(job = id, "its status cannot be written: {error}"),
        }
    }

    /// Asks every job process to exit, and waits for them. The jobs resume when the next gateway
    /// starts.
    pub async fn stop(&self) {
        self.stopping.send_replace(true);
        let live: Vec<_> = self.live().values().cloned().collect();
        for live in &live {
            live.wish.send_if_modified(|wish| {
                let runs = *wish == DesiredState::Run;
                if runs {
                    *wish = DesiredState::Leave;
                }
                runs
            });
        }
        drop(live);
        while !self.live().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
