//! Runs a job, from its order to its outcome.

use super::policy::AdapterFile;
use super::reporter::Reporter;
use super::{artifacts, data, init, policy};
use crate::gguf::{Gguf, ModelFacts};
use crate::job::spec::for_task;
use crate::job::{EventLog, Failure, JobFailure, JobWork, Level, Order, Outcome, classify, failed};
use crate::tokenizer::native::NativeTokenizer;
use crate::train::checkpoint::Checkpoints;
use crate::train::export::ExportError;
use crate::train::recipes::{self, Event, Job, Making, Policy, Recipe, Student, TrainError};
use std::sync::Arc;

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
    ExportError => "export_failed",
    candle_core::Error => "training_failed",
    crate::train::checkpoint::CheckpointError => "checkpoint_failed",
    crate::gguf::GgufError => "invalid_model",
}

/// Carries out the order of a job that trains, from its last checkpoint if there is one. `None`: it
/// was asked to stop.
///
/// # Errors
/// Why it failed or waits.
pub fn carry_out(order: &Order, work: JobWork<'_>) -> Result<Option<Outcome>, JobFailure> {
    for_task!(&order.spec.task, recipe => train(recipe, order, work))
}

/// Trains and writes the artifacts; `None` if it was stopped.
fn train<R: Recipe>(
    recipe: &R,
    order: &Order,
    mut work: JobWork<'_>,
) -> Result<Option<Outcome>, JobFailure> {
    let (folder, control) = (work.folder, work.control);
    let spec = &order.spec;
    let settings = spec.resolve().map_err(|why| failed("invalid_spec", None, why))?;
    let base = base(recipe, order, &mut work)?;
    let tokenizer = NativeTokenizer::from_gguf(&base);
    let tokenizer = Arc::new(tokenizer.map_err(|why| failed("invalid_model", None, why))?);
    let data = data::read(recipe, folder, order, &base, tokenizer.clone(), &settings, work.log)?;
    let context = ModelFacts::read(&base)?.n_ctx_train as usize;
    let device = init::device(settings.device)?;
    let student = Student {
        base: &base,
        settings: &settings,
        device: &device,
        data: &data.train,
        path: &folder.fresh(),
        control,
        event: &mut |event| note(work.log, event),
    };
    let base = match recipe.student(student) {
        Ok(false) => base,
        Ok(true) => Arc::new(Gguf::open(folder.fresh())?),
        Err(TrainError::Stopped) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let training = init::training(folder, order, &base)?;
    let model = init::model(recipe, folder, order, &base, &training, settings.max_length, &device)?;
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
        // Without a name the teacher is the model from which the student was made.
        teacher: order.teacher.as_deref().or(order.model.as_deref()),
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
    let mut reporter = Reporter::new(folder, order, &model, &training, work.log);
    let ended = recipe.run(&job, control, &mut |event| reporter.tell(event, control));
    reporter.finish()?;
    let recipes::Outcome::Done { tokens } = ended? else { return Ok(None) };
    work.log.say(Level::Info, "Training is over; writing what was made.")?;
    work.log.sync()?;
    let artifacts = artifacts::artifacts(&mut work, order, &model, &training, &base)?;
    Ok(Some(Outcome::Succeeded { trained_tokens: tokens, artifacts }))
}

/// Writes a note before training, when there is nothing else to report.
fn note(log: &mut EventLog, event: Event) {
    if let Event::Note { text } = event
        && let Err(error) = log.say(Level::Info, text)
    {
        tracing::warn!("an event cannot be written: {error}");
    }
}

/// The model to train. A model that the order does not name is written first.
fn base(
    recipe: &impl Recipe,
    order: &Order,
    work: &mut JobWork<'_>,
) -> Result<Arc<Gguf>, JobFailure> {
    if let Some(path) = &order.model {
        return Ok(Arc::new(Gguf::open(path)?));
    }
    let path = work.folder.fresh();
    if !path.exists() {
        work.log.say(Level::Info, "Making the tokenizer and the first weights.")?;
    }
    recipe.create_model(order, &path)?;
    Ok(Arc::new(Gguf::open(&path)?))
}
