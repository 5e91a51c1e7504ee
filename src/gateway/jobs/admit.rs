//! Creates jobs from specifications. Everything that can be checked beforehand is checked before
//! the job is stored.

use super::{Jobs, now};
use crate::config::ByteSize;
use crate::dataset::{DataError, DatasetKind, check};
use crate::gateway::error::ApiError;
use crate::gateway::memory::available;
use crate::gateway::registry::Trainable;
use crate::gateway::store::{JobStatus, StoredFile, StoredJob};
use crate::job::spec::Spec;
use crate::job::{
    BaseModel, Failure, InitAdapter, Level, Order, ResolveError, ResolvedJob, ResourceEstimate,
    Sources,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum number of queued jobs.
const MAX_WAITING: usize = 100;
/// `Retry-After` in seconds if there are too many queued jobs.
const RETRY_AFTER: u32 = 60;
/// Links to the data files in the job's folder.
pub(super) const TRAIN: &str = "train.data";
pub(super) const VALIDATION: &str = "validation.data";

/// A request to create a job.
#[derive(Debug, Clone)]
pub struct NewJob {
    pub spec: Spec,
    /// Owner of the job; the job's files must belong to this owner.
    pub owner: String,
    /// Whether the owner may use files of all owners.
    pub admin: bool,
    /// The request to the OpenAI endpoint as JSON.
    pub request: Option<String>,
}

/// Names of the parameters in the API that the client uses, for errors.
struct Params {
    train: &'static str,
    validation: &'static str,
}

const OPENAI: Params = Params { train: "training_file", validation: "validation_file" };
/// Name of the parameter for pairs labelled by people.
const HUMAN: &str = "data.human";
const ADMIN: Params = Params { train: "data.train", validation: "data.validation" };

impl NewJob {
    fn params(&self) -> &'static Params {
        if self.request.is_some() { &OPENAI } else { &ADMIN }
    }
}

impl Jobs {
    /// Creates a job: validates it, then queues it.
    ///
    /// # Errors
    /// 400 for an invalid specification, 404 for a model or file that does not exist, 422 with the
    /// estimate if the job can never fit this machine, 507 if the disk has no space.
    pub async fn create(self: &Arc<Self>, new: NewJob) -> Result<StoredJob, ApiError> {
        let jobs = self.clone();
        // Runs in its own task, so that a client that disconnects does not leave an incomplete job.
        let task = tokio::spawn(async move {
            let sources = jobs.sources(&new.spec).await?;
            jobs.check_policy(&new).await?;
            let admit = move || jobs.admit(new, sources);
            tokio::task::spawn_blocking(admit).await.map_err(ApiError::internal)?
        });
        let job = task.await.map_err(ApiError::internal)??;
        self.validate(&job.id);
        Ok(job)
    }

    /// Finds the models that a specification names.
    async fn sources(&self, spec: &Spec) -> Result<Sources, ApiError> {
        let mut sources = Sources::default();
        if let Some(name) = &spec.model {
            let Trainable { name, model, path, sha256, parent, adapter } =
                self.registry.trainable(name).await?;
            let adapter = adapter.map(|file| (name, file));
            sources.base = Some(BaseModel { name: model, path, sha256, parent, adapter });
        }
        if let Some(name) = spec.adapter.as_ref().and_then(|adapter| adapter.init.as_ref()) {
            let found = self.registry.trainable(name).await?;
            let path = found.adapter.ok_or_else(|| refused(&ResolveError::Init))?;
            sources.init = Some(InitAdapter { path, base: Some(found.model) });
        }
        if let Some(name) = spec.tokenizer_from() {
            sources.tokenizer = Some(self.registry.trainable(name).await?.path);
        }
        Ok(sources)
    }

    /// Checks that the models that a policy's job queries are loaded now.
    async fn check_policy(&self, new: &NewJob) -> Result<(), ApiError> {
        let models: Vec<(String, String, bool)> = {
            let task = &new.spec.task;
            if !task.settings().samples() {
                return Ok(());
            }
            let param = |key: &str| match &new.request {
                Some(_) => "method.reinforcement.grader".to_owned(),
                None => format!("{}.{key}", task.name()),
            };
            let models = task.settings().models().into_iter();
            models.map(|(key, name, scores)| (param(&key), name.to_owned(), scores)).collect()
        };
        if let Some(model) = &new.spec.model {
            // The base model generates the completions, so it must be loaded too.
            self.registry.find(model).await?;
        }
        for (param, model, scores) in &models {
            if self.config.jobs.remote_models.iter().any(|remote| remote.name == *model) {
                let why = match (new.admin, scores) {
                    (false, _) => {
                        "is a model of another server, which only the operator's jobs ask"
                    }
                    (true, true) => "is a model of another server, and no reward model",
                    (true, false) => continue,
                };
                return Err(ApiError::invalid(param, format!("{param}: `{model}` {why}.")));
            }
            let found = self.registry.find(model).await;
            let found = found.map_err(|error| error.with_param(param))?;
            let is = found.adapter.is_some_and(|adapter| adapter.is_reward_model());
            if is != *scores {
                let what = if *scores { "is no reward model" } else { "is a reward model" };
                let message = format!("{param}: `{model}` {what}.");
                return Err(ApiError::invalid(param, message));
            }
        }
        Ok(())
    }

    fn admit(&self, new: NewJob, sources: Sources) -> Result<StoredJob, ApiError> {
        let params = new.params();
        let NewJob { spec, owner, admin, request } = new;
        let waiting = self.store().jobs_in(JobStatus::Queued).map_err(ApiError::internal)?.len();
        if waiting >= MAX_WAITING {
            let message = format!("{waiting} jobs wait already; try again when some have run.");
            return Err(ApiError::too_many(message, RETRY_AFTER, "queue_full"));
        }
        spec.resolve().map_err(|why| refused(&ResolveError::Spec(why)))?;
        let file = |id: &str, param: &str| self.training_file(id, param, &owner, admin);
        let train = file(&spec.data.train, params.train)?;
        let validation =
            spec.data.validation.as_ref().map(|id| file(id, params.validation)).transpose()?;
        let human = spec.data.human.as_ref().map(|id| file(id, HUMAN)).transpose()?;
        let job = ResolvedJob::new(spec, sources).map_err(|error| refused(&error))?;
        if let Some(name) = &job.spec.name
            && self.registry.card(name).is_ok()
        {
            let message = format!("`{name}` is the name of another model; choose a new one.");
            return Err(ApiError::invalid("name", message));
        }
        self.check_room(&job.estimate)?;
        let id = new_id("ftjob-");
        let mut order = job.order(id.clone(), PathBuf::new(), None);
        self.lay_out(&mut order, &train, validation.as_ref(), human.as_ref())?;
        let job = StoredJob {
            id: id.clone(),
            kind: order.spec.task.name().to_owned(),
            status: JobStatus::Validating,
            spec: serde_json::to_string(&order.spec).map_err(ApiError::internal)?,
            request,
            name: order.name,
            owner,
            created_at: now(),
            started_at: None,
            finished_at: None,
            error: None,
            trained_tokens: None,
        };
        self.store().put_job(&job).map_err(ApiError::internal)?;
        Ok(job)
    }

    fn training_file(
        &self,
        id: &str,
        param: &str,
        owner: &str,
        admin: bool,
    ) -> Result<StoredFile, ApiError> {
        let found = self.store().file(id).map_err(ApiError::internal)?;
        let found = found.filter(|file| admin || file.owner == owner);
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

    fn check_room(&self, estimate: &ResourceEstimate) -> Result<(), ApiError> {
        // Memory of running jobs will be free when they end.
        let running: u64 = self.running().iter().map(|sample| sample.memory_bytes).sum();
        let memory = available().saturating_add(running);
        let disk = rustix::fs::statvfs(self.store().folder()).map_err(ApiError::internal)?;
        fits(estimate, memory, disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    /// Creates the job's folder. Files are hard-linked into it, so the originals may be deleted
    /// later.
    fn lay_out(
        &self,
        order: &mut Order,
        train: &StoredFile,
        validation: Option<&StoredFile>,
        human: Option<&StoredFile>,
    ) -> Result<(), ApiError> {
        let folder = self.folder(&order.id);
        std::fs::create_dir_all(folder.path()).map_err(ApiError::disk)?;
        let keep = |from: PathBuf, name: &str| -> Result<PathBuf, ApiError> {
            let to = folder.path().join(name);
            keep(&from, &to).map_err(ApiError::disk)?;
            Ok(to)
        };
        let files = self.store().files_folder();
        order.train = keep(files.join(&train.id), TRAIN)?;
        order.validation =
            validation.map(|file| keep(files.join(&file.id), VALIDATION)).transpose()?;
        order.human = human.map(|file| keep(files.join(&file.id), "human.jsonl")).transpose()?;
        order.init = match order.init.take() {
            Some(path) if path.is_dir() => {
                let folder = folder.path().join("init");
                std::fs::create_dir_all(&folder).map_err(ApiError::disk)?;
                for name in ["adapter_config.json", "adapter_model.safetensors"] {
                    keep(path.join(name), &format!("init/{name}"))?;
                }
                Some(folder)
            }
            Some(path) => Some(keep(path, "init.gguf")?),
            None => None,
        };
        folder.create(order).map_err(ApiError::disk)?;
        self.say(&order.id, Level::Info, &format!("Created fine-tuning job: {}", order.id));
        Ok(())
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
        let failure = |param: &str, error: &dyn std::fmt::Display| Failure {
            code: format!("invalid_{param}"),
            message: format!("The {} cannot be used: {error}.", param.replace('_', " ")),
            param: Some(param.to_owned()),
        };
        let order = self.folder(id).order().map_err(|error| failure("training_file", &error))?;
        let Some(dataset) = order.spec.task.settings().dataset() else { return Ok(()) };
        let stored = self.store().job(id).ok().flatten();
        let openai = stored.is_some_and(|job| job.request.is_some());
        let least = if openai { super::LEAST_EXAMPLES } else { 1 };
        let look = |path: &Path, param: &str, least: u64| -> Result<(), Failure> {
            check(path, dataset, least).map(drop).map_err(|error: DataError| failure(param, &error))
        };
        look(&order.train, OPENAI.train, least)?;
        if let Some(path) = &order.human {
            let checked = check(path, DatasetKind::Preference, 1).map(drop);
            checked.map_err(|error: DataError| failure(HUMAN, &error))?;
        }
        order.validation.map_or(Ok(()), |path| look(&path, OPENAI.validation, 1))
    }
}

/// Checks that this machine has the memory and disk space that a job needs.
pub fn fits(needs: &ResourceEstimate, memory: u64, disk: u64) -> Result<(), ApiError> {
    if needs.memory > memory {
        return Err(ApiError::unprocessable(format!(
            "The job needs about {} of memory, but {} is available: use a smaller max_length or \
             micro_batch, activation_checkpointing, a smaller model, or an adapter instead of all \
             weights ({} numbers would be trained).",
            ByteSize(needs.memory),
            ByteSize(memory),
            needs.trained
        ))
        .with_code("insufficient_memory"));
    }
    if needs.disk > disk {
        let message = format!(
            "The job needs about {} on the disk of the data folder for its checkpoints, but {} are \
             free: make room, or train an adapter of lower rank.",
            ByteSize(needs.disk),
            ByteSize(disk)
        );
        let status = http::StatusCode::INSUFFICIENT_STORAGE;
        return Err(ApiError::new(status, "server_error", message).with_code("disk_full"));
    }
    Ok(())
}

/// Hard-links a file, or copies it where the system does not allow links.
fn keep(from: &Path, to: &Path) -> std::io::Result<()> {
    let _ = std::fs::remove_file(to);
    std::fs::hard_link(from, to).or_else(|_| std::fs::copy(from, to).map(drop))
}

/// 422 for a model that cannot be trained, else 400 with the wrong key.
fn refused(error: &ResolveError) -> ApiError {
    let message = format!("{error}.");
    let refused = match error {
        ResolveError::Model(_) => ApiError::unprocessable(message),
        _ => ApiError::bad_request(message),
    };
    match error.param() {
        Some(param) => refused.with_param(param),
        None => refused,
    }
}

/// A unique id that cannot be guessed.
pub(in crate::gateway) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:024x}", rand::random::<u128>() >> 32)
}
