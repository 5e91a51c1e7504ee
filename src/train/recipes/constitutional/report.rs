//! The report of a constitutional job: the same numbers as JSON and as an HTML page.

use super::compare::Compared;
use super::evaluate::Evaluated;
use super::revise::{Revised, is_refusal};
use super::stats::Calibration;
use crate::job::Metrics;
use crate::job::Rate;
use crate::job::spec::Constitutional;
use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;
use std::collections::BTreeMap;

const PAGE: &str = include_str!("report.html");
/// Number of revisions and of answers that are shown.
const SAMPLES: usize = 30;
/// Number of first words that make two answers alike.
const OPENING: usize = 5;

/// The numbers of a job.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    judge: String,
    /// The judge is the model that is trained.
    judges_itself: bool,
    /// The judge on pairs labelled by people.
    pub human: Option<Calibration>,
    revisions: Option<Revisions>,
    comparisons: Option<Comparisons>,
    /// Answers after training against those before, by group: all, principled (prompts not marked as
    /// helpful), helpful.
    groups: BTreeMap<&'static str, Group>,
    samples: Samples,
}

#[derive(Debug, Serialize)]
struct Revisions {
    prompts: usize,
    helpful: usize,
    kept: usize,
    /// By principle of the last round.
    principles: BTreeMap<String, Counts>,
    dropped: BTreeMap<String, usize>,
}

#[derive(Debug, Default, Serialize)]
struct Counts {
    drawn: usize,
    kept: usize,
}

#[derive(Debug, Serialize)]
struct Comparisons {
    pairs: usize,
    kept: usize,
    /// Share of the judgements whose better answer depends on the order.
    flips: Option<Rate>,
    dropped: BTreeMap<String, usize>,
}

#[derive(Debug, Serialize)]
struct Group {
    wins: usize,
    ties: usize,
    losses: usize,
    /// Wins and half of the ties.
    win_rate: Option<Rate>,
    /// Mean reward of each grader.
    rewards: BTreeMap<String, BeforeAfter>,
    tokens: BeforeAfter,
    /// Share of answers that end before `max_tokens`.
    ended: BeforeAfter,
    /// Share of stock refusals.
    refusals: BeforeAfter,
    /// Share of answers with the most frequent first words.
    boilerplate: BeforeAfter,
    /// Estimated KL divergence from the model before training, in nats per token.
    kl: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct BeforeAfter {
    before: f64,
    after: f64,
}

#[derive(Debug, Default, Serialize)]
struct Samples {
    revisions: Vec<Revised>,
    answers: Vec<Evaluated>,
}

impl Report {
    pub(super) fn new(judge: &str, judges_itself: bool) -> Self {
        Self {
            judge: judge.to_owned(),
            judges_itself,
            human: None,
            revisions: None,
            comparisons: None,
            groups: BTreeMap::new(),
            samples: Samples::default(),
        }
    }

    pub(super) fn revised(&mut self, rows: &[Revised], block: &Constitutional) {
        let names = block.constitution.principles.iter().map(|principle| principle.name.clone());
        let mut principles: BTreeMap<_, _> = names.map(|name| (name, Counts::default())).collect();
        let revised: Vec<&Revised> = rows.iter().filter(|row| !row.helpful).collect();
        for row in &revised {
            let Some(last) = row.rounds.last() else { continue };
            let counts = principles.entry(last.principle.clone()).or_default();
            counts.drawn += 1;
            counts.kept += usize::from(row.dropped.is_none());
        }
        self.samples.revisions = revised.iter().take(SAMPLES).map(|&row| row.clone()).collect();
        self.revisions = Some(Revisions {
            prompts: revised.len(),
            helpful: rows.len() - revised.len(),
            kept: revised.iter().filter(|row| row.dropped.is_none()).count(),
            principles,
            dropped: counts(revised.iter().filter_map(|row| row.dropped.as_deref())),
        });
    }

    pub(super) fn compared(&mut self, rows: &[Compared]) {
        let judgements: Vec<_> = rows.iter().flat_map(|row| &row.judgements).collect();
        let flipped = judgements.iter().filter(|judgement| !judgement.consistent()).count();
        self.comparisons = Some(Comparisons {
            pairs: rows.len(),
            kept: rows.iter().filter(|row| row.dropped.is_none()).count(),
            flips: Rate::of(flipped as f64, judgements.len()),
            dropped: counts(rows.iter().filter_map(|row| row.dropped.as_deref())),
        });
    }

    pub(super) fn evaluated(&mut self, rows: Vec<Evaluated>) {
        for (name, helpful) in [("all", None), ("helpful", Some(true)), ("principled", Some(false))]
        {
            let belongs =
                |row: &&Evaluated| helpful.is_none_or(|which| row.before.helpful == which);
            let rows: Vec<&Evaluated> = rows.iter().filter(belongs).collect();
            if !rows.is_empty() {
                self.groups.insert(name, Group::of(&rows));
            }
        }
        self.samples.answers = rows.into_iter().take(SAMPLES).collect();
    }

    /// The metrics of the job's last event.
    pub(super) fn metrics(&self) -> Metrics {
        let mut metrics = Metrics::new();
        let mut put = |name: &str, value: f64| metrics.insert(name.to_owned(), value);
        if let Some(human) = &self.human {
            put("judge_accuracy", human.accuracy.value);
        }
        for (name, group) in &self.groups {
            if let Some(rate) = &group.win_rate {
                put(&format!("win_rate_{name}"), rate.value);
            }
            for (grader, reward) in &group.rewards {
                put(&format!("{grader}_before_{name}"), reward.before);
                put(&format!("{grader}_after_{name}"), reward.after);
            }
            put(&format!("kl_{name}"), group.kl);
        }
        metrics
    }

    /// What the job's last event says.
    pub(super) fn summary(&self) -> String {
        let rate = |name: &str| {
            let rate = self.groups.get(name)?.win_rate?;
            Some(format!(
                "{name} {:.0}% ({:.0}% to {:.0}%)",
                100.0 * rate.value,
                100.0 * rate.low,
                100.0 * rate.high
            ))
        };
        let rates: Vec<_> = ["principled", "helpful"].into_iter().filter_map(rate).collect();
        format!(
            "Win rate after training against before, by the judge, with 95% intervals: {}. The \
             report is in constitutional.html.",
            rates.join(", ")
        )
    }

    /// # Errors
    /// If the page cannot be rendered.
    pub(super) fn html(&self) -> Result<String, minijinja::Error> {
        let mut environment = Environment::new();
        environment.add_filter("percent", |value: f64| format!("{:.0}%", 100.0 * value));
        environment.add_filter("short", |value: f64| format!("{value:.3}"));
        environment.add_template("report.html", PAGE)?;
        environment.get_template("report.html")?.render(Serde(self))
    }
}

impl Group {
    fn of(rows: &[&Evaluated]) -> Self {
        let scores: Vec<f64> = rows.iter().map(|row| row.score()).collect();
        let count = |score: f64| scores.iter().filter(|found| **found == score).count();
        let mean = |values: &dyn Fn(&Evaluated) -> f64| {
            rows.iter().map(|row| values(row)).sum::<f64>() / rows.len() as f64
        };
        let both = |of: &dyn Fn(&super::evaluate::Answered) -> f64| BeforeAfter {
            before: mean(&|row| of(&row.before)),
            after: mean(&|row| of(&row.after)),
        };
        let yes = |is: bool| f64::from(u8::from(is));
        let openings = |after: bool| {
            let mut counts: BTreeMap<String, usize> = BTreeMap::new();
            for row in rows {
                let answer = if after { &row.after } else { &row.before };
                *counts.entry(opening(&answer.answer)).or_default() += 1;
            }
            counts.values().copied().max().unwrap_or(0) as f64 / rows.len() as f64
        };
        let mut names: Vec<&String> = rows
            .iter()
            .flat_map(|row| row.before.rewards.keys().chain(row.after.rewards.keys()))
            .collect();
        names.sort();
        names.dedup();
        let reward = |name: &String| {
            let of = |found: Vec<f64>| found.iter().sum::<f64>() / found.len().max(1) as f64;
            BeforeAfter {
                before: of(rows
                    .iter()
                    .filter_map(|row| row.before.rewards.get(name).copied())
                    .collect()),
                after: of(rows
                    .iter()
                    .filter_map(|row| row.after.rewards.get(name).copied())
                    .collect()),
            }
        };
        Self {
            wins: count(1.0),
            ties: count(0.5),
            losses: count(0.0),
            win_rate: Rate::of(scores.iter().sum(), scores.len()),
            rewards: names.into_iter().map(|name| (name.clone(), reward(name))).collect(),
            tokens: both(&|answer| answer.tokens as f64),
            ended: both(&|answer| yes(answer.ended)),
            refusals: both(&|answer| yes(is_refusal(&answer.answer))),
            boilerplate: BeforeAfter { before: openings(false), after: openings(true) },
            kl: mean(&|row| row.after.log_prob_gap),
        }
    }
}

fn opening(answer: &str) -> String {
    let words: Vec<_> = answer.split_whitespace().take(OPENING).map(str::to_lowercase).collect();
    words.join(" ")
}

/// Reasons for which examples were dropped, with their numbers, as text.
pub(super) fn reasons<'a>(dropped: impl Iterator<Item = &'a str>) -> String {
    let counts = counts(dropped);
    let each: Vec<_> = counts.iter().map(|(why, count)| format!("{count}: {why}")).collect();
    each.join("; ")
}

fn counts<'a>(dropped: impl Iterator<Item = &'a str>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    dropped.for_each(|why| *counts.entry(why.to_owned()).or_default() += 1);
    counts
}
