//! Reads and tokenizes the training data.

use super::run::{JobFailure, classify, failed};
use crate::dataset::{DataError, DatasetKind};
use crate::gguf::{Array, Gguf, LACKING, ModelFacts, Value};
use crate::job::spec::{Kind, Resolved};
use crate::job::{DataReport, EventLog, Folder, JobEvent, Level, Order};
use crate::template::{ChatTemplate, date};
use crate::tokenizer::native::NativeTokenizer;
use crate::train::data::{
    Encoder, Prepared, PreparedPairs, PreparedPrompts, Stream, prepare, prepare_pairs,
    prepare_prompts, prepare_stream,
};
use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// The prepared data, by kind of job.
pub(super) enum Data {
    Examples { train: Prepared, validation: Option<Prepared> },
    Preference { train: PreparedPairs, validation: Option<PreparedPairs> },
    Prompts { train: PreparedPrompts, validation: Option<PreparedPrompts> },
    Text { train: Stream, validation: Option<Stream> },
}

/// Reads the order's files with the model's own tokenizer, and reports their statistics.
pub(super) fn read(
    folder: &Folder,
    order: &Order,
    model: &Gguf,
    tokenizer: &Arc<NativeTokenizer>,
    settings: &Resolved,
    log: &mut EventLog,
) -> Result<Data, JobFailure> {
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
    let encoder = || -> Result<Encoder, JobFailure> {
        let facts = ModelFacts::read(model)?;
        let template =
            ChatTemplate::of(&facts.tokenizer).map_err(|why| failed("invalid_model", None, why))?;
        let (now, parse_control) = (order.created_at, order.spec.data.parse_control_tokens);
        dated.set(template.writes_date());
        Ok(Encoder::new(tokenizer.clone(), Arc::new(template), now, parse_control))
    };
    let (data, train, validation) = match order.spec.kind.dataset() {
        Some(DatasetKind::PromptCompletion) => {
            let encoder = encoder()?;
            let each =
                |path: &Path, cache: &Path| prepare(path, &encoder, settings.max_length, cache);
            let (train, validation) = both(folder, order, each)?;
            let (validation, report) = validation.unzip();
            (Data::Examples { train: train.0, validation }, train.1, report)
        }
        Some(DatasetKind::Preference) => {
            let encoder = encoder()?;
            let each = |path: &Path, cache: &Path| {
                prepare_pairs(path, &encoder, settings.max_length, cache)
            };
            let (train, validation) = both(folder, order, each)?;
            let (validation, report) = validation.unzip();
            (Data::Preference { train: train.0, validation }, train.1, report)
        }
        Some(DatasetKind::PromptOnly) => {
            let encoder = encoder()?;
            let answer = order.spec.grpo.as_ref().map_or(0, |block| block.max_tokens);
            let most = settings.max_length.saturating_sub(answer);
            let each = |path: &Path, cache: &Path| prepare_prompts(path, &encoder, most, cache);
            let (train, validation) = both(folder, order, each)?;
            let (validation, report) = validation.unzip();
            (Data::Prompts { train: train.0, validation }, train.1, report)
        }
        None => {
            let each =
                |path: &Path, cache: &Path| prepare_stream(path, tokenizer.as_ref(), cache, |_| {});
            let (train, validation) = both(folder, order, each)?;
            let (mut stream, report) = train;
            let (mut validation, other) = validation.unzip();
            let share = order.spec.pretrain.clone().unwrap_or_default().held_out();
            if validation.is_none() && share > 0.0 {
                let (train, held) = stream.hold_out(share);
                log.say(
                    Level::Info,
                    format!("{} tokens at the end of the data are held out.", held.len()),
                )?;
                (stream, validation) = (train, Some(held));
            }
            (Data::Text { train: stream, validation }, report, other)
        }
    };
    let mut message = describe("Training file", &train, order.spec.kind);
    if let Some(report) = &validation {
        message += &format!(" {}", describe("Validation file", report, order.spec.kind));
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
    Ok(data)
}

type Read<T> = (T, DataReport);

fn both<T>(
    folder: &Folder,
    order: &Order,
    each: impl Fn(&Path, &Path) -> Result<Read<T>, DataError>,
) -> Result<(Read<T>, Option<Read<T>>), JobFailure> {
    let read = |path: &Path, param: &str, name: &str| {
        each(path, &folder.cache().join(name)).map_err(|error| {
            let code = format!("invalid_{param}");
            match &error {
                DataError::Io(_) => classify(&code, Some(param), &error),
                _ => failed(&code, Some(param), &error),
            }
        })
    };
    let train = read(&order.train, "training_file", "train.tokens")?;
    let validation = order.validation.as_ref();
    let validation =
        validation.map(|path| read(path, "validation_file", "validation.tokens")).transpose()?;
    Ok((train, validation))
}

fn describe(what: &str, report: &DataReport, kind: Kind) -> String {
    let DataReport { examples, tokens, trained_tokens, longest, .. } = report;
    if kind == Kind::Pretrain {
        return format!("{what}: {} bytes of text, {tokens} tokens.", report.bytes);
    }
    let what_of = match kind.dataset() {
        Some(DatasetKind::Preference) => "pairs of answers",
        Some(DatasetKind::PromptOnly) => "prompts",
        _ => "examples",
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
        let why = match kind.dataset() {
            Some(DatasetKind::Preference) => "longer than max_length, or both answers are the same",
            _ => "max_length leaves nothing to train",
        };
        text += &format!(" {} were left out: {why}.", report.dropped);
    }
    text
}
