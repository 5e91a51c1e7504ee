//! `ingot verify MODEL`: how far the runners' rounding moves a model's predictions.
//!
//! It runs in this process, so a hostile file that makes llama.cpp abort ends the command.

use super::progress::{spinner, token_bar};
use super::{CliError, fetch, read_text};
use crate::config::{ByteSize, DataDirOption};
use crate::gateway::memory;
use crate::gateway::store::{DEFAULT_MODEL, Store};
use crate::gguf::{Gguf, dequantized_bytes};
use crate::job::{VERIFY_WINDOW, VerifyError, VerifyPlan, VerifyProgress, VerifyReport};
use indicatif::ProgressBar;
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `ingot verify`.
#[derive(Debug, clap::Args)]
pub struct VerifyOptions {
    /// A file, hf:org/repo/file.gguf, an alias, or a name of `ingot models`
    #[arg(value_name = "MODEL", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// Tokens of the text to read, at most
    #[arg(long, default_value = "20000", value_name = "N")]
    pub tokens: NonZeroUsize,
    /// Text to read, UTF-8 [default: a sample of some 2,500 tokens that is built in]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Also write the report to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub data: DataDirOption,
}

/// Measures with `verify`, prints the table, writes the JSON. Exit code 1 if a bound is missed.
pub fn main(
    options: VerifyOptions,
    verify: impl FnOnce(
        &VerifyPlan,
        &mut dyn FnMut(VerifyProgress),
    ) -> Result<VerifyReport, VerifyError>,
) -> Result<ExitCode, CliError> {
    let store = Store::open(&options.data.clone().resolve()?)?;
    let model = fetch(&store, &options.model)?;
    check_memory(&model)?;
    let text = options.text.as_deref().map(read_text).transpose()?;
    let plan = VerifyPlan {
        model,
        text,
        tokens: options.tokens.get(),
        window: VERIFY_WINDOW,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        folder: store.folder().to_owned(),
    };
    let mut bar = Bar::default();
    let result = verify(&plan, &mut |progress| bar.show(progress));
    bar.0.finish_and_clear();
    let report = result.map_err(|error| CliError::message(say(&error)))?;
    print!("{}", table(&report));
    if report.rows < options.tokens.get() {
        eprintln!("The text has only {} tokens; --text FILE reads a longer one.", report.rows);
    }
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report).expect("the report is plain data");
        std::fs::write(path, text + "\n").map_err(|error| {
            let path = path.display();
            CliError::message(format!("The report cannot be written to {path}: {error}."))
        })?;
    }
    Ok(if report.passed() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The F32 weights are there twice, in llama.cpp's mapping and packed for the native runner, and the
/// file's own as well.
fn check_memory(model: &Path) -> Result<(), CliError> {
    let file = Gguf::open_header(model)
        .map_err(|error| CliError::message(format!("The model cannot be verified: {error}.")))?;
    let exact = dequantized_bytes(&file);
    let needed = exact.saturating_mul(2).saturating_add(file.file_size().saturating_mul(2));
    let available = memory::available();
    if needed > available {
        return Err(CliError::message(format!(
            "F32 arithmetic on this model needs about {} of memory, but {} is available: verify a \
             smaller model of the same type, or on a bigger machine.",
            ByteSize(needed),
            ByteSize(available)
        )));
    }
    Ok(())
}

fn say(error: &VerifyError) -> String {
    match error {
        VerifyError::Disk { needed, free, folder } => format!(
            "The copy of the model in F32 needs {} in {folder}, where {} are free: make room, or \
             name another --data-dir.",
            ByteSize(*needed),
            ByteSize(*free)
        ),
        other => format!("{other}."),
    }
}

/// A spinner while things load, then a bar of tokens.
struct Bar(ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        Self(ProgressBar::hidden())
    }
}

impl Bar {
    fn show(&mut self, progress: VerifyProgress) {
        let text = match progress {
            VerifyProgress::Writing(bytes) => {
                format!("writing the weights in F32 ({})", ByteSize(bytes))
            }
            VerifyProgress::Loading(name) => format!("loading: {name}"),
            VerifyProgress::Reading { done, total } => {
                if self.0.length() != Some(total as u64) {
                    self.0.finish_and_clear();
                    self.0 = token_bar(total as u64);
                }
                self.0.set_position(done as u64);
                return;
            }
        };
        self.0.finish_and_clear();
        self.0 = spinner(text);
        self.0.tick();
    }
}

fn table(report: &VerifyReport) -> String {
    let mut text = String::new();
    let parameters = report.parameters as f64 / 1e6;
    let VerifyReport { architecture, quantization, rows, window, .. } = report;
    let _ = writeln!(
        text,
        "{architecture} {parameters:.0}M {quantization}, {rows} tokens in windows of {window}, \
         against F32 arithmetic on the dequantized weights\n\n\
         {:<16}{:>12}{:>12}{:>12}{:>9}{:>12}{:>10}",
        "RUNNER", "MEAN KL", "P99 KL", "MAX KL", "TOP-1", "PERPLEXITY", "CHANGE"
    );
    let perplexity = report.reference_perplexity;
    let _ = writeln!(
        text,
        "{:<16}{:>12}{:>12}{:>12}{:>9}{perplexity:>12.4}{:>10}",
        "reference", "-", "-", "-", "-", "-"
    );
    for runner in &report.runners {
        let _ = writeln!(
            text,
            "{:<16}{:>12}{:>12}{:>12}{:>8.2}%{:>12.4}{:>+9.3}%",
            runner.runner,
            number(runner.mean_kl),
            number(runner.p99_kl),
            number(runner.max_kl),
            runner.top1_agreement_percent,
            runner.perplexity,
            runner.perplexity_difference_percent
        );
    }
    text.push('\n');
    if let Some(reason) = &report.native_missing {
        let _ = writeln!(text, "The native runner does not cover this model: {reason}.");
    }
    for check in &report.checks {
        let verdict = if check.passed { "ok  " } else { "FAIL" };
        let (value, bound) = (number(check.value), number(check.bound));
        let _ = writeln!(text, "{verdict}  {}: {value}, bound {bound}", check.what);
    }
    text
}

/// Three significant digits, where plain ones would be zeros as powers of ten.
fn number(value: f64) -> String {
    match value.abs() {
        small if small < 1e-4 => format!("{value:.2e}"),
        small if small < 1.0 => format!("{value:.5}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{RunnerSummary, VerifyCheck};

    #[test]
    fn the_table_is_aligned_and_ends_with_verdicts() {
        let report = VerifyReport {
            architecture: "llama".into(),
            quantization: "Q4_1".into(),
            parameters: 134_515_008,
            rows: 20_000,
            window: 512,
            reference_perplexity: 31.25,
            runners: vec![RunnerSummary {
                runner: "native",
                mean_kl: 0.003_12,
                p99_kl: 0.021,
                max_kl: 1.5,
                top1_agreement_percent: 96.125,
                perplexity: 31.3,
                perplexity_difference_percent: 0.16,
            }],
            native_missing: None,
            checks: vec![
                VerifyCheck { what: "small".into(), value: 2e-7, bound: 1e-5, passed: true },
                VerifyCheck { what: "large".into(), value: 0.6, bound: 0.5, passed: false },
            ],
        };
        let expected = "\
llama 135M Q4_1, 20000 tokens in windows of 512, against F32 arithmetic on the dequantized weights

RUNNER               MEAN KL      P99 KL      MAX KL    TOP-1  PERPLEXITY    CHANGE
reference                  -           -           -        -     31.2500         -
native               0.00312     0.02100       1.500   96.12%     31.3000   +0.160%

ok    small: 2.00e-7, bound 1.00e-5
FAIL  large: 0.60000, bound 0.50000
";
        assert_eq!(table(&report), expected);
        assert!(!report.passed());
    }
}
