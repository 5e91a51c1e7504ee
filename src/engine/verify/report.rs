//! The report of `ingot verify`, and the bounds that it checks.

use super::divergence::{Divergence, Reference};
use super::{LLAMA_CPP, NATIVE, PROOF, Side};
use crate::gguf::ModelFacts;
use serde::Serialize;

/// Largest mean KL between two programs that compute the same in F32.
const EXACT: f64 = 1e-5;
/// Largest ratio of the native runner's mean KL to llama.cpp's.
const RATIO: f64 = 1.1;
/// Largest difference of the perplexity, in percent.
const PERPLEXITY: f64 = 0.5;

/// One runner compared with the reference.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
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
pub struct Check {
    pub what: String,
    pub value: f64,
    pub bound: f64,
    pub passed: bool,
}

/// The complete report.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub architecture: String,
    pub quantization: String,
    pub parameters: u64,
    /// Number of rows compared: the text's tokens, plus BOS before each window if the model uses
    /// it.
    pub rows: usize,
    pub window: usize,
    pub reference_perplexity: f64,
    pub runners: Vec<Summary>,
    /// The reason why the native runner was not measured.
    pub native_missing: Option<String>,
    pub checks: Vec<Check>,
}

impl Report {
    pub(super) fn new(
        facts: &ModelFacts,
        exact: bool,
        native_missing: Option<String>,
        window: usize,
        reference: &Reference,
        sides: &[Side],
    ) -> Self {
        let perplexity = reference.likelihood.perplexity();
        let runners: Vec<_> = sides
            .iter()
            .map(|side| Summary::new(side.name, &side.divergence, perplexity))
            .collect();
        Self {
            architecture: facts.architecture.clone(),
            quantization: facts.quantization.clone(),
            parameters: facts.parameters,
            rows: sides.first().map_or(0, |side| side.divergence.kl.len()),
            window,
            reference_perplexity: perplexity,
            checks: checks(&runners, exact),
            runners,
            native_missing,
        }
    }

    /// Whether every check passed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed)
    }

    pub fn runner(&self, name: &str) -> Option<&Summary> {
        self.runners.iter().find(|summary| summary.runner == name)
    }
}

impl Summary {
    fn new(runner: &'static str, divergence: &Divergence, reference: f64) -> Self {
        let perplexity = divergence.likelihood.perplexity();
        let rows = divergence.kl.len().max(1) as f64;
        Self {
            runner,
            mean_kl: divergence.mean(),
            p99_kl: divergence.quantile(0.99),
            max_kl: divergence.quantile(1.0),
            top1_agreement_percent: divergence.same_best as f64 / rows * 100.0,
            perplexity,
            perplexity_difference_percent: (perplexity / reference - 1.0) * 100.0,
        }
    }
}

/// `exact`: the file itself is in F32.
fn checks(runners: &[Summary], exact: bool) -> Vec<Check> {
    let find = |name: &str| runners.iter().find(|summary| summary.runner == name);
    let mut checks = Vec::new();
    let mut check = |what: String, value: f64, bound: f64| {
        // A NaN fails every check.
        checks.push(Check { what, value, bound, passed: value <= bound });
    };
    if let Some(proof) = find(PROOF) {
        check("native and llama.cpp agree in F32: mean KL".into(), proof.mean_kl, EXACT);
    }
    let native = find(NATIVE);
    match (native, find(LLAMA_CPP)) {
        (Some(native), _) if exact => {
            check("native, F32 model: mean KL".into(), native.mean_kl, EXACT);
        }
        (Some(native), Some(peer)) => {
            // Below EXACT both values are F32 rounding noise.
            let bound = (peer.mean_kl * RATIO).max(EXACT);
            check(format!("native: mean KL, at most {RATIO}x llama.cpp's"), native.mean_kl, bound);
        }
        _ => {}
    }
    if let Some(serving) = native.or(find(LLAMA_CPP)) {
        let what = format!("{}: perplexity differs by, percent", serving.runner);
        check(what, serving.perplexity_difference_percent.abs(), PERPLEXITY);
    }
    checks
}
