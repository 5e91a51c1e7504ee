//! The judge against people, and answers before and after training.

use super::super::judge::{Comparison, Judgement};
use super::super::sampler::encoded;
use super::super::{Event, TrainError};
use super::pipeline::{Pipeline, Purpose, is_helpful, message, messages};
use super::stats::Calibration;
use super::table::Table;
use crate::dataset::{DatasetKind, Example, Line, Lines, parse};
use crate::grade::Context;
use crate::train::data::PreparedPrompts;
use crate::train::model::{Batch, Wanted};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;

const EVALUATION: Purpose = Purpose(0x6576_616c);
const HUMAN: Purpose = Purpose(0x6875_6d61);

/// The question about answers to prompts that are marked as helpful.
pub(super) const HELPFULNESS: (&str, &str) = ("helpfulness", "Which answer helps the person more?");

/// When the evaluation prompts are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Before,
    After,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
        }
    }
}

/// A row of `judge.jsonl`: a pair labelled by people, and the judge's opinion of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct HumanRow {
    pub messages: Value,
    pub chosen: String,
    pub rejected: String,
    /// Of the answer that people chose, compared with the other one.
    pub judgement: Option<Judgement>,
}

/// A row of `before.jsonl` and `after.jsonl`: an answer to an evaluation prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Answered {
    pub prompt: usize,
    pub messages: Value,
    pub helpful: bool,
    pub answer: String,
    pub tokens: usize,
    pub ended: bool,
    /// Rewards of the graders.
    #[serde(default)]
    pub rewards: BTreeMap<String, f64>,
    /// The mean over the answer's tokens of ln p(token) less that of the model before training, in
    /// nats; the mean over answers estimates the KL divergence per token.
    #[serde(default)]
    pub log_prob_gap: f64,
}

/// A row of `evaluation.jsonl`: the answers before and after training, compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Evaluated {
    pub before: Answered,
    pub after: Answered,
    /// Of the answer after training, compared with the one before. `None`: the answers are equal, or
    /// the judge gave no answer.
    pub judgement: Option<Judgement>,
}

impl Evaluated {
    /// 1 if the answer after training is better, 0 if it is worse. 0.5: the judge names another
    /// answer in the other order, prefers none, gives no answer, or both answers are equal.
    pub(super) fn score(&self) -> f64 {
        match &self.judgement {
            Some(found) if found.consistent() && found.probability() > 0.5 => 1.0,
            Some(found) if found.consistent() && found.probability() < 0.5 => 0.0,
            _ => 0.5,
        }
    }
}

/// How well the judge agrees with people; `None` without pairs labelled by people.
///
/// # Errors
/// If the judge is not available, or a file cannot be read or written.
pub(super) fn measure_judge(
    pipeline: &Pipeline,
    event: &mut dyn FnMut(Event),
) -> Result<Option<Calibration>, TrainError> {
    let Some(path) = pipeline.job.making.human else { return Ok(None) };
    let (pairs, skipped) = human_pairs(path, pipeline.block.human_pairs)?;
    if pairs.is_empty() {
        return Err(TrainError::Spec(
            "data.human: no pair can be compared: the two conversations of a pair must differ in \
             their last message only, a text"
                .into(),
        ));
    }
    if skipped > 0 {
        let text = format!(
            "{skipped} pairs of data.human were left out: they differ before their last message, or \
             it is not a string."
        );
        event(Event::Note { text });
    }
    let mut table = Table::open(&pipeline.file("judge.jsonl"))?;
    let done = table.rows.len();
    pipeline.batches("Human labels compared", done, pairs.len(), event, |batch| {
        let mut rows: Vec<HumanRow> = batch.iter().map(|&at| pairs[at].clone()).collect();
        let asked = batch.iter().zip(&rows).map(|(&at, row)| {
            let principle = pipeline.principle(pipeline.seed(HUMAN, at));
            Comparison {
                messages: &row.messages,
                principle: &principle.name,
                question: &principle.comparison,
                answers: [&row.chosen, &row.rejected],
            }
        });
        let found = pipeline.judge.compare(&asked.collect::<Vec<_>>())?;
        rows.iter_mut().zip(found).for_each(|(row, found)| row.judgement = found);
        Ok(table.append(rows)?)
    })?;
    let judged = table.rows.iter().filter_map(|row| row.judgement.as_ref());
    let judged: Vec<_> = judged.map(|found| (found.probability(), found.consistent())).collect();
    let found = Calibration::of(&judged);
    if let Some(Calibration { accuracy, near_chance, .. }) = &found {
        let mut text = format!(
            "The judge prefers what people prefer in {:.0}% of {} pairs (95% interval {:.0}% to \
             {:.0}%).",
            100.0 * accuracy.value,
            accuracy.count,
            100.0 * accuracy.low,
            100.0 * accuracy.high
        );
        if *near_chance {
            text += " This is no better than chance: do not trust its labels. Use a larger judge, or \
                     principles that it can decide.";
        }
        event(Event::Note { text });
    }
    Ok(found)
}

/// The pairs, and how many were left out.
fn human_pairs(path: &std::path::Path, most: usize) -> Result<(Vec<HumanRow>, usize), TrainError> {
    let mut lines = Lines::open(path)?;
    let (mut pairs, mut skipped) = (Vec::new(), 0);
    loop {
        let chunk = lines.next_chunk()?;
        if chunk.is_empty() || pairs.len() >= most {
            break;
        }
        for (number, line) in &chunk {
            let parsed = line.as_ref().map_err(Clone::clone);
            let parsed = parsed.and_then(|line| parse(line, DatasetKind::Preference));
            match parsed {
                Ok((_, Line::Pair(pair))) => match row_of(&pair.chosen, &pair.rejected) {
                    Some(row) => pairs.push(row),
                    None => skipped += 1,
                },
                Ok(_) => {}
                Err(why) => {
                    return Err(TrainError::Spec(format!("data.human: line {number}: {why}")));
                }
            }
        }
    }
    pairs.truncate(most);
    Ok((pairs, skipped))
}

/// A pair of conversations that differ in their last message only.
fn row_of(chosen: &Example, rejected: &Example) -> Option<HumanRow> {
    let split = |example: &Example| match example {
        Example::Chat(chat) => {
            let (last, before) = chat.messages.split_last()?;
            Some((last["content"].as_str()?.to_owned(), before.to_vec()))
        }
        Example::Completion { prompt, completion } => {
            Some((completion.clone(), vec![message("user", prompt)]))
        }
        Example::Text(_) => None,
    };
    let ((chosen, messages), (rejected, others)) = (split(chosen)?, split(rejected)?);
    let differ = messages == others && chosen != rejected;
    differ.then(|| HumanRow { messages: json!(messages), chosen, rejected, judgement: None })
}

/// The prompts of the evaluation: the validation data, or else the training data.
fn evaluation_data<'a>(pipeline: &Pipeline<'a>) -> &'a PreparedPrompts {
    pipeline.job.validation.unwrap_or(pipeline.job.train)
}

/// Answers to the evaluation prompts with the current weights, with rewards and the gap to the
/// initial model.
///
/// # Errors
/// If the model is not available, or a file cannot be written.
pub(super) fn answers(
    pipeline: &Pipeline,
    phase: Phase,
    event: &mut dyn FnMut(Event),
) -> Result<Vec<Answered>, TrainError> {
    let data = evaluation_data(pipeline);
    let name = phase.name();
    let mut table = Table::open(&pipeline.file(&format!("{name}.jsonl")))?;
    let total = data.len().min(pipeline.block.eval_prompts);
    pipeline.calls.export()?;
    let what = format!("Evaluation answers ({name} training)");
    pipeline.batches(&what, table.rows.len(), total, event, |batch| {
        let items: Vec<_> = batch.iter().map(|&at| data.get(at)).collect::<Result<_, _>>()?;
        let conversations: Vec<_> = items.iter().map(|prompt| messages(&prompt.item)).collect();
        let seeds: Vec<_> = batch.iter().map(|&at| pipeline.seed(EVALUATION, at)).collect();
        let sampled = pipeline.sample(&conversations, &seeds, 1)?;
        let mut rows = Vec::with_capacity(batch.len());
        for (((&prompt, item), conversation), found) in
            batch.iter().zip(&items).zip(conversations).zip(sampled)
        {
            let answer = found.and_then(|found| found.into_iter().next()).unwrap_or_default();
            rows.push(Answered {
                prompt,
                messages: json!(conversation),
                helpful: is_helpful(&item.item),
                rewards: rewards(pipeline, &item.item, &answer.text)?,
                log_prob_gap: match phase {
                    Phase::Before => 0.0,
                    Phase::After => gap(pipeline, &item.tokens, &answer.tokens)?,
                },
                tokens: answer.tokens.len(),
                ended: answer.ended,
                answer: answer.text.trim().to_owned(),
            });
        }
        Ok(table.append(rows)?)
    })?;
    Ok(table.rows)
}

/// Rewards of an answer, without those of graders that failed.
fn rewards(
    pipeline: &Pipeline,
    item: &Value,
    answer: &str,
) -> Result<BTreeMap<String, f64>, TrainError> {
    let context = Context::new(item, answer);
    let mut found = BTreeMap::new();
    for (name, grader) in &pipeline.block.graders {
        let questions = grader.questions(&context);
        let answers = match questions.is_empty() {
            true => Vec::new(),
            false => pipeline.calls.query(&questions)?,
        };
        let graded = grader.grade(&context, &answers);
        if graded.reasons.is_empty() {
            found.insert(name.clone(), graded.reward);
        }
    }
    Ok(found)
}

fn gap(pipeline: &Pipeline, prompt: &[u32], answer: &[u32]) -> Result<f64, TrainError> {
    if answer.is_empty() {
        return Ok(0.0);
    }
    let batch = Batch::of([&encoded(prompt, answer)]);
    let sum = || -> Result<f64, TrainError> {
        let temperature = pipeline.block.temperature;
        let wanted = Wanted { temperature, ..Wanted::LOG_PROBS };
        Ok(pipeline.job.model.outputs(&batch, wanted)?.log_probs.iter().sum())
    };
    let gap = sum()? - pipeline.reference.with(pipeline.job.model, sum)?;
    Ok(gap / answer.len() as f64)
}

/// Compares the answers before and after training.
///
/// # Errors
/// If the judge is not available, or a file cannot be written.
pub(super) fn evaluate(
    pipeline: &Pipeline,
    before: &[Answered],
    after: &[Answered],
    event: &mut dyn FnMut(Event),
) -> Result<Vec<Evaluated>, TrainError> {
    let mut table = Table::open(&pipeline.file("evaluation.jsonl"))?;
    let (done, total) = (table.rows.len(), before.len().min(after.len()));
    pipeline.batches("Evaluation answers compared", done, total, event, |batch| {
        let row = |&at: &usize| Evaluated {
            before: before[at].clone(),
            after: after[at].clone(),
            judgement: None,
        };
        let mut rows: Vec<Evaluated> = batch.iter().map(row).collect();
        let open: Vec<usize> =
            (0..rows.len()).filter(|&at| rows[at].before.answer != rows[at].after.answer).collect();
        let asked = |&at: &usize| {
            let Evaluated { before, after, .. } = &rows[at];
            let (principle, question) = match before.helpful {
                true => HELPFULNESS,
                false => {
                    let found = pipeline.principle(pipeline.seed(EVALUATION, before.prompt));
                    (&*found.name, &*found.comparison)
                }
            };
            let answers = [&*after.answer, &*before.answer];
            Comparison { messages: &before.messages, principle, question, answers }
        };
        let found = pipeline.judge.compare(&open.iter().map(asked).collect::<Vec<_>>())?;
        open.iter().zip(found).for_each(|(&at, found)| rows[at].judgement = found);
        Ok(table.append(rows)?)
    })?;
    Ok(table.rows)
}
