//! `ingot train SPEC`: a training job, in this terminal or on a server.
//!
//! Without `--url` the job runs here, in a process of its own, in a folder of the data folder that
//! its specification and its data give: the same command goes on where the last one stopped.

mod alone;
pub(super) mod remote;

use super::CliError;
use super::progress::{spinner, step_bar, work_bar};
use crate::config::{DataDirOption, Secret};
use crate::job::spec::Spec;
use crate::job::{Entry, JobEvent};
use indicatif::ProgressBar;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `ingot train`.
#[derive(Debug, clap::Args)]
pub struct TrainOptions {
    /// What to train: a TOML or JSON file; paths in it are relative to its folder
    #[arg(value_name = "SPEC")]
    pub spec: PathBuf,
    /// Run the job on this server instead of here
    #[arg(long, env = "INGOT_URL")]
    pub url: Option<String>,
    /// The server's admin key
    #[arg(long, env = "INGOT_ADMIN_KEY", hide_env_values = true, requires = "url")]
    pub admin_key: Option<Secret>,
    /// Start from the beginning, whatever an earlier run of the same specification has made
    #[arg(long, conflicts_with = "url")]
    pub again: bool,
    #[command(flatten)]
    pub data: DataDirOption,
}

/// Runs the job, or has it run, to its end.
pub fn main(options: TrainOptions) -> Result<ExitCode, CliError> {
    let spec = read_spec(&options.spec)?;
    let folder = options.spec.parent().unwrap_or(Path::new("")).to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::message(format!("The runtime cannot be started: {error}.")))?;
    match options.url {
        Some(url) => runtime.block_on(remote::run(&url, options.admin_key, spec, &folder)),
        None => {
            let data = options.data.resolve()?;
            runtime.block_on(alone::run(&data, spec, &folder, options.again))
        }
    }
}

/// Reads a specification. A constitution that it names by its file is read too.
///
/// # Errors
/// If a file cannot be read, or the key that is wrong.
pub fn read_spec(path: &Path) -> Result<Spec, CliError> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| CliError::message(format!("{shown} cannot be read: {error}.")))?;
    let text = text.trim_start_matches('\u{feff}');
    let invalid = |why: String| CliError::message(format!("{shown}: {}.", why.trim_end()));
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let folder = path.parent().unwrap_or(Path::new(""));
    let spec: Spec = match parse::<Value>(text, extension).map(|spec| constitution_file(&spec)) {
        Ok(Some(file)) => {
            let mut spec: Value = parse(text, extension).map_err(invalid)?;
            let file = located(folder, &file)?;
            let shown = file.display();
            let text = std::fs::read_to_string(&file)
                .map_err(|error| CliError::message(format!("{shown} cannot be read: {error}.")))?;
            spec["constitutional"]["constitution"] = parse(&text, "toml")
                .map_err(|why| CliError::message(format!("{shown}: {}.", why.trim_end())))?;
            serde_json::from_value(spec).map_err(|error| invalid(error.to_string()))?
        }
        // Parsed from the text, an error names the line.
        _ => parse(text, extension).map_err(invalid)?,
    };
    spec.resolve().map_err(invalid)?;
    Ok(spec)
}

fn parse<T: serde::de::DeserializeOwned>(text: &str, extension: &str) -> Result<T, String> {
    match extension {
        "json" => serde_json::from_str(text).map_err(|error| error.to_string()),
        "toml" => toml::from_str(text).map_err(|error| error.to_string()),
        _ => Err("its name must end in .toml or .json".to_owned()),
    }
}

/// The file of a constitution that a specification names.
fn constitution_file(spec: &Value) -> Option<String> {
    let named = spec["constitutional"]["constitution"].as_str()?;
    named.ends_with(".toml").then(|| named.to_owned())
}

/// A path of a specification, from the folder that it is in.
fn located(folder: &Path, path: &str) -> Result<PathBuf, CliError> {
    let path = folder.join(path);
    match path.is_file() {
        true => Ok(path),
        false => Err(CliError::message(format!("There is no file {}.", path.display()))),
    }
}

/// What a job says, on the terminal.
struct Screen {
    bar: ProgressBar,
    steps: bool,
}

impl Screen {
    fn new() -> Self {
        Self { bar: spinner("reading the data".to_owned()), steps: false }
    }

    fn show(&mut self, entry: &Entry) {
        match &entry.event {
            JobEvent::Step(step) => {
                if !self.steps {
                    self.bar.finish_and_clear();
                    (self.bar, self.steps) = (step_bar(step.total_steps), true);
                }
                self.bar.set_position(step.step);
                self.bar.set_message(format!(
                    "loss {:.4}  {:.0} tokens/s  {} to go",
                    step.loss,
                    step.tokens_per_second,
                    indicatif::HumanDuration(std::time::Duration::from_secs_f64(
                        step.eta_seconds.max(0.0)
                    ))
                ));
                // Nobody looks at a bar that is not drawn.
                if self.bar.is_hidden() && step.step.is_multiple_of((step.total_steps / 20).max(1))
                {
                    eprintln!("{}", entry.message);
                }
            }
            JobEvent::Progress { done, total } => {
                if self.bar.length() != Some(*total) {
                    self.bar.finish_and_clear();
                    self.bar = work_bar(*total);
                }
                self.bar.set_position(*done);
                if self.bar.is_hidden() {
                    eprintln!("{}", entry.message);
                }
            }
            _ => self.bar.suspend(|| eprintln!("{}", entry.message)),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
