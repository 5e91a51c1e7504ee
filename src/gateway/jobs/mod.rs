//! Jobs: creation, queue, processes and publication.
//!
//! The store holds each job's description and status, and the job's folder holds its results
//! ([`crate::job`]). This module only connects the two. If the gateway is killed, the next one
//! finds all jobs: those that were running are queued again and resume from their last checkpoint.
//!
//! | file | content |
//! |---|---|
//! | `admit/` | from a specification to a stored job and its folder |
//! | `queue.rs` | which job runs when |
//! | `process.rs` | runs and watches one job process |
//! | `throttle.rs` | pauses jobs while requests run |
//! | `publish.rs` | publishes the models and files that a job produced |

mod admit;
mod process;
mod publish;
mod queue;
#[cfg(test)]
mod tests;
mod throttle;

pub(in crate::gateway) use admit::new_id;
pub use admit::{NewJob, Requester, fits};
pub use publish::{checkpoint_name, rows};

use crate::config::ServeConfig;
use crate::gateway::error::ApiError;
use crate::gateway::metrics::{JobSample, JobSamples};
use crate::gateway::registry::Registry;
use crate::gateway::store::{JobStatus, Store, StoredJob};
use crate::job::{Entry, EventLog, Folder, Follower, JobEvent, Level, StepMetrics, Validation};
use process::DesiredState;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{Notify, watch};

/// A process that has not exited after this time is killed; its job resumes from a checkpoint all
/// the same.
const LEAVE_PATIENCE: Duration = Duration::from_secs(20);

/// The jobs of a gateway.
pub struct Jobs {
    config: Arc<ServeConfig>,
    registry: Arc<Registry>,
    /// Jobs whose process runs or is being started.
    live: Mutex<HashMap<String, Arc<Live>>>,
    /// Wakes the task that runs the queue.
    look: Notify,
    stopping: watch::Sender<bool>,
    /// Takes the connections of processes that are started.
    connections: UnboundedSender<JobConnection>,
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").finish_non_exhaustive()
    }
}

/// The gateway's end of the socket over which a job's process calls it (see [`crate::job::rollout`]).
#[derive(Debug)]
pub struct JobConnection {
    pub job: String,
    /// The model that the job trains.
    pub base: String,
    pub socket: UnixStream,
}

/// A job whose process runs.
struct Live {
    kind: String,
    wish: watch::Sender<DesiredState>,
    progress: Mutex<Progress>,
}

/// The latest events of a job.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub step: Option<StepMetrics>,
    pub validation: Option<Validation>,
    /// Work done and the whole of it, of jobs that do not train.
    pub work: Option<(u64, u64)>,
}

impl Progress {
    fn take(&mut self, entries: &[Entry]) {
        for entry in entries {
            match &entry.event {
                JobEvent::Step(step) => self.step = Some(step.clone()),
                JobEvent::Validation(found) => self.validation = Some(found.clone()),
                JobEvent::Progress { done, total } => self.work = Some((*done, *total)),
                _ => {}
            }
        }
    }
}

impl Jobs {
    /// The jobs of the registry's store. [`Jobs::start`] starts them. The connection of each
    /// process is sent to `connections`.
    pub fn new(
        config: Arc<ServeConfig>,
        registry: Arc<Registry>,
        connections: UnboundedSender<JobConnection>,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            registry,
            live: Mutex::default(),
            look: Notify::new(),
            stopping: watch::Sender::new(false),
            connections,
        })
    }

    pub fn store(&self) -> &Arc<Store> {
        self.registry.store()
    }

    /// The folder of a job.
    pub fn folder(&self, id: &str) -> Folder {
        Folder::new(self.store().jobs_folder().join(id))
    }

    /// A job that `owner` may see; `None` may see all jobs.
    ///
    /// # Errors
    /// 404 if there is no such job.
    pub fn get(&self, id: &str, owner: Option<&str>) -> Result<StoredJob, ApiError> {
        let found = self.store().job(id).map_err(ApiError::internal)?;
        found.filter(|job| owner.is_none_or(|owner| job.owner == owner)).ok_or_else(|| {
            let id: String = id.chars().take(100).collect();
            ApiError::not_found(format!("There is no job `{id}`.")).with_code("job_not_found")
        })
    }

    /// The latest metrics of a job.
    ///
    /// # Errors
    /// 500 if the job's folder cannot be read.
    pub fn progress(&self, id: &str) -> Result<Progress, ApiError> {
        if let Some(live) = self.live().get(id) {
            return Ok(lock(&live.progress).clone());
        }
        let mut progress = Progress::default();
        progress.take(&self.events(id)?);
        Ok(progress)
    }

    /// All events of a job.
    ///
    /// # Errors
    /// 500 if the job's folder cannot be read.
    pub fn events(&self, id: &str) -> Result<Vec<Entry>, ApiError> {
        Follower::new(self.folder(id).events(), 0).read().map_err(ApiError::internal)
    }

    /// The values shown in `/metrics`.
    pub fn samples(&self) -> JobSamples {
        let counts = self.store().job_counts().unwrap_or_else(|error| {
            tracing::error!("the jobs cannot be counted: {error}");
            Vec::new()
        });
        JobSamples { counts, running: self.running() }
    }

    fn running(&self) -> Vec<JobSample> {
        let sample = |(id, live): (&String, &Arc<Live>)| {
            let Progress { step, validation, .. } = lock(&live.progress).clone();
            let validation_loss = validation.as_ref().and_then(|found| found.loss);
            let validation_reward = validation.as_ref().and_then(Validation::reward);
            let names = JobSample { id: id.clone(), kind: live.kind.clone(), ..Default::default() };
            step.map_or(names.clone(), |step| JobSample {
                step: step.step,
                total_steps: step.total_steps,
                tokens: step.tokens,
                memory_bytes: step.memory_bytes,
                epoch: step.epoch,
                loss: step.loss,
                validation_loss,
                reward: step.reward(),
                validation_reward,
                learning_rate: step.learning_rate,
                grad_norm: step.grad_norm,
                tokens_per_second: step.tokens_per_second,
                eta_seconds: step.eta_seconds,
                ..names
            })
        };
        self.live().iter().map(sample).collect()
    }

    /// Cancels a job. Its artifacts and checkpoints are kept, but not published.
    ///
    /// # Errors
    /// 404, or 400 if it has ended already.
    pub fn cancel(&self, id: &str, owner: Option<&str>) -> Result<StoredJob, ApiError> {
        use JobStatus::{Paused, Queued, Running, Validating};
        let from = [Validating, Queued, Running, Paused];
        self.change(id, owner, &from, JobStatus::Cancelled, "cancelled")?;
        match self.live().get(id) {
            Some(live) => drop(live.wish.send_replace(DesiredState::Die)),
            None => self.cancelled(id),
        }
        self.get(id, owner)
    }

    /// Pauses a job: a running job writes a checkpoint and exits, a queued job leaves the queue.
    ///
    /// # Errors
    /// 404, or 400 if it is neither running nor queued.
    pub fn pause(&self, id: &str, owner: Option<&str>) -> Result<StoredJob, ApiError> {
        let from = [JobStatus::Queued, JobStatus::Running];
        self.change(id, owner, &from, JobStatus::Paused, "paused")?;
        match self.live().get(id) {
            Some(live) => drop(live.wish.send_replace(DesiredState::Leave)),
            None => self.say(id, Level::Info, "The job was paused."),
        }
        self.get(id, owner)
    }

    /// Queues a paused job again.
    ///
    /// # Errors
    /// 404, or 400 if it is not paused.
    pub fn resume(&self, id: &str, owner: Option<&str>) -> Result<StoredJob, ApiError> {
        self.change(id, owner, &[JobStatus::Paused], JobStatus::Queued, "resumed")?;
        // While the job's process is still exiting, only that process may write to the event log.
        if !self.live().contains_key(id) {
            self.say(id, Level::Info, "The job was queued again.");
        }
        self.look.notify_one();
        self.get(id, owner)
    }

    /// Has a job end training after its current step and publish what it has learned. A paused job
    /// is queued again for this.
    ///
    /// # Errors
    /// 404, or 400 if it does not train, has ended, or has not completed a step.
    pub fn finish(&self, id: &str, owner: Option<&str>) -> Result<StoredJob, ApiError> {
        use JobStatus::{Paused, Queued, Running};
        let job = self.get(id, owner)?;
        let refuse = |why: String| Err(ApiError::bad_request(why).with_code("invalid_job_status"));
        if !matches!(job.status, Queued | Running | Paused) {
            return refuse(format!(
                "The job `{id}` is {}; it cannot be finished.",
                job.status.name()
            ));
        }
        if ["quantize", "evaluate"].contains(&&*job.kind) {
            return refuse(format!(
                "The job `{id}` is of the kind `{}`, which has no steps after which it could be \
                 finished: wait for its end, or cancel it.",
                job.kind
            ));
        }
        if self.progress(id)?.step.is_none() {
            return refuse(format!(
                "The job `{id}` has not completed a step, so there is nothing to keep: wait for its \
                 first step, or cancel it."
            ));
        }
        self.folder(id).ask_to_finish().map_err(ApiError::internal)?;
        if job.status == Paused {
            self.change(id, owner, &[Paused], Queued, "finished")?;
            self.look.notify_one();
        }
        self.get(id, owner)
    }

    fn change(
        &self,
        id: &str,
        owner: Option<&str>,
        from: &[JobStatus],
        to: JobStatus,
        verb: &str,
    ) -> Result<(), ApiError> {
        let job = self.get(id, owner)?;
        match self.store().move_job(id, from, to, None, now()).map_err(ApiError::internal)? {
            true => Ok(()),
            false => Err(ApiError::bad_request(format!(
                "The job `{id}` is {}; it cannot be {verb}.",
                self.get(id, owner).map_or(job.status, |job| job.status).name()
            ))
            .with_code("invalid_job_status")),
        }
    }

    /// Logs that the job was cancelled, and deletes its temporary files.
    fn cancelled(&self, id: &str) {
        self.say(id, Level::Info, "The job was cancelled.");
        self.tidy(id);
    }

    /// Deletes what a job does not need after its end: its links to data files, whose originals the
    /// owner may have deleted, the tokenized data, and files that a killed process was writing.
    fn tidy(&self, id: &str) {
        let folder = self.folder(id);
        for entry in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == admit::DATA) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
        let _ = std::fs::remove_dir_all(folder.cache());
        for entry in std::fs::read_dir(folder.artifacts()).into_iter().flatten().flatten() {
            // Complete artifacts have other names.
            let name = entry.file_name();
            if name.as_encoded_bytes().starts_with(b".")
                || name.as_encoded_bytes().ends_with(b".part")
            {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Adds a message to a job's events, while no job process writes them.
    fn say(&self, id: &str, level: Level, message: &str) {
        let said =
            EventLog::open(&self.folder(id).events()).and_then(|mut log| log.say(level, message));
        if let Err(error) = said {
            tracing::error!(job = id, "an event cannot be written: {error}");
        }
    }

    fn live(&self) -> MutexGuard<'_, HashMap<String, Arc<Live>>> {
        lock(&self.live)
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    crate::job::now() as i64
}

/// Locks the mutex. Poisoning is ignored: it only means that another thread panicked between two
/// plain assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
