//! The command line: one file per verb. `main.rs` dispatches; `serve` and `engine` live with the
//! gateway and the engine.
//!
//! | file | what |
//! |---|---|
//! | `pull.rs`, `models.rs` | models into the data folder, and what is there |
//! | `run.rs`, `run/` | a chat in the terminal, over the HTTP API like any client |
//! | `bench_serve.rs`, `bench_serve/` | load generator for any OpenAI-compatible server |
//! | `train.rs`, `train/` | a training job, here or on a server, with a progress bar |
//! | `jobs.rs` | a server's jobs |
//! | `export.rs` | models and adapters for other programs, with a model card |
//! | `publish.rs` | what a name stands for on a server |
//! | `quantize.rs`, `imatrix.rs` | models in smaller types |
//! | `eval.rs` | perplexity, KL divergence and accuracy of models |
//! | `verify.rs` | the runners' rounding, measured on a text |
//! | `version.rs` | what this binary was built from |
//! | `http.rs`, `progress.rs` | what the verbs share: a small HTTP client, progress bars |

pub mod bench_serve;
pub mod eval;
pub mod export;
mod http;
pub mod imatrix;
pub mod jobs;
pub mod models;
mod progress;
pub mod publish;
pub mod pull;
pub mod quantize;
pub mod run;
pub mod train;
pub mod verify;
pub mod version;

pub use progress::PullBar;

use crate::config::{ConfigError, HubAccess, ServeOptions};
use crate::gateway::ServeError;
use crate::gateway::store::{BadRef, ModelRef, PullError, Store, StoreError, ensure};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};

/// One binary that serves, fine-tunes and pretrains models, through an OpenAI-compatible API.
#[derive(Debug, Parser)]
#[command(name = "ingot", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve models through an OpenAI-compatible API
    Serve(Box<ServeOptions>),
    /// Ask a model once, or chat with it
    Run(run::RunOptions),
    /// Get a model into the data folder
    Pull(pull::PullOptions),
    /// List the models in the data folder
    Models(models::ModelsOptions),
    /// Train a model: here, or on a server
    Train(train::TrainOptions),
    /// List, follow and steer the jobs of a server
    Jobs(jobs::JobsOptions),
    /// Compute an importance matrix, which makes quantized models better
    Imatrix(Box<imatrix::ImatrixOptions>),
    /// Write a model in a smaller type
    Quantize(Box<quantize::QuantizeOptions>),
    /// Measure perplexity, KL divergence and accuracy of models, side by side
    Eval(Box<eval::EvalOptions>),
    /// Write a model or adapter for other programs, with a model card
    Export(Box<export::ExportOptions>),
    /// Have a name of a server stand for a model, or for a share of its requests
    Publish(publish::PublishOptions),
    /// Have a name of a server stand for the model before
    Rollback(publish::RollbackOptions),
    /// Measure how far rounding moves a model's predictions, on a text
    Verify(verify::VerifyOptions),
    /// Measure
    #[command(subcommand)]
    Bench(BenchCommand),
    /// Say what this binary was built from
    Version,
    /// The engine process; started by `ingot serve`
    #[command(hide = true)]
    Engine,
    /// A job's process; started by `ingot serve` and `ingot train`
    #[command(hide = true)]
    Job {
        /// The job's folder
        folder: std::path::PathBuf,
    },
}

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Put load on an OpenAI-compatible server and report throughput and latencies
    Serve(Box<bench_serve::BenchServeOptions>),
}

/// Why a verb failed; printed as it is.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    BadRef(#[from] BadRef),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("{0}")]
    Message(String),
}

/// The file of a model, which is pulled if it is not there.
fn fetch(store: &Store, model: &str) -> Result<PathBuf, CliError> {
    let reference = ModelRef::parse(model)?;
    let mut bar = PullBar::new(reference.model_name());
    let result = ensure(store, &reference, &HubAccess::from_env(), &mut |event| bar.show(event));
    bar.finish();
    Ok(result?.path)
}

/// A text file of the user.
fn read_text(path: &Path) -> Result<String, CliError> {
    std::fs::read_to_string(path).map_err(|error| {
        CliError::message(format!("{} cannot be read as text: {error}.", path.display()))
    })
}

impl CliError {
    fn message(text: impl Into<String>) -> Self {
        Self::Message(text.into())
    }
}
