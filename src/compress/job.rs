//! The work of a job that quantizes.

use super::quantize;
use crate::job::{
    ArtifactKind, CompressError, JobEvent, JobFailure, JobWork, Level, Outcome, QuantizeOrder,
    classify, failed, write_whole,
};
use std::io;
use std::time::{Duration, Instant};

/// Least time between two events of progress.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Carries out the order. A job that is stopped starts again from its beginning.
///
/// # Errors
/// Why it failed.
pub fn carry_out(order: &QuantizeOrder, work: JobWork<'_>) -> Result<Option<Outcome>, JobFailure> {
    work.clear_artifacts()?;
    let plan = order.plan(work.folder);
    let mut told = None::<Instant>;
    let mut failure = None;
    let made = quantize(&plan, &mut |tensor| {
        work.exit_if_stopped();
        let last = tensor.number == tensor.total;
        if failure.is_some() || (!last && told.is_some_and(|told| told.elapsed() < TELL_EVERY)) {
            return;
        }
        told = Some(Instant::now());
        let event = JobEvent::Progress { done: tensor.number as u64, total: tensor.total as u64 };
        let message = format!("{} of {} tensors: {}", tensor.number, tensor.total, tensor.name);
        failure = work.log.add(event, message).err();
    });
    if let Some(error) = failure {
        return Err(error.into());
    }
    let report = made.map_err(|error| match error {
        CompressError::Refused(why) => failed("quantization_failed", None, format!("{why}.")),
        CompressError::Write { .. } => classify("io_error", None, &error),
    })?;
    for note in &report.notes {
        work.log.say(Level::Warn, note)?;
    }
    let bits = |bytes: u64| 8.0 * bytes as f64 / report.weights.max(1) as f64;
    let message = format!(
        "{:.2} bits per weight, before {:.2}; {} bytes, before {}.",
        bits(report.after),
        bits(report.before),
        report.after,
        report.before
    );
    work.log.say(Level::Info, message)?;
    let provenance = serde_json::json!({
        "job": order.id,
        "name": order.name,
        "ingot": env!("CARGO_PKG_VERSION"),
        "spec": order.spec,
        "base": {"model": order.spec.model, "sha256": order.model_sha256},
        "bytes": {"before": report.before, "after": report.after},
        "weights": report.weights,
        "notes": report.notes,
    });
    let text = serde_json::to_vec_pretty(&provenance).map_err(io::Error::from)?;
    write_whole(&work.folder.artifacts().join("provenance.json"), &text)?;
    let artifacts = vec![
        work.artifact(ArtifactKind::Model, QuantizeOrder::OUTPUT)?,
        work.artifact(ArtifactKind::Provenance, "provenance.json")?,
    ];
    Ok(Some(Outcome::Succeeded { trained_tokens: 0, artifacts }))
}
