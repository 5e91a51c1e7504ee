//! A judge: a served model that compares answers, by the probabilities of the labels with which its
//! answer can begin (Lee et al. 2023, RLAIF, arXiv:2309.00267). A pair is read in both orders.

use super::TrainError;
use super::calls::{Calls, MAX_BACK_OFF};
use crate::grade::{Answer, Ask, Failed, Message, Question, Reasoning};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::time::Duration;

/// Number of attempts while the judge is not available for half of the questions of a batch.
const TRIES: u32 = 4;
const LOST_SHARE: f64 = 0.5;
/// Questions after which a judge that answered none with a label is refused.
const BATCH: usize = 4;

/// A served model that compares answers.
#[derive(Clone, Copy)]
pub(super) struct Judge<'a> {
    pub calls: Calls<'a>,
    pub model: &'a str,
    /// Tokens that it may write before it compares two answers, if it is to reason.
    pub reasoning: Option<u32>,
}

/// A question about two answers.
pub(super) struct Comparison<'a> {
    pub messages: &'a Value,
    /// Name of the principle, and its question.
    pub principle: &'a str,
    pub question: &'a str,
    pub answers: [&'a str; 2],
}

/// The probability that the first of two answers is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Judgement {
    pub principle: String,
    /// If the judge reads it first.
    pub shown_first: f64,
    /// If the judge reads it second.
    pub shown_second: f64,
    /// What the judge wrote before it chose, in either order, if it was asked to reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<[String; 2]>,
}

/// The probability of the first label, and what the judge wrote before.
struct Choice {
    probability: f64,
    reasoning: Option<String>,
}

impl Judgement {
    /// The mean over both orders.
    pub(super) fn probability(&self) -> f64 {
        (self.shown_first + self.shown_second) / 2.0
    }

    /// Whether the better answer is the same in both orders.
    pub(super) fn consistent(&self) -> bool {
        (self.shown_first > 0.5) == (self.shown_second > 0.5)
    }
}

impl Judge<'_> {
    /// A judgement of each pair; `None` if the judge gave none.
    ///
    /// # Errors
    /// If the judge is not available.
    pub(super) fn compare(
        &self,
        pairs: &[Comparison],
    ) -> Result<Vec<Option<Judgement>>, TrainError> {
        const REPLY: &str = "Reply with A or B only.";
        let reasoning =
            self.reasoning.map(|max_tokens| Reasoning { max_tokens, then: REPLY.into() });
        let end = if reasoning.is_some() { "Let's think step by step." } else { REPLY };
        let text = |pair: &Comparison, [a, b]: [&str; 2]| {
            format!(
                "Here is a conversation, and two answers to its last message.\n\n{}\n\nAnswer A: \
                 {}\n\nAnswer B: {}\n\n{} {end}",
                transcript(pair.messages),
                a.trim(),
                b.trim(),
                pair.question.trim(),
            )
        };
        let questions = pairs.iter().flat_map(|pair| {
            let [first, second] = pair.answers;
            [text(pair, [first, second]), text(pair, [second, first])]
        });
        let found = self.ask(questions.collect(), ["A", "B"], reasoning)?;
        let mut found = found.into_iter();
        let mut judgement = |pair: &Comparison| {
            let (first, second) = (found.next().flatten(), found.next().flatten());
            let (first, second) = (first?, second?);
            Some(Judgement {
                principle: pair.principle.to_owned(),
                shown_first: first.probability,
                shown_second: 1.0 - second.probability,
                reasoning: first.reasoning.zip(second.reasoning).map(|(one, two)| [one, two]),
            })
        };
        Ok(pairs.iter().map(&mut judgement).collect())
    }

    /// The probability that each answer responds to its conversation.
    ///
    /// # Errors
    /// If the judge is not available.
    pub(super) fn on_topic(
        &self,
        answers: &[(&Value, &str)],
    ) -> Result<Vec<Option<f64>>, TrainError> {
        let text = |(messages, answer): &(&Value, &str)| {
            format!(
                "Here is a conversation, and an answer to its last message.\n\n{}\n\nAnswer: \
                 {}\n\nDoes the answer respond to the last message? Reply with Yes or No only.",
                transcript(messages),
                answer.trim()
            )
        };
        let found = self.ask(answers.iter().map(text).collect(), ["Yes", "No"], None)?;
        Ok(found.into_iter().map(|found| found.map(|found| found.probability)).collect())
    }

    /// The probability of the first label for each question.
    fn ask(
        &self,
        questions: Vec<String>,
        labels: [&str; 2],
        reasoning: Option<Reasoning>,
    ) -> Result<Vec<Option<Choice>>, TrainError> {
        let question = |content: String| Question {
            model: self.model.to_owned(),
            ask: Ask::Choice {
                messages: vec![Message { role: "user".into(), content }],
                labels: labels.map(str::to_owned),
                reasoning: reasoning.clone(),
            },
        };
        let questions: Vec<_> = questions.into_iter().map(question).collect();
        let (mut pause, mut attempt) = (Duration::from_millis(200), 1);
        loop {
            let answers = self.calls.query(&questions)?;
            let refused = |answer: &Result<Answer, Failed>| {
                answer.as_ref().is_err_and(|failed| failed.permanent)
            };
            if let Some(Err(failed)) = answers.first()
                && answers.iter().all(refused)
            {
                return Err(TrainError::Spec(format!("the judge: {}", failed.message)));
            }
            let lost: Vec<_> = answers
                .iter()
                .filter_map(|answer| answer.as_ref().err())
                .filter(|failed| !failed.permanent)
                .collect();
            let too_many = lost.len() as f64 >= LOST_SHARE * answers.len() as f64;
            let Some(first) = lost.first().filter(|_| too_many) else {
                let choice = |answer: Result<Answer, Failed>| {
                    let Answer { number, reasoning, .. } = answer.ok()?;
                    Some(Choice { probability: number?, reasoning })
                };
                return self.check_labels(answers.into_iter().map(choice).collect(), labels);
            };
            if attempt == TRIES {
                let reason = first.message.clone();
                return Err(TrainError::Ungraded { lost: lost.len(), all: answers.len(), reason });
            }
            self.calls.wait(pause)?;
            (pause, attempt) = (MAX_BACK_OFF.min(4 * pause), attempt + 1);
        }
    }

    /// Refuses a judge that answers a whole batch with other words than the labels.
    fn check_labels(
        &self,
        found: Vec<Option<Choice>>,
        [first, second]: [&str; 2],
    ) -> Result<Vec<Option<Choice>>, TrainError> {
        if found.len() >= BATCH && found.iter().all(Option::is_none) {
            return Err(TrainError::Spec(format!(
                "the judge: the answers of `{}` begin neither with {first} nor with {second}; name \
                 a model that answers without reasoning",
                self.model
            )));
        }
        Ok(found)
    }
}

/// A conversation as text.
pub(super) fn transcript(messages: &Value) -> String {
    let line = |message: &Value| {
        let role = message["role"].as_str().unwrap_or_default();
        let name = match role {
            "assistant" => "Assistant",
            "system" | "developer" => "System",
            _ => "User",
        };
        format!("{name}: {}", content(message))
    };
    let lines: Vec<_> = messages.as_array().into_iter().flatten().map(line).collect();
    lines.join("\n\n")
}

/// The text of a message.
fn content(message: &Value) -> String {
    match &message["content"] {
        Value::String(text) => text.trim().to_owned(),
        Value::Array(parts) => {
            let texts: Vec<_> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}
