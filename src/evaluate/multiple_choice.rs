//! Questions with given answers, scored as by lm-evaluation-harness: an answer's score is the sum of
//! the log-probabilities of its tokens after the question.

use super::perplexity::nll;
use super::scorer::Scorer;
use crate::ipc::Token;
use crate::job::{EvalError, EvalTask, MultipleChoice, Rate, TaskReport};
use rayon::prelude::*;

/// Scores a task.
///
/// # Errors
/// If the model fails, or a question is longer than its context.
pub(super) fn score(
    scorer: &mut Scorer,
    task: &EvalTask,
    questions: &[MultipleChoice],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<TaskReport, EvalError> {
    let (shots, questions) = questions.split_at(task.shots.min(questions.len()));
    let solved =
        |shot: &MultipleChoice| format!("{} {}\n\n", shot.prompt, shot.choices[shot.answer]);
    let shots: String = shots.iter().map(solved).collect();
    let (mut right, mut normalized) = (0, 0);
    for (number, question) in questions.iter().enumerate() {
        progress(number, questions.len());
        let mut scores = Vec::with_capacity(question.choices.len());
        for choice in &question.choices {
            let score = continuation(scorer, &format!("{shots}{}", question.prompt), choice);
            scores.push(score.map_err(|error| match error {
                EvalError::Refused(why) => EvalError::Refused(format!(
                    "{why} (task {}, question {})",
                    task.name,
                    task.shots + number + 1
                )),
                other => other,
            })?);
        }
        let letters = question.choices.iter().map(|choice| choice.chars().count().max(1) as f64);
        let per_letter: Vec<f64> =
            scores.iter().zip(letters).map(|(score, letters)| score / letters).collect();
        right += usize::from(largest(&scores) == question.answer);
        normalized += usize::from(largest(&per_letter) == question.answer);
    }
    progress(questions.len(), questions.len());
    let rate = |count: usize| Rate::of(count as f64, questions.len());
    rate(right)
        .zip(rate(normalized))
        .map(|(accuracy, normalized_accuracy)| TaskReport::MultipleChoice {
            accuracy,
            normalized_accuracy,
        })
        .ok_or_else(|| EvalError::Refused(format!("{}: no question is left", task.name)))
}

/// The log-probability of an answer after a question, in nats.
fn continuation(scorer: &mut Scorer, prompt: &str, answer: &str) -> Result<f64, EvalError> {
    let tokenizer = scorer.tokenizer();
    // Spaces at the end of the prompt would be tokens of their own.
    let prompt = prompt.trim_end_matches(' ');
    let question = tokenizer.encode_prompt(prompt, true, false);
    let whole = tokenizer.encode_prompt(&format!("{prompt} {answer}"), true, false);
    // The answer begins where the tokens of the question end, at the first prediction at least.
    let from = question.len().clamp(1, whole.len().saturating_sub(1).max(1));
    if whole.len() > scorer.context {
        return Err(EvalError::Refused(format!(
            "{} tokens are more than the {} that the model reads: use fewer shots",
            whole.len(),
            scorer.context
        )));
    }
    let (vocabulary, mut sum) = (scorer.vocabulary(), 0.0);
    scorer.read(&whole, from - 1..whole.len() - 1, &mut |at, logits| {
        let targets: &[Token] = &whole[at + 1..];
        let rows = logits.par_chunks_exact(vocabulary).zip(targets);
        let each: Vec<f64> = rows.map(|(logits, &target)| nll(logits, target)).collect();
        sum -= each.iter().sum::<f64>();
        Ok(())
    })?;
    Ok(sum)
}

/// The index of the first of the largest values.
fn largest(values: &[f64]) -> usize {
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    values.iter().position(|value| *value == most).unwrap_or(0)
}
