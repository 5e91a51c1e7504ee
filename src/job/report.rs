//! The report of a job: one HTML page without references to other files.

use super::rollout_table::RolloutRow;
use super::{DataReport, Entry, JobEvent, JobOrder, Level, StepMetrics, plot};
use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

const PAGE: &str = include_str!("report.html");
/// Maximum numbers of warnings, samples, events and answers of a step that are shown.
const WARNINGS: usize = 50;
const SAMPLES: usize = 20;
const EVENTS: usize = 40;
const ANSWERS: usize = 64;

/// A row of the table of metrics.
#[derive(Debug, Serialize)]
struct Measure {
    name: String,
    /// First, last, lowest and highest value.
    values: [String; 4],
}

#[derive(Debug, Serialize)]
struct DataRow {
    what: &'static str,
    numbers: [u64; 6],
    digest: String,
}

#[derive(Debug, Serialize)]
struct Answers {
    step: u64,
    rows: Vec<AnswerRow>,
}

#[derive(Debug, Serialize)]
struct AnswerRow {
    prompt: String,
    completion: String,
    reward: String,
    advantage: String,
}

/// The report of a job with this status. `rollouts` are tables of the completions of some steps.
///
/// # Errors
/// If the curves cannot be drawn.
pub fn report(
    order: &JobOrder,
    status: &str,
    entries: &[Entry],
    rollouts: &[Vec<RolloutRow>],
) -> Result<String, String> {
    let mut environment = Environment::new();
    let added = environment.add_template("report.html", PAGE);
    added.map_err(|error| error.to_string())?;
    let page = environment.get_template("report.html").map_err(|error| error.to_string())?;
    let of_level = |wanted: Level| {
        let found = entries.iter().filter(
            move |entry| matches!(entry.event, JobEvent::Message { level } if level == wanted),
        );
        found.map(|entry| entry.message.as_str()).take(WARNINGS).collect::<Vec<_>>()
    };
    let samples: Vec<(u64, &str)> = entries
        .iter()
        .rev()
        .filter_map(|entry| match &entry.event {
            JobEvent::Sample { step, text } => Some((*step, text.as_str())),
            _ => None,
        })
        .take(SAMPLES)
        .collect();
    let first = entries.first().map_or(0.0, |entry| entry.at);
    let events: Vec<(String, &str)> = entries
        .iter()
        .rev()
        .take(EVENTS)
        .map(|entry| (format!("{:.1} s", entry.at - first), entry.message.as_str()))
        .collect();
    let spec = order
        .spec()
        .and_then(|spec| serde_json::to_string_pretty(&spec))
        .map_err(|error| error.to_string())?;
    let rollouts: Vec<_> = rollouts.iter().filter_map(|rows| answers(rows)).collect();
    let values = serde_json::json!({
        "name": order.name(),
        "facts": facts(order, status, entries),
        "errors": of_level(Level::Error),
        "warnings": of_level(Level::Warn),
        "measures": measures(entries),
        "plot": plot(entries, order.name())?,
        "data": data(entries),
        "rollouts": rollouts,
        "samples": samples,
        "spec": spec,
        "events": events,
    });
    page.render(Serde(&values)).map_err(|error| error.to_string())
}

fn facts(order: &JobOrder, status: &str, entries: &[Entry]) -> Vec<(&'static str, String)> {
    let mut facts = vec![
        ("job", order.id().to_owned()),
        ("kind", order.kind().to_owned()),
        ("status", status.to_owned()),
    ];
    facts.extend(order.base_model().map(|model| ("made from", model.to_owned())));
    facts.push(("Ingot", env!("CARGO_PKG_VERSION").to_owned()));
    if let (Some(first), Some(last)) = (entries.first(), entries.last()) {
        facts.push(("from the first to the last event", format!("{:.0} s", last.at - first.at)));
    }
    if let Some(step) = steps(entries).last() {
        facts.push(("steps", format!("{} of {}", step.step, step.total_steps)));
        facts.push(("tokens", step.tokens.to_string()));
        let memory = step.memory_bytes as f64 / f64::from(1 << 20);
        facts.push(("memory of the process", format!("{memory:.0} MiB")));
    }
    facts
}

fn steps(entries: &[Entry]) -> impl Iterator<Item = &StepMetrics> {
    entries.iter().filter_map(|entry| match &entry.event {
        JobEvent::Step(step) => Some(step),
        _ => None,
    })
}

/// All metrics of steps and of validation.
fn measures(entries: &[Entry]) -> Vec<Measure> {
    let mut curves: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut add = |name: &str, value: f64| curves.entry(name.into()).or_default().push(value);
    for entry in entries {
        match &entry.event {
            JobEvent::Step(step) => {
                add("loss", step.loss);
                add("grad_norm", step.grad_norm);
                add("tokens_per_second", step.tokens_per_second);
                step.accuracy.iter().for_each(|value| add("accuracy", *value));
                step.metrics.iter().for_each(|(name, value)| add(name, *value));
            }
            JobEvent::Validation(found) => {
                found.loss.iter().for_each(|value| add("validation_loss", *value));
                found.accuracy.iter().for_each(|value| add("validation_accuracy", *value));
                found.bits_per_byte.iter().for_each(|value| add("bits_per_byte", *value));
                let metrics = found.metrics.iter();
                metrics.for_each(|(name, value)| add(&format!("validation_{name}"), *value));
            }
            _ => {}
        }
    }
    let row = |(name, values): (String, Vec<f64>)| {
        let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let ends = [values.first(), values.last()].map(|value| value.copied().unwrap_or(f64::NAN));
        let [first, last] = ends;
        Measure { name, values: [first, last, lowest, highest].map(short) }
    };
    curves.into_iter().map(row).collect()
}

fn data(entries: &[Entry]) -> Vec<DataRow> {
    let row = |what, report: &DataReport| {
        let DataReport { examples, tokens, trained_tokens, longest, truncated, dropped, .. } =
            report;
        DataRow {
            what,
            numbers: [*examples, *tokens, *trained_tokens, *longest, *truncated, *dropped],
            digest: report.digest.chars().take(16).collect(),
        }
    };
    let found = entries.iter().rev().find_map(|entry| match &entry.event {
        JobEvent::Data { train, validation } => Some((train, validation)),
        _ => None,
    });
    let Some((train, validation)) = found else { return Vec::new() };
    let validation = validation.iter().map(|report| row("validation", report));
    std::iter::once(row("training", train)).chain(validation).collect()
}

/// The completions of a step, those of the highest reward first.
fn answers(rows: &[RolloutRow]) -> Option<Answers> {
    let step = rows.first()?.step;
    let mut rows: Vec<&RolloutRow> = rows.iter().collect();
    let reward = |row: &RolloutRow| row.reward.unwrap_or(f64::NEG_INFINITY);
    rows.sort_by(|a, b| reward(b).total_cmp(&reward(a)));
    let shown = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), short);
    let row = |row: &RolloutRow| AnswerRow {
        prompt: prompt_of(&row.item),
        completion: row.completion.clone(),
        reward: shown(row.reward),
        advantage: shown(row.advantage),
    };
    let rows = rows.into_iter().take(ANSWERS).map(row).collect();
    Some(Answers { step, rows })
}

/// The prompt of a line: `prompt`, or the last of its `messages`.
fn prompt_of(item: &Value) -> String {
    let last = item["messages"].as_array().and_then(|messages| messages.last());
    match last.map(|message| &message["content"]).or(item.get("prompt")) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => item.to_string(),
    }
}

/// A number with four significant digits.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        1e-3..1e6 => {
            let digits = (3 - value.abs().log10().floor() as i32).max(0) as usize;
            format!("{value:.digits$}")
        }
        _ => format!("{value:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::Spec;
    use crate::job::{EventLog, Follower, Order, Validation};

    fn order(kind: &str) -> JobOrder {
        let spec = format!(r#"{{"kind": "{kind}", "model": "m", "data": {{"train": "f"}}}}"#);
        let spec: Spec = serde_json::from_str(&spec).unwrap();
        Order::new("ftjob-1".into(), spec, "a <b> model".into(), "train".into()).into()
    }

    #[test]
    fn a_report_shows_the_job_and_escapes_its_texts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events.jsonl");
        let mut log = EventLog::open(&path).unwrap();
        let report_of_data =
            DataReport { examples: 12, digest: "ab".repeat(32), ..Default::default() };
        log.add(JobEvent::Data { train: report_of_data, validation: None }, "read").unwrap();
        log.say(Level::Warn, "a <script> in a message").unwrap();
        for step in 1..=3u64 {
            let metrics = BTreeMap::from([("reward_mean".to_owned(), 0.25 * step as f64)]);
            let step = StepMetrics {
                step,
                total_steps: 3,
                epoch: 1.0,
                loss: 1.0 / step as f64,
                accuracy: None,
                learning_rate: 1e-3,
                grad_norm: 1.0,
                tokens: 10 * step,
                tokens_per_second: 5.0,
                eta_seconds: 0.0,
                memory_bytes: 1 << 20,
                last: step == 3,
                metrics,
            };
            log.add(JobEvent::Step(step), "a step").unwrap();
        }
        let found = Validation {
            step: 3,
            loss: Some(0.5),
            accuracy: None,
            bits_per_byte: None,
            metrics: BTreeMap::new(),
        };
        log.add(JobEvent::Validation(found), "validated").unwrap();
        let entries = Follower::new(path, 0).read().unwrap();
        let item = serde_json::json!({"messages": [{"role": "user", "content": "<i>Hi</i>"}]});
        let row = |reward: Option<f64>, completion: &str| RolloutRow {
            step: 3,
            item: item.clone(),
            completion: completion.into(),
            reward,
            ..RolloutRow::default()
        };
        let rows = vec![row(None, "lost"), row(Some(0.5), "half"), row(Some(1.0), "<whole>")];
        let page = report(&order("sft"), "succeeded", &entries, &[rows]).unwrap();
        assert!(page.contains("<title>a &lt;b&gt; model</title>"), "{page}");
        assert!(page.contains("a &lt;script&gt; in a message") && !page.contains("<script"));
        assert!(page.contains("<svg") && page.contains("3 of 3") && page.contains("succeeded"));
        for number in ["0.2500", "0.7500", "0.3333", "validation_loss"] {
            assert!(page.contains(number), "{number}: {page}");
        }
        let at = |text: &str| page.find(text).unwrap_or_else(|| panic!("{text}: {page}"));
        assert!(at("&lt;whole&gt;") < at("half") && at("half") < at("lost"), "{page}");
        assert!(page.contains("&lt;i&gt;Hi&lt;"));
        // Nothing is loaded from elsewhere.
        assert!(!page.contains("src=") && !page.contains("href="), "{page}");
    }

    #[test]
    fn a_job_without_events_has_a_report() {
        let page = report(&order("sft"), "queued", &[], &[]).unwrap();
        assert!(page.contains("queued") && !page.contains("<svg"), "{page}");
    }

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (1.0, "1.000"),
            (-0.012_341, "-0.01234"),
            (123_456.7, "123457"),
            (2e-4, "2.000e-4"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(short(value), text);
        }
    }
}
