//! Reads and tokenizes the training data.

use crate::dataset::{DataError, DatasetKind};
use crate::gguf::{Array, Gguf, LACKING, ModelFacts, Value};
use crate::job::spec::Resolved;
use crate::job::{DataReport, EventLog, Folder, JobEvent, Level, Order};
use crate::job::{JobFailure, classify, failed};
use crate::template::{ChatTemplate, date};
use crate::tokenizer::Tokenizer;
use crate::train::data::{Dataset, Encoder};
use crate::train::recipes::Recipe;
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// The data of a recipe, and what tokenizes further files.
pub(super) struct DataOf<R: Recipe> {
    pub train: R::Data,
    pub validation: Option<R::Data>,
    pub encoder: <R::Data as Dataset>::Encoder,
}

/// Reads the order's files, training and validation data, in the recipe's form and with the model's
/// own tokenizer, and reports their statistics.
pub(super) fn read<R: Recipe>(
    recipe: &R,
    folder: &Folder,
    order: &Order,
    model: &Gguf,
    tokenizer: Arc<dyn Tokenizer>,
    settings: &Resolved,
    log: &mut EventLog,
) -> Result<DataOf<R>, JobFailure> {
    fs::create_dir_all(folder.cache())?;
    if let Some(Value::Array(Array::String(lacking))) = model.get(LACKING) {
        for what in lacking {
            log.say(
                Level::Warn,
                format!("The model's folder has more than is used of it: {what}."),
            )?;
        }
    }
    let dated = Cell::new(false);
    let encoder = R::Data::encoder(tokenizer, |tokenizer| {
        let facts = ModelFacts::read(model)?;
        let template =
            ChatTemplate::of(&facts.tokenizer).map_err(|why| failed("invalid_model", None, why))?;
        let (now, parse_control) = (order.created_at, order.spec.data.parse_control_tokens);
        dated.set(template.writes_date());
        Ok::<_, JobFailure>(Encoder::new(tokenizer, Arc::new(template), now, parse_control))
    })?;
    let most = recipe.max_length(settings);
    let prepare = |path: &Path, param: &str, name: &str| {
        R::Data::prepare(path, &encoder, most, &folder.cache().join(name)).map_err(|error| {
            let code = format!("invalid_{param}");
            match &error {
                DataError::Io(_) => classify(&code, Some(param), &error),
                _ => failed(&code, Some(param), &error),
            }
        })
    };
    let (mut data, train) = prepare(&order.train, "training_file", "train.tokens")?;
    let (mut held_out, validation) = match &order.validation {
        Some(path) => {
            let (data, report) = prepare(path, "validation_file", "validation.tokens")?;
            (Some(data), Some(report))
        }
        None => (None, None),
    };
    let share = recipe.held_out();
    if held_out.is_none()
        && share > 0.0
        && let Some((part, tokens)) = data.hold_out(share)
    {
        log.say(Level::Info, format!("{tokens} tokens at the end of the data are held out."))?;
        held_out = Some(part);
    }
    let dataset = order.spec.task.settings().dataset();
    let mut message = describe("Training file", &train, dataset);
    if let Some(report) = &validation {
        message += &format!(" {}", describe("Validation file", report, dataset));
    }
    let notes: Vec<_> = [("Training file", Some(&train)), ("Validation file", validation.as_ref())]
        .into_iter()
        .flat_map(|(what, report)| report.map(|report| (what, report.notes.clone())))
        .collect();
    log.add(JobEvent::Data { train, validation }, message)?;
    if dated.get() {
        let date = date(order.created_at);
        let message = format!(
            "The chat template writes the date: all data are rendered with the day of the job, {date}."
        );
        log.say(Level::Info, message)?;
    }
    for (what, notes) in notes {
        for note in notes {
            log.say(Level::Warn, format!("{what}: {note}"))?;
        }
    }
    Ok(DataOf { train: data, validation: held_out, encoder })
}

fn describe(what: &str, report: &DataReport, dataset: Option<DatasetKind>) -> String {
    let DataReport { examples, tokens, trained_tokens, longest, .. } = report;
    let Some(dataset) = dataset else {
        return format!("{what}: {} bytes of text, {tokens} tokens.", report.bytes);
    };
    let what_of = match dataset {
        DatasetKind::PromptCompletion => "examples",
        DatasetKind::Preference => "pairs of answers",
        DatasetKind::PromptOnly => "prompts",
    };
    if report.trained_tokens == 0 {
        let mut text =
            format!("{what}: {examples} {what_of}, {tokens} tokens; the longest has {longest}.");
        if report.dropped > 0 {
            text += &format!(
                " {} were left out: longer than max_length less the answer's max_tokens.",
                report.dropped
            );
        }
        return text;
    }
    let share = 100.0 * *trained_tokens as f64 / (*tokens).max(1) as f64;
    let mut text = format!(
        "{what}: {examples} {what_of}, {tokens} tokens, of which {share:.0}% are trained; the \
         longest has {longest}."
    );
    if report.truncated > 0 {
        text += &format!(" {} were cut at max_length.", report.truncated);
    }
    if report.dropped > 0 {
        let why = match dataset {
            DatasetKind::Preference => "longer than max_length, or both answers are the same",
            _ => "max_length leaves nothing to train",
        };
        text += &format!(" {} were left out: {why}.", report.dropped);
    }
    text
}
