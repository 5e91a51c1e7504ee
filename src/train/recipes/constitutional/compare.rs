//! Pairs of answers, labelled by the judge.

use super::super::judge::{Comparison, Judgement};
use super::super::{Event, TrainError};
use super::pipeline::{Pipeline, Purpose, is_helpful, message, messages};
use super::revise::Revised;
use super::table::Table;
use crate::job::spec::{Constitutional, PairSource, Principle};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const PAIR: Purpose = Purpose(0x7061_6972);

/// A row of `comparisons.jsonl`: two answers to a prompt, and what the judge says of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Compared {
    pub prompt: usize,
    pub messages: Value,
    pub answers: Vec<String>,
    /// Whether each answer ended before `max_tokens`.
    pub ended: Vec<bool>,
    /// One for each principle.
    pub judgements: Vec<Judgement>,
    /// The probability that the first answer is better: the mean over principles and orders.
    pub probability: Option<f64>,
    /// Why the pair is not trained on; `null`: it is.
    pub dropped: Option<String>,
}

impl Compared {
    /// The training pair, if the row is kept; its label is the probability of the better answer.
    pub(super) fn example(&self, block: &Constitutional) -> Option<Value> {
        let (None, Some(p), [first, second]) = (&self.dropped, self.probability, &self.answers[..])
        else {
            return None;
        };
        let p = block.label(p);
        let (chosen, rejected) = if p >= 0.5 { (first, second) } else { (second, first) };
        let answer = |text: &str| [message("assistant", text)];
        Some(json!({
            "prompt": self.messages,
            "chosen": answer(chosen),
            "rejected": answer(rejected),
            "label": p.max(1.0 - p),
        }))
    }
}

/// The pairs of all training prompts that are not marked as helpful.
///
/// # Errors
/// If the model or the judge is not available, or a file cannot be written.
pub(super) fn compare(
    pipeline: &Pipeline,
    event: &mut dyn FnMut(Event),
) -> Result<Vec<Compared>, TrainError> {
    let mut table = Table::open(&pipeline.file("comparisons.jsonl"))?;
    if pipeline.block.pairs == PairSource::Revised {
        if table.rows.is_empty() {
            let revised = Table::<Revised>::open(&pipeline.file("revisions.jsonl"))?;
            table
                .append(revised.rows.iter().filter(|row| !row.helpful).map(preferred).collect())?;
        }
        return Ok(table.rows);
    }
    let mut prompts = Vec::new();
    for prompt in 0..pipeline.job.train.len() {
        if !is_helpful(&pipeline.job.train.get(prompt)?.item) {
            prompts.push(prompt);
        }
    }
    pipeline.calls.export()?;
    pipeline.batches("Pairs compared", table.rows.len(), prompts.len(), event, |batch| {
        let prompts: Vec<usize> = batch.iter().map(|&at| prompts[at]).collect();
        Ok(table.append(compared(pipeline, &prompts)?)?)
    })?;
    Ok(table.rows)
}

/// A revision, preferred to the first answer.
fn preferred(row: &Revised) -> Compared {
    Compared {
        prompt: row.prompt,
        messages: row.messages.clone(),
        answers: vec![row.last().to_owned(), row.answer.clone()],
        ended: vec![true, true],
        judgements: Vec::new(),
        probability: Some(1.0),
        dropped: row.dropped.clone(),
    }
}

fn compared(pipeline: &Pipeline, prompts: &[usize]) -> Result<Vec<Compared>, TrainError> {
    let mut conversations = Vec::with_capacity(prompts.len());
    for &prompt in prompts {
        conversations.push(messages(&pipeline.job.train.get(prompt)?.item));
    }
    let seeds: Vec<_> = prompts.iter().map(|&prompt| pipeline.seed(PAIR, prompt)).collect();
    let sampled = pipeline.sample(&conversations, &seeds, 2)?;
    let mut rows: Vec<Compared> = Vec::with_capacity(prompts.len());
    for ((&prompt, conversation), answers) in prompts.iter().zip(conversations).zip(sampled) {
        let answers = answers.unwrap_or_default();
        let ended: Vec<bool> = answers.iter().map(|answer| answer.ended).collect();
        let texts: Vec<_> = answers.iter().map(|answer| answer.text.trim().to_owned()).collect();
        let dropped = match &texts[..] {
            [] => Some("longer than the context"),
            _ if !ended.contains(&true) => Some("both answers were cut off at max_tokens"),
            [first, second] if first.is_empty() || second.is_empty() => Some("an empty answer"),
            [first, second] if first == second => Some("both answers are the same"),
            _ => None,
        };
        rows.push(Compared {
            prompt,
            messages: json!(conversation),
            answers: texts,
            ended,
            judgements: Vec::new(),
            probability: None,
            dropped: dropped.map(str::to_owned),
        });
    }
    judge(pipeline, &mut rows)?;
    Ok(rows)
}

/// Has the judge label the rows that are not dropped.
fn judge(pipeline: &Pipeline, rows: &mut [Compared]) -> Result<(), TrainError> {
    let open: Vec<usize> = (0..rows.len()).filter(|&at| rows[at].dropped.is_none()).collect();
    let drawn: Vec<Vec<&Principle>> =
        open.iter().map(|&at| principles(pipeline, rows[at].prompt)).collect();
    let mut asked = Vec::new();
    for (&at, principles) in open.iter().zip(&drawn) {
        let row = &rows[at];
        let answers = [&*row.answers[0], &*row.answers[1]];
        asked.extend(principles.iter().map(|principle| Comparison {
            messages: &row.messages,
            principle: &principle.name,
            question: &principle.comparison,
            answers,
        }));
    }
    let mut found = pipeline.judge.compare(&asked)?.into_iter();
    for (&at, principles) in open.iter().zip(&drawn) {
        let row = &mut rows[at];
        row.judgements = found.by_ref().take(principles.len()).flatten().collect();
        let count = row.judgements.len();
        let sum: f64 = row.judgements.iter().map(Judgement::probability).sum();
        row.probability = (count > 0).then(|| sum / count as f64);
        let consistent = row.judgements.iter().all(Judgement::consistent);
        row.dropped = match row.probability {
            None => Some("the judge gave no answer".into()),
            Some(0.5) => Some("the judge has no preference".into()),
            Some(_) if !consistent && !pipeline.block.keep_inconsistent => {
                Some("the better answer depends on the order".into())
            }
            Some(p) if !row.ended[usize::from(p < 0.5)] => {
                Some("the better answer was cut off at max_tokens".into())
            }
            Some(_) => None,
        };
    }
    Ok(())
}

/// Different principles, drawn by weight.
fn principles<'a>(pipeline: &Pipeline<'a>, prompt: usize) -> Vec<&'a Principle> {
    let mut drawn: Vec<&Principle> = Vec::new();
    for number in 0.. {
        if drawn.len() == pipeline.block.principles_per_pair {
            break;
        }
        let found = pipeline.principle(pipeline.seed(Purpose(PAIR.0 + 1 + number), prompt));
        // A principle of tiny weight may never be drawn: the missing ones are then taken in order.
        let all = &pipeline.block.constitution.principles;
        let found = if number < 1000 { Some(found) } else { all.get(number as usize - 1000) };
        match found {
            Some(found) if drawn.iter().all(|other| other.name != found.name) => drawn.push(found),
            Some(_) => {}
            None => break,
        }
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_label_is_the_probability_of_the_chosen_answer() {
        let block: Constitutional =
            serde_json::from_str(r#"{"constitution": "brand_tone"}"#).unwrap();
        let row = |probability, dropped: Option<&str>| Compared {
            prompt: 0,
            messages: json!([{"role": "user", "content": "q"}]),
            answers: vec!["a".into(), "b".into()],
            ended: vec![true, true],
            judgements: Vec::new(),
            probability,
            dropped: dropped.map(str::to_owned),
        };
        let example = row(Some(0.2), None).example(&block).unwrap();
        assert_eq!(example["chosen"][0]["content"], "b");
        assert_eq!(example["rejected"][0]["content"], "a");
        assert_eq!(example["label"], 0.8);
        assert_eq!(row(Some(0.9), None).example(&block).unwrap()["chosen"][0]["content"], "a");
        assert_eq!(row(Some(0.9), Some("why")).example(&block), None);
        assert_eq!(row(None, None).example(&block), None);
        let clamped = Constitutional { max_label: Some(0.75), ..block };
        assert_eq!(row(Some(0.1), None).example(&clamped).unwrap()["label"], 0.75);
        assert_eq!(row(Some(0.1), None).example(&clamped).unwrap()["chosen"][0]["content"], "b");
    }
}
