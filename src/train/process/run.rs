//! Runs a job, from its order to its outcome.

use super::data::{self, Data};
use super::gateway_client::GatewayClient;
use super::reporter::Reporter;
use super::{artifacts, init};
use crate::gguf::Gguf;
use crate::grade::Grader;
use crate::job::spec::Kind;
use crate::job::{Artifact, EventLog, Failure, Folder, Level, Order, Outcome};
use crate::tokenizer::native::NativeTokenizer;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::PreparedPrompts;
use crate::train::export::{self, ExportError};
use crate::train::model::{Model, Training};
use crate::train::recipes::{
    self, GrpoTrainer, Objective, PreferenceTrainer, Pretrain, Sft, TrainError,
};
use candle_core::Device;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::cell::RefCell;
use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// File of a new model with its initial, random weights.
const FRESH: &str = "fresh.gguf";
/// Error message if a policy's job has no gateway.
const ALONE: &str = "a job of this kind samples from the served model: give it to a server \
                     (`ingot train SPEC --url URL`)";
/// How long to wait for an earlier process of the same job to exit.
const PATIENCE: Duration = Duration::from_secs(60);
/// Why a job process ended without an outcome.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("the disk is full: {0}")]
    DiskFull(String),
    #[error("another process works on this job")]
    Busy,
    #[error("the job's folder: {0}")]
    Folder(#[from] io::Error),
}

/// Why the job failed, or that the disk was full.
pub(super) enum JobFailure {
    Failed(Failure),
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

classified! {
    io::Error => "io_error",
    TrainError => "training_failed",
    ExportError => "export_failed",
    candle_core::Error => "training_failed",
    crate::train::checkpoint::CheckpointError => "checkpoint_failed",
    crate::gguf::GgufError => "invalid_model",
}

/// Carries out the order, from the last checkpoint if there is one. `true`: the job has ended and
/// its folder holds the outcome. `false`: `stop` was set.
///
/// # Errors
/// [`JobError`]; when started again, the job resumes from its last checkpoint.
pub fn run(folder: &Folder, stop: &AtomicBool) -> Result<bool, JobError> {
    let _lock = lock(folder.path())?;
    if folder.outcome()?.is_some() {
        tidy(folder);
        return Ok(true);
    }
    let order = folder.order()?;
    let mut log = EventLog::open(&folder.events())?;
    let outcome = match work(folder, &order, &mut log, stop) {
        Ok(None) => return Ok(false),
        Ok(Some((trained_tokens, artifacts))) => Outcome::Succeeded { trained_tokens, artifacts },
        Err(JobFailure::DiskFull(message)) => return Err(JobError::DiskFull(message)),
        Err(JobFailure::Failed(failure)) => Outcome::Failed(failure),
    };
    folder.end(&outcome).map_err(|error| match classify("", None, &error) {
        JobFailure::DiskFull(message) => JobError::DiskFull(message),
        JobFailure::Failed(_) => JobError::Folder(error),
    })?;
    tidy(folder);
    Ok(true)
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

/// Trains and writes the artifacts. `None` if `stop` was set.
fn work(
    folder: &Folder,
    order: &Order,
    log: &mut EventLog,
    stop: &AtomicBool,
) -> Result<Option<(u64, Vec<Artifact>)>, JobFailure> {
    let spec = &order.spec;
    let settings = spec.resolve().map_err(|why| failed("invalid_spec", None, why))?;
    let base = base(folder, order, log)?;
    let tokenizer = NativeTokenizer::from_gguf(&base);
    let tokenizer = Arc::new(tokenizer.map_err(|why| failed("invalid_model", None, why))?);
    let data = data::read(folder, order, &base, &tokenizer, &settings, log)?;
    let training = init::training(folder, order, &base)?;
    let mut model = Model::load(base.clone(), &training, settings.max_length, &Device::Cpu)?;
    if spec.kind == Kind::Reward {
        let start = init::score(folder, order, model.shape().width)?;
        model = model.with_score(start)?;
    }
    if let (Training::Lora(_), Some(adapter)) = (&training, init::adapter_file(folder, order)) {
        init::begin_with(&model, &adapter)?;
    }
    let checkpoints = Checkpoints::new(&folder.checkpoints(), settings.keep_checkpoints)?;
    let mut reporter =
        Reporter { folder, order, model: &model, training: &training, log, pace: None, silent: 0 };
    let mut refused = None;
    let tell = |event| {
        if let Err(error) = reporter.tell(event)
            && refused.is_none()
        {
            // An error in the event callback ends the training loop through `stop`, its only way to
            // end early.
            stop.store(true, Ordering::Relaxed);
            refused = Some(error);
        }
    };
    let shuffle = spec.data.shuffle.then_some(spec.seed);
    let (model, settings, checkpoints) = (&model, &settings, &checkpoints);
    let ended = match &data {
        Data::Examples { train, validation } => {
            let validation = validation.as_ref();
            Sft { model, settings, train, validation, checkpoints, shuffle }.run(stop, tell)
        }
        Data::Preference { train, validation } => {
            let (validation, reference) = (validation.as_ref(), &folder.reference());
            let objective = match spec.kind {
                Kind::Reward => Objective::Reward(spec.reward.unwrap_or_default()),
                _ => Objective::Dpo(spec.dpo.unwrap_or_default()),
            };
            let run = PreferenceTrainer {
                model,
                settings,
                objective,
                train,
                validation,
                checkpoints,
                shuffle,
                reference,
            };
            run.run(stop, tell)
        }
        Data::Prompts { train, validation } => {
            let Some(block) = &spec.grpo else {
                return Err(failed("invalid_spec", None, "grpo: the block is missing"));
            };
            let Some(link) = GatewayClient::open()? else {
                return Err(failed("no_server", None, ALONE));
            };
            let Training::Lora(lora) = &training else {
                return Err(failed("invalid_spec", None, "adapter: it is missing"));
            };
            for (name, prompts) in
                [("data.train", Some(train)), ("data.validation", validation.as_ref())]
            {
                check_items(&block.grader, name, prompts)?;
            }
            let facts = artifacts::facts(order, None);
            let export = |path: &Path| -> Result<(), TrainError> {
                let written = export::lora_gguf(model, lora, &facts, path);
                written.map(drop).map_err(|error| io::Error::other(error).into())
            };
            let adapter = AdapterFile::new(&order.id, &folder.cache());
            let run = GrpoTrainer {
                model,
                settings,
                block,
                train,
                validation: validation.as_ref(),
                checkpoints,
                shuffle,
                seed: spec.seed,
                client: &RefCell::new(link),
                export: &export,
                adapter: &adapter.0,
            };
            run.run(stop, tell)
        }
        Data::Text { train, validation } => {
            let (validation, tokenizer) = (validation.as_ref(), tokenizer.as_ref());
            let prompt = spec.pretrain.as_ref().and_then(|block| block.prompt.as_deref());
            let seed = spec.seed;
            let run = Pretrain {
                model,
                settings,
                train,
                validation,
                checkpoints,
                tokenizer,
                seed,
                shuffle,
                prompt,
            };
            run.run(stop, tell)
        }
    };
    if let Some(error) = refused {
        return Err(error);
    }
    let recipes::Outcome::Done { tokens } = ended? else { return Ok(None) };
    log.say(Level::Info, "Training is over; writing what was made.")?;
    log.sync()?;
    let made = artifacts::artifacts(folder, order, model, &training, &base, log)?;
    Ok(Some((tokens, made)))
}

/// Checks that every template of a grader can be filled from every item. A missing key would set
/// all rewards of an item to 0 without an error.
fn check_items(
    grader: &Grader,
    param: &str,
    prompts: Option<&PreparedPrompts>,
) -> Result<(), JobFailure> {
    let Some(prompts) = prompts else { return Ok(()) };
    for number in 0..prompts.len() {
        let prompt = prompts.get(number).map_err(TrainError::from)?;
        if let Some(why) = grader.missing_key(&prompt.item) {
            let message = format!(
                "{param}: prompt {}: {why}, which the grader's template names; add the key to the line, \
                 or change the grader",
                number + 1
            );
            return Err(failed("invalid_grader", Some(param), message));
        }
    }
    Ok(())
}

/// The file to which the policy's adapter is written at every step, on a memory file system if
/// there is one.
struct AdapterFile(PathBuf);

impl AdapterFile {
    fn new(job: &str, cache: &Path) -> Self {
        let name = format!("ingot-{job}-{}.gguf", std::process::id());
        let memory = Path::new("/dev/shm");
        Self(if memory.is_dir() { memory } else { cache }.join(name))
    }
}

impl Drop for AdapterFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The model to train. A new model with random weights is written first.
fn base(folder: &Folder, order: &Order, log: &mut EventLog) -> Result<Arc<Gguf>, JobFailure> {
    if let Some(path) = &order.model {
        return Ok(Arc::new(Gguf::open(path)?));
    }
    let path = folder.path().join(FRESH);
    if !path.exists() {
        log.say(Level::Info, "Making the tokenizer and the first weights.")?;
    }
    let block = order.spec.pretrain.clone().unwrap_or_default();
    let parent = order.tokenizer.as_ref().map(Gguf::open).transpose()?;
    let (data, name, seed) = (&order.train, &order.name, order.spec.seed);
    recipes::init_pretrain(&block, parent.as_ref(), data, name, seed, &path)?;
    Ok(Arc::new(Gguf::open(&path)?))
}
