//! What a verification is: how far the runners' rounding moves a model's predictions.

use crate::gguf::GgufError;
use serde::Serialize;
use std::io;
use std::path::PathBuf;

/// Tokens of a window.
pub const VERIFY_WINDOW: usize = 512;

/// The parameters of a verification.
#[derive(Debug, Clone)]
pub struct VerifyPlan {
    pub model: PathBuf,
    /// The text to evaluate. `None`: a sample of some 2,500 tokens that is built in.
    pub text: Option<String>,
    /// Number of tokens to evaluate, from the beginning of the text.
    pub tokens: usize,
    /// Most tokens of a window, which is evaluated from an empty cache.
    pub window: usize,
    pub threads: u32,
    /// Folder for the temporary F32 copy.
    pub folder: PathBuf,
}

/// The progress of a verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyProgress {
    /// Writing the F32 copy: bytes to write.
    Writing(u64),
    Loading(&'static str),
    /// Tokens that all runners have read, out of `total`.
    Reading {
        done: usize,
        total: usize,
    },
}

/// The reason why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("the model cannot be verified: {0}")]
    Gguf(#[from] GgufError),
    #[error("{0}")]
    Runner(String),
    #[error(
        "the copy of the model in F32 needs {needed} bytes in {folder}, where {free} are free: make \
         room, or choose another data folder"
    )]
    Disk { needed: u64, free: u64, folder: String },
    #[error("{folder} cannot be looked at: {source}")]
    Folder { folder: String, source: io::Error },
    #[error("the text has {0} tokens, too few to measure anything")]
    TooShort(usize),
    #[error("{0} computed a logit that is NaN or infinite")]
    NotFinite(&'static str),
}

/// One runner compared with the reference.
#[derive(Debug, Clone, Serialize)]
pub struct RunnerSummary {
    pub runner: &'static str,
    /// KL(reference || runner) over rows, in nats.
    pub mean_kl: f64,
    pub p99_kl: f64,
    pub max_kl: f64,
    /// Percentage of rows whose most probable token is also the reference's.
    pub top1_agreement_percent: f64,
    pub perplexity: f64,
    pub perplexity_difference_percent: f64,
}

/// A bound and the measured value.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyCheck {
    pub what: String,
    pub value: f64,
    pub bound: f64,
    pub passed: bool,
}

/// The complete report.
#[derive(Debug, Clone, Serialize)]
pub struct VerifyReport {
    pub architecture: String,
    pub quantization: String,
    pub parameters: u64,
    /// Number of rows compared: the text's tokens, plus BOS before each window if the model uses
    /// it.
    pub rows: usize,
    pub window: usize,
    pub reference_perplexity: f64,
    pub runners: Vec<RunnerSummary>,
    /// The reason why the native runner was not measured.
    pub native_missing: Option<String>,
    pub checks: Vec<VerifyCheck>,
}

impl VerifyReport {
    /// Whether every check passed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed)
    }

    pub fn runner(&self, name: &str) -> Option<&RunnerSummary> {
        self.runners.iter().find(|summary| summary.runner == name)
    }
}
