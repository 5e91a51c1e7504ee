//! Measurements of models in the calling process.
//!
//! | file | content |
//! |---|---|
//! | `perplexity.rs` | perplexity and KL divergence, as llama-perplexity measures them |
//! | `multiple_choice.rs` | tasks with given answers, as lm-evaluation-harness scores them |
//! | `generation.rs` | tasks whose answers the model writes |
//! | `base_logits.rs` | files of log-probabilities of a reference |
//! | `job.rs` | jobs that evaluate |
//! | `scorer.rs` | runs a model over tokens |
//! | `stats.rs` | intervals and quantiles |
//! | `verify/` | `ingot verify`: how far the runners' rounding moves a model's predictions |

mod base_logits;
mod generation;
pub mod job;
mod multiple_choice;
mod perplexity;
mod scorer;
mod stats;
#[cfg(test)]
mod tests;
pub mod verify;

use crate::job::{
    EvalError, EvalModel, EvalPlan, EvalProgress, EvalReference, EvalReport, Gate, GateReport,
    ModelReport, Questions, TextFacts,
};
use base_logits::{Header, Reader};
use scorer::Scorer;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Evaluates one model after another.
///
/// A reference model is evaluated first. Its log-probabilities are kept in a file, which later models
/// are compared with, so that one model at a time is in memory.
///
/// # Errors
/// [`EvalError`]. A bound that is not kept is not an error but a failed [`GateReport`].
pub fn evaluate(
    plan: &EvalPlan,
    progress: &mut dyn FnMut(EvalProgress),
) -> Result<EvalReport, EvalError> {
    let mut base = Base::of(plan, progress)?;
    let mut models = Vec::with_capacity(plan.models.len());
    let mut text = base.as_ref().map(|base| facts(&base.header));
    for model in &plan.models {
        let mut scorer = load(plan, model, base.as_ref(), progress)?;
        let (report, header) = evaluate_model(plan, model, &mut scorer, base.as_mut(), progress)?;
        text = text.or(header.as_ref().map(facts));
        models.push(report);
    }
    let gates =
        plan.gates.iter().flat_map(|gate| models.iter().map(move |model| check(gate, model)));
    let gates = gates.collect::<Result<_, _>>()?;
    let reference = base.map(|base| base.name);
    Ok(EvalReport { reference, text, models, gates })
}

fn facts(header: &Header) -> TextFacts {
    let (context, chunks) = (header.context, header.chunks());
    TextFacts { context, chunks, counted: chunks * header.rows() }
}

fn load(
    plan: &EvalPlan,
    model: &EvalModel,
    base: Option<&Base>,
    progress: &mut dyn FnMut(EvalProgress),
) -> Result<Scorer, EvalError> {
    progress(EvalProgress::Loading(model.name.clone()));
    reset_peak();
    let context = base.map_or(plan.context, |base| base.header.context);
    // Tasks may need more than a chunk.
    let context = if plan.tasks.is_empty() { context } else { context.max(TASK_CONTEXT) };
    Scorer::load(model, context, plan.llama_cpp, plan.threads)
}

/// Tokens of a question with its examples, at most.
const TASK_CONTEXT: usize = 2_048;

/// The log-probabilities that models are compared with.
struct Base {
    name: String,
    file: BaseFile,
    header: Header,
}

/// Their file.
enum BaseFile {
    Kept(PathBuf),
    /// Deleted on drop.
    Temporary(PathBuf),
}

impl BaseFile {
    fn path(&self) -> &Path {
        let (Self::Kept(path) | Self::Temporary(path)) = self;
        path
    }
}

impl Drop for BaseFile {
    fn drop(&mut self) {
        if let Self::Temporary(path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Base {
    fn of(
        plan: &EvalPlan,
        progress: &mut dyn FnMut(EvalProgress),
    ) -> Result<Option<Self>, EvalError> {
        match &plan.reference {
            None => Ok(None),
            Some(EvalReference::BaseLogits(path)) => {
                let header = Reader::open(path)?.header;
                let name = path.display().to_string();
                Ok(Some(Self { name, file: BaseFile::Kept(path.clone()), header }))
            }
            Some(EvalReference::Model(model)) => Self::write(plan, model, progress).map(Some),
        }
    }

    /// Evaluates the reference model.
    fn write(
        plan: &EvalPlan,
        model: &EvalModel,
        progress: &mut dyn FnMut(EvalProgress),
    ) -> Result<Self, EvalError> {
        let text = plan.text.as_deref().ok_or_else(no_text)?;
        let mut scorer = load(plan, model, None, progress)?;
        let header = perplexity::cut(&scorer, text, plan.context, plan.chunks)?;
        let file = match &plan.save_logits {
            Some(path) => BaseFile::Kept(path.clone()),
            None => {
                let name = format!(".eval-{}.logits", std::process::id());
                BaseFile::Temporary(plan.folder.join(name))
            }
        };
        check_space(file.path(), header.file_bytes())?;
        let what = format!("{}: log-probabilities", model.name);
        let mut tell = working(what, progress);
        perplexity::measure(&mut scorer, &header, None, Some(file.path()), &mut tell)?;
        Ok(Self { name: model.name.clone(), file, header })
    }
}

fn no_text() -> EvalError {
    EvalError::Refused("name a text with --data: a reference is compared on it".into())
}

/// Checks that a file of this size fits on the disk.
fn check_space(path: &Path, needed: u64) -> Result<(), EvalError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let space = rustix::fs::statvfs(folder)
        .map_err(|error| EvalError::Io { path: folder.to_owned(), source: error.into() })?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    match needed <= free {
        true => Ok(()),
        false => {
            let why = format!(
                "the reference's log-probabilities need {} MB, and {} MB are free; fewer chunks need \
                 less (`evaluate.chunks`, --chunks)",
                needed >> 20,
                free >> 20
            );
            let source = io::Error::new(io::ErrorKind::StorageFull, why);
            Err(EvalError::Io { path: folder.to_owned(), source })
        }
    }
}

fn working<'a>(
    what: String,
    progress: &'a mut dyn FnMut(EvalProgress),
) -> impl FnMut(usize, usize) + 'a {
    move |done, total| progress(EvalProgress::Working { what: what.clone(), done, total })
}

/// Evaluates one model on the text, if there is one, and on the tasks.
fn evaluate_model(
    plan: &EvalPlan,
    model: &EvalModel,
    scorer: &mut Scorer,
    base: Option<&mut Base>,
    progress: &mut dyn FnMut(EvalProgress),
) -> Result<(ModelReport, Option<Header>), EvalError> {
    let header = match (&base, &plan.text) {
        (Some(base), _) => Some(base.header.clone()),
        (None, Some(text)) => Some(perplexity::cut(scorer, text, plan.context, plan.chunks)?),
        (None, None) => None,
    };
    let mut reader = base.as_ref().map(|base| Reader::open(base.file.path())).transpose()?;
    if let Some(reader) = &reader
        && (scorer.vocabulary() != reader.header.vocabulary
            || scorer.context < reader.header.context)
    {
        return Err(EvalError::Refused(format!(
            "{}: a vocabulary of {} tokens and a context of {}, but the reference has {} and chunks \
             of {}: only models of the same vocabulary can be compared",
            model.name,
            scorer.vocabulary(),
            scorer.context,
            reader.header.vocabulary,
            reader.header.context
        )));
    }
    let found = match &header {
        Some(header) => {
            let mut tell = working(format!("{}: text", model.name), progress);
            Some(perplexity::measure(scorer, header, reader.as_mut(), None, &mut tell)?)
        }
        None => None,
    };
    let mut tasks = BTreeMap::new();
    for task in &plan.tasks {
        let mut tell = working(format!("{}: {}", model.name, task.name), progress);
        let report = match &task.questions {
            Questions::MultipleChoice(questions) => {
                multiple_choice::score(scorer, task, questions, &mut tell)?
            }
            Questions::Generation(generation) => {
                generation::score(scorer, task, generation, &mut tell)?
            }
        };
        tasks.insert(task.name.clone(), report);
    }
    let report = ModelReport {
        name: model.name.clone(),
        architecture: scorer.facts.architecture.clone(),
        quantization: scorer.facts.quantization.clone(),
        parameters: scorer.facts.parameters,
        bytes: scorer.bytes,
        perplexity: found.as_ref().map(perplexity::Predictions::perplexity),
        bits_per_byte: found.as_ref().map(perplexity::Predictions::bits_per_byte),
        tokens_per_second: found.as_ref().map(perplexity::Predictions::tokens_per_second),
        memory_bytes: peak(),
        divergence: found.as_ref().and_then(perplexity::Predictions::divergence),
        tasks,
    };
    Ok((report, header))
}

fn check(gate: &Gate, model: &ModelReport) -> Result<GateReport, EvalError> {
    let lacks =
        |what: &str| EvalError::Refused(format!("{what}, which this evaluation does not measure"));
    let (what, value, bound, passed) = match gate {
        Gate::MaxKl(most) => {
            let found = model.divergence.as_ref();
            let kl = found.ok_or_else(|| lacks("--max-kl bounds the KL to a reference"))?.mean_kl;
            ("mean KL".to_owned(), kl.value, *most, kl.value <= *most)
        }
        Gate::MaxPerplexity(most) => {
            let found = model.perplexity;
            let found =
                found.ok_or_else(|| lacks("--max-perplexity bounds the perplexity of a text"))?;
            ("perplexity".to_owned(), found.value, *most, found.value <= *most)
        }
        Gate::MinAccuracy { task, least } => {
            let found = model.tasks.get(task);
            let found =
                found.ok_or_else(|| lacks(&format!("--min-accuracy names the task `{task}`")))?;
            let value = found.score().value;
            (format!("score of {task}"), value, *least, value >= *least)
        }
    };
    Ok(GateReport { model: model.name.clone(), what, value, bound, passed })
}

/// Forgets the largest resident memory so far. Where the system does not allow it, the largest of
/// the process counts.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Largest resident memory in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}
