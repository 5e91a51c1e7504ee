//! The report of `ingot verify`, and the bounds that it checks.

use super::divergence::{Divergence, Reference};
use super::{LLAMA_CPP, NATIVE, PROOF, Side};
use crate::gguf::ModelFacts;
use crate::job::{RunnerSummary, VerifyCheck, VerifyReport};

/// Largest mean KL between two programs that compute the same in F32.
const EXACT: f64 = 1e-5;
/// Largest ratio of the native runner's mean KL to llama.cpp's, at its default activations.
const RATIO: f64 = 0.75;
/// Largest difference of the perplexity, in percent.
const PERPLEXITY: f64 = 0.5;

/// The report on all runners. `exact`: the file itself is in F32.
pub(super) fn report(
    facts: &ModelFacts,
    exact: bool,
    native_missing: Option<String>,
    window: usize,
    reference: &Reference,
    sides: &[Side],
) -> VerifyReport {
    let perplexity = reference.likelihood.perplexity();
    let runners: Vec<_> =
        sides.iter().map(|side| summary(side.name, &side.divergence, perplexity)).collect();
    VerifyReport {
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

fn summary(runner: &'static str, divergence: &Divergence, reference: f64) -> RunnerSummary {
    let perplexity = divergence.likelihood.perplexity();
    let rows = divergence.kl.len().max(1) as f64;
    RunnerSummary {
        runner,
        mean_kl: divergence.mean(),
        p99_kl: divergence.quantile(0.99),
        max_kl: divergence.quantile(1.0),
        top1_agreement_percent: divergence.same_best as f64 / rows * 100.0,
        perplexity,
        perplexity_difference_percent: (perplexity / reference - 1.0) * 100.0,
    }
}

fn checks(runners: &[RunnerSummary], exact: bool) -> Vec<VerifyCheck> {
    let find = |name: &str| runners.iter().find(|summary| summary.runner == name);
    let mut checks = Vec::new();
    let mut check = |what: String, value: f64, bound: f64| {
        // A NaN fails every check.
        checks.push(VerifyCheck { what, value, bound, passed: value <= bound });
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
