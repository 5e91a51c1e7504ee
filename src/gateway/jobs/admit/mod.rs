//! Creates jobs from specifications. Everything that can be checked beforehand is checked before
//! the job is stored.
//!
//! | file | content |
//! |---|---|
//! | `train.rs` | jobs that train |
//! | `models.rs` | jobs that quantize or evaluate models |

mod models;
mod train;

use super::{Jobs, now};
use crate::config::ByteSize;
use crate::gateway::error::ApiError;
use crate::gateway::memory::available;
use crate::gateway::store::{JobStatus, StoredFile, StoredJob};
use crate::job::{Failure, JobOrder, JobSpec, Level, ResourceEstimate};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum number of queued jobs.
const MAX_WAITING: usize = 100;
/// `Retry-After` in seconds if there are too many queued jobs.
const RETRY_AFTER: u32 = 60;
/// Extension of the links to data files in the job's folder.
pub(super) const DATA: &str = "data";

/// A request to create a job.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub spec: JobSpec,
    pub requester: Requester,
}

/// Who asks for a job.
#[derive(Debug, Clone)]
pub struct Requester {
    /// Owner of the job; the job's files must belong to this owner.
    pub owner: String,
    /// Whether the owner may use files of all owners.
    pub admin: bool,
    /// The request to the OpenAI endpoint as JSON.
    pub request: Option<String>,
}

impl Jobs {
    /// Creates a job: validates it, then queues it.
    ///
    /// # Errors
    /// 400 for an invalid specification, 404 for a model or file that does not exist, 422 with the
    /// estimate if the job can never fit this machine, 507 if the disk has no space.
    pub async fn create(self: &Arc<Self>, new: NewJob) -> Result<StoredJob, ApiError> {
        let jobs = self.clone();
        let NewJob { spec, requester } = new;
        // Runs in its own task, so that a client that disconnects does not leave an incomplete job.
        let task = tokio::spawn(async move {
            jobs.check_queue()?;
            match spec {
                JobSpec::Train(spec) => jobs.admit_training(*spec, requester).await,
                JobSpec::Quantize(spec) => jobs.admit_quantization(spec, requester).await,
                JobSpec::Evaluate(spec) => jobs.admit_evaluation(spec, requester).await,
            }
        });
        let job = task.await.map_err(ApiError::internal)??;
        self.validate(&job.id);
        Ok(job)
    }

    fn check_queue(&self) -> Result<(), ApiError> {
        let waiting = self.store().jobs_in(JobStatus::Queued).map_err(ApiError::internal)?.len();
        match waiting < MAX_WAITING {
            true => Ok(()),
            false => {
                let message = format!("{waiting} jobs wait already; try again when some have run.");
                Err(ApiError::too_many(message, RETRY_AFTER, "queue_full"))
            }
        }
    }

    /// Writes the order into the job's folder, and lists the job. `created` is the first event.
    fn put(
        &self,
        order: &JobOrder,
        requester: Requester,
        created: &str,
    ) -> Result<StoredJob, ApiError> {
        self.folder(order.id()).create(order).map_err(ApiError::disk)?;
        self.say(order.id(), Level::Info, created);
        let job = StoredJob {
            id: order.id().to_owned(),
            kind: order.kind().to_owned(),
            status: JobStatus::Validating,
            spec: order.spec().map_err(ApiError::internal)?.to_string(),
            request: requester.request,
            name: order.name().to_owned(),
            owner: requester.owner,
            created_at: now(),
            started_at: None,
            finished_at: None,
            error: None,
            trained_tokens: None,
        };
        self.store().put_job(&job).map_err(ApiError::internal)?;
        Ok(job)
    }

    /// Checks that no other model has or will have the name of the one that the job makes.
    fn check_new_name(&self, name: &str) -> Result<(), ApiError> {
        let stored = self.store().model(name).map_err(ApiError::internal)?.is_some()
            || self.store().adapter(name).map_err(ApiError::internal)?.is_some();
        let taken = |by: &str| {
            Err(ApiError::invalid("name", format!("`{name}` is {by}; choose a new name.")))
        };
        if self.registry.is_published(name) {
            return taken("a published name");
        }
        if stored || self.registry.card(name).is_ok() {
            return taken("the name of another model");
        }
        match self.store().job_making(name).map_err(ApiError::internal)? {
            Some(job) => taken(&format!("the name of the model that the job `{}` makes", job.id)),
            None => Ok(()),
        }
    }

    /// An uploaded file that the requester may use.
    fn data_file(
        &self,
        id: &str,
        param: &str,
        requester: &Requester,
    ) -> Result<StoredFile, ApiError> {
        let found = self.store().file(id).map_err(ApiError::internal)?;
        let found = found.filter(|file| requester.admin || file.owner == requester.owner);
        let shown: String = id.chars().take(100).collect();
        let Some(file) = found else {
            return Err(ApiError::invalid(
                param,
                format!("There is no file `{shown}`: upload it to /v1/files, and name its id."),
            )
            .with_code("file_not_found"));
        };
        match file.purpose.as_str() {
            "fine-tune" => Ok(file),
            other => Err(ApiError::invalid(
                param,
                format!("The file `{shown}` is for `{other}`: upload it with purpose `fine-tune`."),
            )),
        }
    }

    /// Links a file into a job's folder, so that the original may be deleted later.
    fn keep(&self, id: &str, from: &Path, name: &str) -> Result<PathBuf, ApiError> {
        let to = self.folder(id).path().join(name);
        let folder = to.parent().unwrap_or(&to);
        std::fs::create_dir_all(folder).map_err(ApiError::disk)?;
        let _ = std::fs::remove_file(&to);
        // A copy where the system does not allow links.
        let kept = std::fs::hard_link(from, &to).or_else(|_| std::fs::copy(from, &to).map(drop));
        kept.map(|()| to).map_err(ApiError::disk)
    }

    /// Links an uploaded file into a job's folder.
    fn keep_data(&self, id: &str, file: &StoredFile, name: &str) -> Result<PathBuf, ApiError> {
        self.keep(id, &self.store().files_folder().join(&file.id), &format!("{name}.{DATA}"))
    }

    fn check_room(&self, estimate: &ResourceEstimate) -> Result<(), ApiError> {
        // Memory of running jobs will be free when they end.
        let running: u64 = self.running().iter().map(|sample| sample.memory_bytes).sum();
        let memory = available().saturating_add(running);
        let disk = rustix::fs::statvfs(self.store().folder()).map_err(ApiError::internal)?;
        fits(estimate, memory, disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// Reads a job's files in the background, then queues the job or marks it as failed.
    pub(super) fn validate(self: &Arc<Self>, id: &str) {
        let (jobs, id) = (self.clone(), id.to_owned());
        tokio::task::spawn_blocking(move || {
            jobs.say(&id, Level::Info, "Validating the files.");
            match jobs.check_files(&id) {
                Ok(()) => {
                    let from = [JobStatus::Validating];
                    let moved = jobs.store().move_job(&id, &from, JobStatus::Queued, None, now());
                    if matches!(moved, Ok(true)) {
                        jobs.say(&id, Level::Info, "Files validated; the job is queued.");
                    }
                    jobs.look.notify_one();
                }
                Err(failure) => jobs.failed(&id, &failure),
            }
        });
    }

    fn check_files(&self, id: &str) -> Result<(), Failure> {
        let order = self.folder(id).order().map_err(|error| Failure {
            code: "io_error".into(),
            message: format!("The job's order cannot be read: {error}."),
            param: None,
        })?;
        match &order {
            JobOrder::Train(order) => self.check_training_files(order),
            JobOrder::Quantize(_) => Ok(()),
            JobOrder::Evaluate(order) => self.check_evaluation_files(order),
        }
    }
}

/// Checks that this machine has the memory and disk space that a job needs.
pub fn fits(needs: &ResourceEstimate, memory: u64, disk: u64) -> Result<(), ApiError> {
    if needs.memory > memory {
        let what = match needs.trained {
            0 => "use a smaller model, or unload another one".to_owned(),
            trained => format!(
                "use a smaller max_length or micro_batch, activation_checkpointing, a smaller model, \
                 or an adapter instead of all weights ({trained} numbers would be trained)"
            ),
        };
        return Err(ApiError::unprocessable(format!(
            "The job needs about {} of memory, but {} is available: {what}.",
            ByteSize(needs.memory),
            ByteSize(memory),
        ))
        .with_code("insufficient_memory"));
    }
    if needs.disk > disk {
        let what = match needs.trained {
            0 => "make room",
            _ => "make room, or train an adapter of lower rank",
        };
        let message = format!(
            "The job needs about {} on the disk of the data folder for what it writes, but {} are \
             free: {what}.",
            ByteSize(needs.disk),
            ByteSize(disk)
        );
        let status = http::StatusCode::INSUFFICIENT_STORAGE;
        return Err(ApiError::new(status, "server_error", message).with_code("disk_full"));
    }
    Ok(())
}

/// A unique id that cannot be guessed.
pub(in crate::gateway) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:024x}", rand::random::<u128>() >> 32)
}
