//! Runs a job, from its order to its outcome.

use super::policy::AdapterFile;
use super::reporter::Reporter;
use super::{artifacts, data, init, policy};
use crate::gguf::{Gguf, ModelFacts};
use crate::job::spec::for_task;
use crate::job::{Artifact, Control, EventLog, Failure, Folder, Level, Order, Outcome};
use crate::tokenizer::native::NativeTokenizer;
use crate::train::checkpoint::Checkpoints;
use crate::train::export::ExportError;
use crate::train::recipes::{self, Job, Making, Policy, Recipe, TrainError};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// File of a new model with its initial, random weights.
const FRESH: &str = "fresh.gguf";
/// How long to wait for an earlier process of the same job to exit.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a job process ended without an outcome.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("the disk is full: {0}")]
    DiskFull(String),
    /// The job waits for something outside of it, which the folder names.
    #[error("{0}")]
    Waits(String),
    #[error("another process works on this job")]
    Busy,
    #[error("the job's folder: {0}")]
    Folder(#[from] io::Error),
}

/// Why the job failed or waits, or that the disk was full.
pub(super) enum JobFailure {
    Failed(Failure),
    Waits(Failure),
    DiskFull(String),
}

pub(super) fn failed(
    code: &str,
    param: Option<&str>,
    message: impl std::fmt::Display,
) -> JobFailure {
    let param = param.map(str::to_owned);
    JobFailure::Failed(Failure { code: code.into(), message: message.to_string(), param })
}

/// Classifies an error: `DiskFull` if any error in its source chain is a lack of space, else a
/// failure with this code.
pub(super) fn classify(
    code: &str,
    param: Option<&str>,
    error: &(dyn Error + 'static),
) -> JobFailure {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        {
            return JobFailure::DiskFull(error.to_string());
        }
        cause = error.source();
    }
    failed(code, param, error)
}

macro_rules! classified {
    ($($error:ty => $code:literal),* $(,)?) => {
        $(impl From<$error> for JobFailure {
            fn from(error: $error) -> Self {
                classify($code, None, &error)
            }
        })*
    };
}

impl From<TrainError> for JobFailure {
    fn from(error: TrainError) -> Self {
        match error {
            TrainError::Spec(why) => failed("invalid_spec", None, why),
            TrainError::Grader { param, message } => failed("invalid_grader", Some(param), message),
            error => match error.waits_for() {
                Some(code) => JobFailure::Waits(Failure {
                    code: code.into(),
                    message: format!("{error}. The job goes on from here when it is resumed."),
                    param: None,
                }),
                None => classify("training_failed", None, &error),
            },
        }
    }
}

classified! {
    io::Error => "io_error",
    ExportError => "export_failed",
    candle_core::Error => "training_failed",
    crate::train::checkpoint::CheckpointError => "checkpoint_failed",
    crate::gguf::GgufError => "invalid_model",
}

/// Carries out the order, from the last checkpoint if there is one. `true`: the job has ended and
/// its folder holds the outcome. `false`: `control` stopped it.
///
/// # Errors
/// [`JobError`]; when started again, the job resumes from its last checkpoint.
pub fn run(folder: &Folder, control: &Control) -> Result<bool, JobError> {
    let _lock = lock(folder.path())?;
    if folder.outcome()?.is_some() {
        tidy(folder);
        return Ok(true);
    }
    let order = folder.order()?;
    let mut log = EventLog::open(&folder.events())?;
    let outcome = match for_task!(&order.spec.task, recipe => train(recipe, folder, &order, &mut log, control))
    {
        Ok(None) => return Ok(false),
        Ok(Some((trained_tokens, artifacts))) => Outcome::Succeeded { trained_tokens, artifacts },
        Err(JobFailure::DiskFull(message)) => return Err(JobError::DiskFull(message)),
        Err(JobFailure::Waits(what)) => {
            folder.wait_for(&what).map_err(folder_error)?;
            return Err(JobError::Waits(what.message));
        }
        Err(JobFailure::Failed(failure)) => Outcome::Failed(failure),
    };
    folder.end(&outcome).map_err(folder_error)?;
    tidy(folder);
    Ok(true)
}

fn folder_error(error: io::Error) -> JobError {
    match classify("", None, &error) {
        JobFailure::DiskFull(message) => JobError::DiskFull(message),
        JobFailure::Failed(_) | JobFailure::Waits(_) => JobError::Folder(error),
    }
}

/// Deletes files that a job does not need after its end. The adapters of its checkpoints are kept.
fn tidy(folder: &Folder) {
    let _ = fs::remove_dir_all(folder.cache());
    let _ = fs::remove_file(folder.path().join(FRESH));
    for entry in fs::read_dir(folder.checkpoints()).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Locks the folder; the lock is held while the file is open.
fn lock(folder: &Path) -> Result<File, JobError> {
    let file = File::create(folder.join("lock"))?;
    let start = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::WOULDBLOCK) => return Err(JobError::Busy),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}

/// Trains and writes the artifacts. Returns the number of trained tokens, and the artifacts; `None`
/// if it was stopped.
fn train<R: Recipe>(
    recipe: &R,
    folder: &Folder,
    order: &Order,
    log: &mut EventLog,
    control: &Control,
) -> Result<Option<(u64, Vec<Artifact>)>, JobFailure> {
    let spec = &order.spec;
    let settings = spec.resolve().map_err(|why| failed("invalid_spec", None, why))?;
    let base = base(recipe, folder, order, log)?;
    let tokenizer = NativeTokenizer::from_gguf(&base);
    let tokenizer = Arc::new(tokenizer.map_err(|why| failed("invalid_model", None, why))?);
    let data = data::read(recipe, folder, order, &base, tokenizer.clone(), &settings, log)?;
    let context = ModelFacts::read(&base)?.n_ctx_train as usize;
    let training = init::training(folder, order, &base)?;
    let model = init::model(recipe, folder, order, &base, &training, settings.max_length)?;
    let client = policy::connect(spec)?;
    let adapter = AdapterFile::new(&order.id, &folder.cache());
    let export = policy::exporter(&model, &training, order);
    let policy =
        client.as_ref().map(|client| Policy { client, export: &export, adapter: adapter.path() });
    let job = Job {
        model: &model,
        settings: &settings,
        train: &data.train,
        validation: data.validation.as_ref(),
        checkpoints: &Checkpoints::new(&folder.checkpoints(), settings.keep_checkpoints)?,
        tokenizer: tokenizer.as_ref(),
        seed: spec.seed,
        shuffle: spec.data.shuffle.then_some(spec.seed),
        reference: &folder.reference(),
        policy,
        making: Making {
            encoder: &data.encoder,
            model_name: spec.model.as_deref().unwrap_or_default(),
            context,
            folder: &folder.made(),
            cache: &folder.cache(),
            human: order.human.as_deref(),
        },
    };
    let mut reporter = Reporter::new(folder, order, &model, &training, log);
    let ended = recipe.run(&job, control, &mut |event| reporter.tell(event, control));
    reporter.finish()?;
    let recipes::Outcome::Done { tokens } = ended? else { return Ok(None) };
    log.say(Level::Info, "Training is over; writing what was made.")?;
    log.sync()?;
    let made = artifacts::artifacts(folder, order, &model, &training, &base, log)?;
    Ok(Some((tokens, made)))
}

/// The model to train. A model that the order does not name is written first.
fn base(
    recipe: &impl Recipe,
    folder: &Folder,
    order: &Order,
    log: &mut EventLog,
) -> Result<Arc<Gguf>, JobFailure> {
    if let Some(path) = &order.model {
        return Ok(Arc::new(Gguf::open(path)?));
    }
    let path = folder.path().join(FRESH);
    if !path.exists() {
        log.say(Level::Info, "Making the tokenizer and the first weights.")?;
    }
    recipe.create_model(order, &path)?;
    Ok(Arc::new(Gguf::open(&path)?))
}
