//! The work of a job that evaluates models.

use super::evaluate;
use crate::job::{
    ArtifactKind, EvalError, EvalProgress, EvalReport, EvaluateOrder, Failure, JobEvent,
    JobFailure, JobWork, Level, Outcome, classify, failed, write_whole,
};
use std::io;
use std::time::{Duration, Instant};

/// Least time between two events of progress.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Carries out the order. A job that is stopped starts again from its beginning. A bound that is
/// missed fails the job, with the report among its artifacts.
///
/// # Errors
/// Why it failed.
pub fn carry_out(order: &EvaluateOrder, work: JobWork<'_>) -> Result<Option<Outcome>, JobFailure> {
    work.clear_artifacts()?;
    work.clear_cache()?;
    let plan = order.plan(work.folder).map_err(|fault| {
        failed("invalid_data", Some(&fault.param), format!("{}.", fault.message))
    })?;
    let mut told = None::<Instant>;
    let mut failure = None;
    let report = evaluate(&plan, &mut |progress| {
        work.exit_if_stopped();
        if failure.is_some() {
            return;
        }
        let written = match progress {
            EvalProgress::Loading(name) => work.log.say(Level::Info, format!("Loading {name}.")),
            EvalProgress::Working { what, done, total } => {
                if done != total && told.is_some_and(|told| told.elapsed() < TELL_EVERY) {
                    return;
                }
                told = Some(Instant::now());
                let event = JobEvent::Progress { done: done as u64, total: total as u64 };
                work.log.add(event, format!("{what}: {done} of {total}"))
            }
        };
        failure = written.err();
    });
    if let Some(error) = failure {
        return Err(error.into());
    }
    let report = match report {
        Ok(report) => report,
        Err(EvalError::Refused(why)) => {
            return Err(failed("evaluation_failed", None, format!("{why}.")));
        }
        Err(error) => {
            let failure = classify("io_error", None, &error);
            if let JobFailure::DiskFull(why) = &failure {
                let advice = "Make room, or create the job again with fewer evaluate.chunks.";
                work.log.say(Level::Error, format!("The disk is full: {why}. {advice}"))?;
            }
            return Err(failure);
        }
    };
    write(order, &report, &work)?;
    let artifacts = vec![
        work.artifact(ArtifactKind::Report, EvaluateOrder::JSON)?,
        work.artifact(ArtifactKind::Report, EvaluateOrder::HTML)?,
    ];
    if report.passed() {
        return Ok(Some(Outcome::Succeeded { trained_tokens: 0, artifacts }));
    }
    let missed = report.gates.iter().filter(|gate| !gate.passed).map(|gate| {
        format!("{}: {} {:.5}, bound {}", gate.model, gate.what, gate.value, gate.bound)
    });
    let message = format!("Bounds are missed: {}.", missed.collect::<Vec<_>>().join("; "));
    let failure = Failure { code: "gate_missed".into(), message, param: None };
    Ok(Some(Outcome::Failed { failure, artifacts }))
}

/// Writes the report as JSON and as HTML.
fn write(order: &EvaluateOrder, report: &EvalReport, work: &JobWork<'_>) -> Result<(), JobFailure> {
    let value = serde_json::json!({
        "job": order.id,
        "name": order.name,
        "ingot": env!("CARGO_PKG_VERSION"),
        "spec": order.spec,
        "report": report,
    });
    let text = serde_json::to_vec_pretty(&value).map_err(io::Error::from)?;
    let page = report.html().map_err(|why| failed("report_failed", None, why))?;
    let folder = work.folder.artifacts();
    write_whole(&folder.join(EvaluateOrder::JSON), &text)?;
    write_whole(&folder.join(EvaluateOrder::HTML), page.as_bytes())?;
    Ok(())
}
