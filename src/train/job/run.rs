//! From the order to the outcome.

use super::{
    Artifact, ArtifactKind, Entry, EventLog, Failure, Folder, Follower, JobEvent, Level, Order,
    Outcome, Step, Validation,
};
use crate::engine::tokenizer::native::NativeTokenizer;
use crate::gguf::{Gguf, LoraInfo, ModelFacts, Target, TensorType, check_lora_gguf, peft_to_gguf};
use crate::template::ChatTemplate;
use crate::train::checkpoint::Checkpoints;
use crate::train::data::{DataError, Encoder, Prepared, Report, prepare};
use crate::train::export::{self, ExportError};
use crate::train::model::{Lora, Model, Training};
use crate::train::recipes::{self, Event, Sft, TrainError};
use crate::train::spec::{Kind, Resolved};
use candle_core::{Device, Tensor};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a process before us may take to leave.
const PATIENCE: Duration = Duration::from_secs(60);
/// Steps that are told of one by one; of longer runs, every so many.
const TOLD: u64 = 5_000;
/// The pace that the time left is guessed from: how much a step counts.
const RECENT: f64 = 0.1;

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("the disk is full: {0}")]
    DiskFull(String),
    #[error("another process works on this job")]
    Busy,
    #[error("the job's folder: {0}")]
    Folder(#[from] io::Error),
}

/// Why the job failed, or the disk was full.
enum Ended {
    Failed(Failure),
    DiskFull(String),
}

fn failed(code: &str, param: Option<&str>, message: impl std::fmt::Display) -> Ended {
    let param = param.map(str::to_owned);
    Ended::Failed(Failure { code: code.into(), message: message.to_string(), param })
}

/// What the system refused for lack of room, however deep it is wrapped, else a failure.
fn sort(code: &str, param: Option<&str>, error: &(dyn Error + 'static)) -> Ended {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        {
            return Ended::DiskFull(error.to_string());
        }
        cause = error.source();
    }
    failed(code, param, error)
}

macro_rules! sorted {
    ($($error:ty => $code:literal),* $(,)?) => {
        $(impl From<$error> for Ended {
            fn from(error: $error) -> Self {
                sort($code, None, &error)
            }
        })*
    };
}

sorted! {
    io::Error => "io_error",
    TrainError => "training_failed",
    ExportError => "export_failed",
    candle_core::Error => "training_failed",
    crate::train::checkpoint::CheckpointError => "checkpoint_failed",
    crate::gguf::GgufError => "invalid_model",
}

/// Carries out the order, from the last checkpoint if there is one. `true`: it has an outcome, which
/// the folder holds; `false`: it was told to stop.
///
/// # Errors
/// [`JobError`]; started again, it goes on from its last checkpoint.
pub fn run(folder: &Folder, stop: &AtomicBool) -> Result<bool, JobError> {
    let _lock = lock(folder.path())?;
    if folder.outcome()?.is_some() {
        return Ok(true);
    }
    let order = folder.order()?;
    let mut log = EventLog::open(&folder.events())?;
    let outcome = match work(folder, &order, &mut log, stop) {
        Ok(None) => return Ok(false),
        Ok(Some((trained_tokens, artifacts))) => Outcome::Succeeded { trained_tokens, artifacts },
        Err(Ended::DiskFull(message)) => return Err(JobError::DiskFull(message)),
        Err(Ended::Failed(failure)) => Outcome::Failed(failure),
    };
    folder.end(&outcome).map_err(|error| match sort("", None, &error) {
        Ended::DiskFull(message) => JobError::DiskFull(message),
        Ended::Failed(_) => JobError::Folder(error),
    })?;
    // Only room: what is left is not looked at again.
    let _ = fs::remove_dir_all(folder.cache());
    Ok(true)
}

/// Held while the file is open.
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

/// `None` if it was told to stop.
fn work(
    folder: &Folder,
    order: &Order,
    log: &mut EventLog,
    stop: &AtomicBool,
) -> Result<Option<(u64, Vec<Artifact>)>, Ended> {
    let settings = order.spec.resolve().map_err(|why| failed("invalid_spec", None, why))?;
    match order.spec.kind {
        Kind::Sft => {}
        Kind::Pretrain => {
            return Err(failed("invalid_spec", None, "jobs of kind `pretrain` come later"));
        }
    }
    let Some(path) = &order.model else {
        return Err(failed("invalid_spec", None, "the order names no model"));
    };
    let file = Arc::new(Gguf::open(path)?);
    let data = read_data(folder, order, &file, &settings, log)?;
    let training = training(folder, order, &file)?;
    let model = Model::load(file.clone(), &training, settings.max_length, &Device::Cpu)?;
    if let (Training::Lora(_), Some(init)) = (&training, adapter_file(folder, order)) {
        begin_with(&model, &init)?;
    }
    let checkpoints = Checkpoints::new(&folder.checkpoints(), settings.keep_checkpoints)?;
    let sft = Sft {
        model: &model,
        settings: &settings,
        train: &data.train,
        validation: data.validation.as_ref(),
        checkpoints: &checkpoints,
        shuffle: order.spec.data.shuffle.then_some(order.spec.seed),
    };
    let mut teller = Teller { folder, order, model: &model, training: &training, log, pace: None };
    let mut refused = None;
    let ended = sft.run(stop, |event| {
        if let Err(error) = teller.tell(event)
            && refused.is_none()
        {
            // The loop knows one way to end: as if it had been told to.
            stop.store(true, Ordering::Relaxed);
            refused = Some(error);
        }
    });
    if let Some(error) = refused {
        return Err(error);
    }
    match ended? {
        recipes::Outcome::Stopped => return Ok(None),
        recipes::Outcome::Done => {}
    }
    let tokens = teller.tokens();
    log.say(Level::Info, "Training is over; writing what was made.")?;
    log.sync()?;
    Ok(Some((tokens, artifacts(folder, order, &model, &training, &file)?)))
}

struct Data {
    train: Prepared,
    validation: Option<Prepared>,
}

fn read_data(
    folder: &Folder,
    order: &Order,
    model: &Gguf,
    settings: &Resolved,
    log: &mut EventLog,
) -> Result<Data, Ended> {
    let invalid = |why: &dyn std::fmt::Display| failed("invalid_model", None, why);
    let facts = ModelFacts::read(model)?;
    let encoder = Encoder {
        tokenizer: Arc::new(NativeTokenizer::from_gguf(model).map_err(|why| invalid(&why))?),
        template: Arc::new(ChatTemplate::of(&facts.tokenizer).map_err(|why| invalid(&why))?),
    };
    fs::create_dir_all(folder.cache())?;
    let read = |path: &Path, param: &str, name: &str| -> Result<(Prepared, Report), Ended> {
        let cache = folder.cache().join(name);
        prepare(path, &encoder, settings.max_length, &cache, |_| {}).map_err(|error| {
            let code = format!("invalid_{param}");
            match &error {
                DataError::Io(_) => sort(&code, Some(param), &error),
                _ => failed(&code, Some(param), &error),
            }
        })
    };
    let (train, report) = read(&order.train, "training_file", "train.tokens")?;
    let (mut validation, mut other) = (None, None);
    if let Some(path) = &order.validation {
        let (data, report) = read(path, "validation_file", "validation.tokens")?;
        (validation, other) = (Some(data), Some(report));
    }
    let mut message = describe("Training file", &report);
    if let Some(report) = &other {
        message += &format!(" {}", describe("Validation file", report));
    }
    log.add(JobEvent::Data { train: report, validation: other }, message)?;
    Ok(Data { train, validation })
}

fn describe(what: &str, report: &Report) -> String {
    let share = 100.0 * report.trained_tokens as f64 / report.tokens.max(1) as f64;
    let mut text = format!(
        "{what}: {} examples, {} tokens, of which {share:.0}% are trained; the longest has {}.",
        report.examples, report.tokens, report.longest
    );
    if report.truncated > 0 {
        text += &format!(" {} were cut at max_length.", report.truncated);
    }
    if report.dropped > 0 {
        text += &format!(" {} were left out: max_length leaves nothing to train.", report.dropped);
    }
    text
}

/// The adapter to begin with, as GGUF.
fn adapter_file(folder: &Folder, order: &Order) -> Option<PathBuf> {
    let init = order.init.as_ref()?;
    Some(if init.is_dir() { folder.cache().join("init.gguf") } else { init.clone() })
}

fn training(folder: &Folder, order: &Order, base: &Gguf) -> Result<Training, Ended> {
    let spec = &order.spec;
    let Some(adapter) = &spec.adapter else { return Ok(Training::Full) };
    let invalid = |why: &dyn std::fmt::Display| {
        failed("invalid_spec", None, format!("adapter.init cannot be used: {why}"))
    };
    let Some(file) = adapter_file(folder, order) else {
        let lora = adapter.lora(spec.seed);
        return lora.map(Training::Lora).map_err(|why| failed("invalid_spec", None, why));
    };
    let info = match &order.init {
        Some(init) if init.is_dir() => {
            let facts = ModelFacts::read(base)?;
            peft_to_gguf(init, &facts, base, &file).map_err(|why| invalid(&why))?
        }
        _ => check_lora_gguf(&file, base).map_err(|why| invalid(&why))?,
    };
    Ok(Training::Lora(lora_of(&info, spec.seed).map_err(|why| invalid(&why))?))
}

/// What an adapter in llama.cpp's form was made with.
fn lora_of(info: &LoraInfo, seed: u64) -> Result<Lora, String> {
    let target = |name: &String| match name.as_str() {
        "attn_q" => Ok(Target::Q),
        "attn_k" => Ok(Target::K),
        "attn_v" => Ok(Target::V),
        "attn_output" => Ok(Target::Output),
        "ffn_gate" => Ok(Target::Gate),
        "ffn_up" => Ok(Target::Up),
        "ffn_down" => Ok(Target::Down),
        other => Err(format!("it changes `{other}`, which is not trained here")),
    };
    let targets = info.targets.iter().map(target).collect::<Result<_, _>>()?;
    let (rank, alpha) = (info.rank as usize, f64::from(info.alpha));
    // No alpha means no scale.
    let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
    Ok(Lora { rank, alpha, targets, rank_stabilized: false, seed })
}

/// Puts an adapter's matrices in place of the drawn ones.
fn begin_with(model: &Model, adapter: &Path) -> Result<(), Ended> {
    let file = Gguf::open(adapter)?;
    for param in model.params() {
        let values = file.to_f32(&param.name)?;
        let values = Tensor::from_vec(values, param.var.shape(), param.var.device())?;
        param.var.set(&values)?;
    }
    Ok(())
}

/// Writes down what happens.
struct Teller<'a> {
    folder: &'a Folder,
    order: &'a Order,
    model: &'a Model,
    training: &'a Training,
    log: &'a mut EventLog,
    /// When the last step ended, seconds a step, and the tokens so far.
    pace: Option<(Instant, f64, u64)>,
}

impl Teller<'_> {
    fn tokens(&self) -> u64 {
        self.pace.map_or(0, |(.., tokens)| tokens)
    }

    fn tell(&mut self, event: Event) -> Result<(), Ended> {
        match event {
            // Ours tells more.
            Event::Data { .. } => {}
            Event::Resumed { step } => {
                self.log.say(Level::Info, format!("Going on after step {step}."))?;
            }
            Event::Step(step) => self.step(&step)?,
            Event::Evaluated(found) => {
                let message = format!("Step {}: validation loss {:.4}", found.step, found.loss);
                let found = Validation {
                    step: found.step,
                    validation_loss: found.loss,
                    validation_accuracy: found.accuracy,
                };
                self.log.add(JobEvent::Validation(found), message)?;
            }
            Event::Checkpoint { step } => {
                self.checkpoint_adapter(step)?;
                let message = format!("Checkpoint created at step {step}.");
                self.log.add(JobEvent::Checkpoint { step }, message)?;
                self.log.sync()?;
            }
        }
        Ok(())
    }

    fn step(&mut self, step: &recipes::Progress) -> Result<(), Ended> {
        let now = Instant::now();
        if self.pace.is_none() {
            // What a process before us told of steps that are done again.
            *self.log = EventLog::cut(&self.folder.events(), step.step - 1)?;
        }
        let pace = match self.pace {
            Some((last, pace, _)) => pace + RECENT * ((now - last).as_secs_f64() - pace),
            // The first one of this process: as long as the step itself took.
            None => 0.0,
        };
        let first = self.pace.is_none();
        self.pace = Some((now, pace, step.tokens));
        let every = (step.total_steps / TOLD).max(1);
        if !step.step.is_multiple_of(every) && step.step != step.total_steps {
            return Ok(());
        }
        let left = (step.total_steps - step.step) as f64;
        let message =
            format!("Step {}/{}: training loss={:.4}", step.step, step.total_steps, step.loss);
        let step = Step {
            step: step.step,
            total_steps: step.total_steps,
            epoch: step.epoch,
            loss: step.loss,
            accuracy: step.accuracy,
            learning_rate: step.learning_rate,
            grad_norm: step.grad_norm,
            tokens: step.tokens,
            tokens_per_second: step.tokens_per_second,
            eta_seconds: if first { 0.0 } else { left * pace },
            memory_bytes: resident(),
        };
        Ok(self.log.add(JobEvent::Step(step), message)?)
    }

    /// The adapter as it is now, for those who want to try it before the end. Those of checkpoints
    /// that are gone are removed.
    fn checkpoint_adapter(&self, step: u64) -> Result<(), Ended> {
        let Training::Lora(lora) = self.training else { return Ok(()) };
        let facts = facts(self.order, Some(step));
        export::lora_gguf(self.model, lora, &facts, &self.folder.checkpoint_adapter(step))?;
        for file in fs::read_dir(self.folder.checkpoints())?.flatten() {
            let name = file.file_name();
            let step = name.to_str().and_then(|name| {
                name.strip_prefix("adapter-")?.strip_suffix(".gguf")?.parse::<u64>().ok()
            });
            let gone = |step| !self.folder.checkpoints().join(format!("step-{step}")).exists();
            if step.is_some_and(gone) {
                fs::remove_file(file.path())?;
            }
        }
        Ok(())
    }
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = text.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Where an artifact comes from, for its metadata.
fn facts(order: &Order, step: Option<u64>) -> Vec<(&'static str, String)> {
    let spec = &order.spec;
    let mut facts = vec![
        ("general.name", order.name.clone()),
        ("ingot.job", order.id.clone()),
        ("ingot.version", env!("CARGO_PKG_VERSION").to_owned()),
        ("ingot.spec", serde_json::to_string(spec).unwrap_or_default()),
    ];
    let named = [("ingot.base_model", &spec.model), ("ingot.base_sha256", &order.model_sha256)];
    facts.extend(named.into_iter().filter_map(|(key, value)| Some((key, value.clone()?))));
    facts.extend(step.map(|step| ("ingot.step", step.to_string())));
    facts
}

/// Writes everything that the job is for.
fn artifacts(
    folder: &Folder,
    order: &Order,
    model: &Model,
    training: &Training,
    base: &Gguf,
) -> Result<Vec<Artifact>, Ended> {
    let to = folder.artifacts();
    // A try before may have left a part.
    let _ = fs::remove_dir_all(&to);
    fs::create_dir_all(&to)?;
    let facts = facts(order, None);
    let mut made = Vec::new();
    match training {
        Training::Lora(lora) => {
            export::lora_gguf(model, lora, &facts, &to.join("adapter.gguf"))?;
            made.push((ArtifactKind::Adapter, "adapter.gguf"));
            let base = order.spec.model.as_deref().unwrap_or_default();
            export::peft_folder(model, lora, base, &to.join("peft"))?;
            made.push((ArtifactKind::Peft, "peft/adapter_config.json"));
            made.push((ArtifactKind::Peft, "peft/adapter_model.safetensors"));
        }
        Training::Full => {
            export::model_gguf(model, None, base, TensorType::F16, &facts, &to.join("model.gguf"))?;
            made.push((ArtifactKind::Model, "model.gguf"));
        }
    }
    let entries = Follower::new(folder.events(), 0).read()?;
    fs::write(to.join("results.csv"), results(&entries))?;
    made.push((ArtifactKind::Results, "results.csv"));
    fs::write(to.join("provenance.json"), provenance(order, &entries)?)?;
    made.push((ArtifactKind::Provenance, "provenance.json"));
    let artifact = |(kind, name): (ArtifactKind, &str)| -> Result<Artifact, Ended> {
        let file = Path::new("artifacts").join(name);
        let (bytes, sha256) = digest(&folder.path().join(&file))?;
        Ok(Artifact { kind, file, bytes, sha256 })
    };
    made.into_iter().map(artifact).collect()
}

/// OpenAI's result file.
fn results(entries: &[Entry]) -> String {
    let mut text = String::from("step,train_loss,train_accuracy,valid_loss,valid_accuracy\n");
    let mut steps = entries.iter().peekable();
    while let Some(entry) = steps.next() {
        let JobEvent::Step(step) = &entry.event else { continue };
        text += &format!("{},{:.6},{:.6},", step.step, step.loss, step.accuracy);
        let found = steps.peek().and_then(|next| match &next.event {
            JobEvent::Validation(found) if found.step == step.step => Some(found),
            _ => None,
        });
        if let Some(found) = found {
            text += &format!("{:.6},{:.6}", found.validation_loss, found.validation_accuracy);
        } else {
            text.push(',');
        }
        text.push('\n');
    }
    text
}

fn provenance(order: &Order, entries: &[Entry]) -> Result<Vec<u8>, Ended> {
    let data = entries.iter().rev().find_map(|entry| match &entry.event {
        JobEvent::Data { train, validation } => Some((train, validation)),
        _ => None,
    });
    let value = serde_json::json!({
        "job": order.id,
        "name": order.name,
        "ingot": env!("CARGO_PKG_VERSION"),
        "spec": order.spec,
        "base": {"model": order.spec.model, "sha256": order.model_sha256},
        "data": data.map(|(train, validation)| serde_json::json!({
            "train": train, "validation": validation,
        })),
    });
    serde_json::to_vec_pretty(&value).map_err(|error| Ended::from(io::Error::from(error)))
}

/// Size and SHA-256, once the file is on the disk.
fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    file.sync_all()?;
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
    let digest = hash.finalize();
    Ok((bytes, digest.iter().map(|byte| format!("{byte:02x}")).collect()))
}
