//! `ingot eval MODEL…`: perplexity, KL divergence and accuracy of models, side by side.
//!
//! It runs in this process, so a hostile file that makes llama.cpp abort ends the command.

use super::progress::{spinner, work_bar};
use super::{CliError, fetch, read_text};
use crate::config::DataDirOption;
use crate::gateway::store::Store;
use crate::grade::Grader;
use crate::job::{
    EVAL_CONTEXT, EvalError, EvalModel, EvalPlan, EvalProgress, EvalReference, EvalReport,
    EvalTask, Gate, GenerationSettings, Interval, ModelReport, Rate, TaskReport, write_whole,
};
use indicatif::ProgressBar;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `ingot eval`.
#[derive(Debug, clap::Args)]
pub struct EvalOptions {
    /// Files, hf:org/repo/file.gguf, aliases, names of `ingot models`, or names of adapters
    #[arg(value_name = "MODEL", required = true)]
    pub models: Vec<String>,
    /// Text whose perplexity is measured, UTF-8
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Task with given answers: JSON lines with prompt, choices and answer; may be repeated
    #[arg(long = "task", value_name = "NAME=FILE", value_parser = task)]
    pub tasks: Vec<(String, PathBuf)>,
    /// Grader (JSON or TOML) of a task whose answers the model writes; may be repeated
    #[arg(long = "grader", value_name = "TASK=FILE", value_parser = task)]
    pub graders: Vec<(String, PathBuf)>,
    /// Longest answer that a model writes, in tokens
    #[arg(long, default_value = "256", value_name = "N")]
    pub max_tokens: NonZeroUsize,
    /// Text before which an answer ends; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Lines at the beginning of a task's file that are shown as examples
    #[arg(long, default_value = "0", value_name = "N")]
    pub shots: usize,
    /// Model that the others are compared with
    #[arg(long, value_name = "MODEL", conflicts_with = "base_logits")]
    pub reference: Option<String>,
    /// Log-probabilities that the models are compared with, from --save-logits or llama-perplexity
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    pub base_logits: Option<PathBuf>,
    /// Keep the log-probabilities of the reference in this file
    #[arg(long, value_name = "FILE", requires = "reference")]
    pub save_logits: Option<PathBuf>,
    /// Tokens of a chunk of the text; the second half counts [default: 512]
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(4..=1 << 20),
        conflicts_with = "base_logits"
    )]
    pub context: Option<u32>,
    /// Chunks to read, at most [default: all]
    #[arg(long, value_name = "N", conflicts_with = "base_logits")]
    pub chunks: Option<NonZeroUsize>,
    /// Fail if the mean KL of a model is above this
    #[arg(long, value_name = "NATS")]
    pub max_kl: Option<f64>,
    /// Fail if the perplexity of a model is above this
    #[arg(long, value_name = "X")]
    pub max_perplexity: Option<f64>,
    /// Fail if the accuracy of a model is below this; may be repeated
    #[arg(long, value_name = "TASK=SHARE")]
    pub min_accuracy: Vec<Gate>,
    /// Also write the report to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Also write the report to this file as an HTML page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Run the models by llama.cpp
    #[arg(long)]
    pub llama_cpp: bool,
    #[command(flatten)]
    pub data_dir: DataDirOption,
}

fn task(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, file)) if !name.is_empty() && !file.is_empty() => {
            Ok((name.to_owned(), file.into()))
        }
        _ => Err("it has the form NAME=FILE, such as arc=arc.jsonl".to_owned()),
    }
}

/// Measures with `evaluate`, prints the table, writes the reports. Exit code 1 if a bound is missed.
///
/// # Errors
/// If a model or a file cannot be read, or a report cannot be written.
pub fn main(
    options: EvalOptions,
    evaluate: impl FnOnce(&EvalPlan, &mut dyn FnMut(EvalProgress)) -> Result<EvalReport, EvalError>,
) -> Result<ExitCode, CliError> {
    let (json, html) = (options.json.clone(), options.html.clone());
    let plan = plan(options)?;
    let mut bar = Bar::default();
    let result = evaluate(&plan, &mut |progress| bar.show(progress));
    bar.0.finish_and_clear();
    let report = result.map_err(|error| CliError::message(format!("{error}.")))?;
    print!("{}", table(&report));
    if let Some(path) = &json {
        let text = serde_json::to_string_pretty(&report).expect("the report is plain data");
        write(path, &(text + "\n"))?;
    }
    if let Some(path) = &html {
        write(path, &report.html().map_err(CliError::Message)?)?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn write(path: &Path, text: &str) -> Result<(), CliError> {
    write_whole(path, text.as_bytes()).map_err(|error| {
        CliError::message(format!("The report cannot be written to {}: {error}.", path.display()))
    })
}

fn plan(options: EvalOptions) -> Result<EvalPlan, CliError> {
    if options.data.is_none() && options.base_logits.is_none() && options.tasks.is_empty() {
        return Err(CliError::message(
            "There is nothing to measure: name a text with --data, a task with --task, or \
             log-probabilities with --base-logits.",
        ));
    }
    let mut graders = BTreeMap::new();
    for (task, file) in &options.graders {
        if options.tasks.iter().all(|(name, _)| name != task) {
            return Err(CliError::message(format!(
                "--grader names the task `{task}`, which no --task names."
            )));
        }
        graders.insert(task, grader(file, &read_text(file)?)?);
    }
    let tasks = options.tasks.iter().map(|(name, file)| {
        let settings = GenerationSettings {
            grader: graders.remove(name),
            max_tokens: options.max_tokens.get(),
            stop: options.stop.clone(),
        };
        let parsed = EvalTask::parse(name, &read_text(file)?, options.shots, settings);
        parsed.map_err(|why| CliError::message(format!("{}: {why}.", file.display())))
    });
    let tasks = tasks.collect::<Result<Vec<_>, _>>()?;
    for (number, task) in tasks.iter().enumerate() {
        if tasks[..number].iter().any(|other| other.name == task.name) {
            return Err(CliError::message(format!("--task names `{}` twice.", task.name)));
        }
    }
    check_gates(&options)?;
    let store = Store::open(&options.data_dir.resolve()?)?;
    let reference = match (&options.reference, options.base_logits) {
        (Some(model), _) => Some(EvalReference::Model(find(&store, model)?)),
        (None, Some(file)) => Some(EvalReference::BaseLogits(file)),
        (None, None) => None,
    };
    let bounds = [options.max_kl.map(Gate::MaxKl), options.max_perplexity.map(Gate::MaxPerplexity)];
    Ok(EvalPlan {
        models: options.models.iter().map(|model| find(&store, model)).collect::<Result<_, _>>()?,
        text: options.data.as_deref().map(read_text).transpose()?,
        context: options.context.map_or(EVAL_CONTEXT, |tokens| tokens as usize),
        chunks: options.chunks.map(NonZeroUsize::get),
        reference,
        save_logits: options.save_logits,
        tasks,
        gates: bounds.into_iter().flatten().chain(options.min_accuracy).collect(),
        llama_cpp: options.llama_cpp,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        folder: store.folder().to_owned(),
    })
}

/// Checks that what the gates bound is measured.
fn check_gates(options: &EvalOptions) -> Result<(), CliError> {
    let lacks = |what: &str| Err(CliError::message(what));
    if options.max_kl.is_some() && options.reference.is_none() && options.base_logits.is_none() {
        return lacks("--max-kl bounds the KL to a reference: add --reference or --base-logits.");
    }
    if options.max_perplexity.is_some() && options.data.is_none() && options.base_logits.is_none() {
        return lacks("--max-perplexity bounds the perplexity of a text: add --data.");
    }
    if options.stop.iter().any(String::is_empty) {
        return lacks("--stop is empty, so every answer would be: leave it out.");
    }
    for gate in &options.min_accuracy {
        if let Gate::MinAccuracy { task, .. } = gate
            && options.tasks.iter().all(|(name, _)| name != task)
        {
            return lacks(&format!("--min-accuracy names `{task}`, which no --task names."));
        }
    }
    Ok(())
}

fn grader(file: &Path, text: &str) -> Result<Grader, CliError> {
    let wrong = |why: String| CliError::message(format!("{}: {why}.", file.display()));
    let value: Value = match file.extension().is_some_and(|end| end == "toml") {
        true => toml::from_str(text).map_err(|error| wrong(error.to_string()))?,
        false => serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?,
    };
    Grader::parse(value).map_err(|error| wrong(error.message))
}

/// An adapter of the data folder, or a model.
fn find(store: &Store, name: &str) -> Result<EvalModel, CliError> {
    if let Some(adapter) = store.adapter(name)? {
        let file = fetch(store, &adapter.base_model)?;
        let adapter = Some(store.folder().join(adapter.file));
        return Ok(EvalModel { name: name.to_owned(), file, adapter, ..EvalModel::default() });
    }
    Ok(EvalModel {
        name: name.to_owned(),
        file: fetch(store, name)?,
        adapter: None,
        ..EvalModel::default()
    })
}

/// A spinner while a model is loaded, then a bar of its work.
struct Bar(ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        Self(ProgressBar::hidden())
    }
}

impl Bar {
    fn show(&mut self, progress: EvalProgress) {
        match progress {
            EvalProgress::Loading(name) => {
                self.0.finish_and_clear();
                self.0 = spinner(format!("loading {name}"));
                self.0.tick();
            }
            EvalProgress::Working { what, done, total } => {
                if self.0.length() != Some(total as u64) || self.0.prefix() != what {
                    self.0.finish_and_clear();
                    self.0 = work_bar(total as u64);
                    self.0.set_prefix(what);
                }
                self.0.set_position(done as u64);
            }
        }
    }
}

fn table(report: &EvalReport) -> String {
    let mut text = String::new();
    if let Some(facts) = &report.text {
        let _ = writeln!(
            text,
            "{} chunks of {} tokens; {} predictions count. Means with 95% intervals (bootstrap over \
             chunks), shares with Wilson's.\n",
            facts.chunks, facts.context, facts.counted
        );
    }
    let rate = |found: Rate| {
        format!("{:.2}% [{:.2}, {:.2}]", 100.0 * found.value, 100.0 * found.low, 100.0 * found.high)
    };
    let mut rows = vec![
        ["MODEL", "TYPE", "MB", "PERPLEXITY", "BITS PER BYTE", "TOKENS/S", "MEMORY MB"]
            .map(str::to_owned),
    ];
    let dash = || "-".to_owned();
    rows.extend(report.models.iter().map(|model| {
        [
            model.name.clone(),
            model.quantization.clone(),
            format!("{:.1}", model.bytes as f64 / 1e6),
            model.perplexity.map_or_else(dash, |found| interval(found, 4)),
            model.bits_per_byte.map_or_else(dash, |found| interval(found, 4)),
            model.tokens_per_second.map_or_else(dash, |speed| format!("{speed:.0}")),
            format!("{:.0}", model.memory_bytes as f64 / 1e6),
        ]
    }));
    text += &super::models::align(rows);
    if let Some(reference) = &report.reference {
        let _ = writeln!(text, "\nCompared with {reference}:\n");
        let mut rows = vec![
            [
                "MODEL",
                "MEAN KL",
                "MEDIAN",
                "99%",
                "99.9%",
                "MAX",
                "SAME TOP",
                "RMS DP",
                "LN PPL RATIO",
            ]
            .map(str::to_owned),
        ];
        rows.extend(report.models.iter().filter_map(|model| {
            let found = model.divergence.as_ref()?;
            let short = |kl: f64| format!("{kl:.5}");
            Some([
                model.name.clone(),
                interval(found.mean_kl, 5),
                short(found.median_kl),
                short(found.p99_kl),
                short(found.p999_kl),
                short(found.max_kl),
                rate(found.top1_agreement),
                format!("{:.3}%", 100.0 * found.rms_delta_p),
                interval(found.log_perplexity_ratio, 5),
            ])
        }));
        text += &super::models::align(rows);
    }
    text += &task_table(&report.models, &rate);
    if !report.gates.is_empty() {
        text.push('\n');
    }
    for gate in &report.gates {
        let verdict = if gate.passed { "ok  " } else { "FAIL" };
        let _ = writeln!(
            text,
            "{verdict}  {}: {} {:.5}, bound {}",
            gate.model, gate.what, gate.value, gate.bound
        );
    }
    text
}

fn interval(found: Interval, digits: usize) -> String {
    format!("{:.digits$} [{:.digits$}, {:.digits$}]", found.value, found.low, found.high)
}

fn task_table(models: &[ModelReport], rate: &dyn Fn(Rate) -> String) -> String {
    let head =
        ["TASK", "MODEL", "QUESTIONS", "ACCURACY OR REWARD", "PER LETTER", "ENDED", "TOKENS"];
    let mut rows = vec![head.map(str::to_owned)];
    for model in models {
        rows.extend(model.tasks.iter().map(|(name, found)| {
            let [score, per_letter, ended, tokens] = match found {
                TaskReport::MultipleChoice { accuracy, normalized_accuracy } => {
                    [rate(*accuracy), rate(*normalized_accuracy), "-".into(), "-".into()]
                }
                TaskReport::Generation { reward, ended, tokens, .. } => {
                    [interval(*reward, 4), "-".into(), rate(*ended), format!("{tokens:.1}")]
                }
            };
            let count = found.questions().to_string();
            [name.clone(), model.name.clone(), count, score, per_letter, ended, tokens]
        }));
    }
    if rows.len() == 1 {
        return String::new();
    }
    rows[1..].sort();
    format!("\n{}", super::models::align(rows))
}
