//! Graders, which compute the reward of an answer: those of OpenAI's reinforcement fine-tuning, and
//! some additional ones.
//!
//! A [`Grader`] is parsed once, strictly. It does no IO: if a grader needs a model, it returns the
//! questions from [`Grader::questions`], the caller has a model answer them, and [`Grader::grade`]
//! turns the answers into a [`Graded`]. So server and jobs share all of this code.
//!
//! | kind | what it rewards | file |
//! |---|---|---|
//! | `string_check` | equal, unequal, containing | [`checks`] |
//! | `text_similarity` | fuzzy match, BLEU, GLEU, ROUGE | [`text`] |
//! | `number_match` | the number that the answer results in | [`number`] |
//! | `json_schema` | JSON that a schema accepts | [`schema`] |
//! | `length` | a number of characters or words | [`checks`] |
//! | `regex` | text that a pattern matches | [`checks`] |
//! | `score_model` | the number that a language model answers | [`judges`] |
//! | `reward_model` | a reward model's score | [`judges`] |
//! | `multi` | a formula over up to 32 of the others | [`formula`] |
//!
//! Texts of a grader are templates over the item and the sample ([`template`]). A grader that fails
//! has the value 0 and sets a flag of [`Errors`]; inside a `multi` it counts as 0 in the formula.
//! `number_match`, `json_schema`, `length`, `regex` and `reward_model` are not in OpenAI's API.

mod checks;
mod fields;
mod formula;
mod judges;
mod leaf;
mod number;
mod schema;
mod template;
mod text;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};
use std::collections::BTreeMap;

use fields::Fields;
use formula::Formula;
use leaf::{Leaf, MULTI};

pub use judges::{Ask, Message, Question, Reasoning, Sampling};
pub use template::Context;

/// Maximum number of graders in one `multi`.
pub const MOST_GRADERS: usize = 32;

/// Reason why a grader is refused: the invalid key, such as `grader.graders.a.operation`, and the
/// error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct GraderError {
    pub param: String,
    pub message: String,
}

/// A validated grader. It is written as JSON in its normal form, with all defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Grader {
    name: String,
    /// A single grader, or those of a `multi` with their keys, in the order given.
    leaves: Vec<(String, Leaf)>,
    /// The formula of a `multi`.
    formula: Option<Formula>,
}

/// A model's answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The number that the model wrote, or the score; `None` if its text is not a number.
    pub number: Option<f64>,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// What the model wrote before it answered, if it was asked to reason.
    pub reasoning: Option<String>,
}

/// Reason why a [`Question`] has no answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// Whether the model declined to answer; otherwise it could not be asked.
    pub refused: bool,
    /// Whether the same question will fail again, such as one that is longer than the context.
    #[serde(default)]
    pub permanent: bool,
    pub message: String,
}

/// Result of grading a sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graded {
    /// Finite, and 0 if the grader failed.
    pub reward: f64,
    /// Value of each grader of a `multi`, by key; empty for other kinds.
    pub sub_rewards: BTreeMap<String, f64>,
    pub errors: Errors,
    /// One message for each grader that failed, which explains the flags of `errors`.
    pub reasons: Vec<String>,
    /// Tokens used by each model that was asked, including failed gradings.
    pub usage: BTreeMap<String, Usage>,
}

/// Number of tokens used by one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// The flags of OpenAI's `GraderRunResponse.metadata.errors`. The flags of the Python grader, of
/// truncated observations and of unresponsive rewards are never set here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Errors {
    /// The formula has no finite value for the sub-rewards.
    pub formula_parse_error: bool,
    /// The sample is not JSON, but the template refers to a part of its JSON.
    pub sample_parse_error: bool,
    pub truncated_observation_error: bool,
    pub unresponsive_reward_error: bool,
    /// A value that a template names is missing, or has a type that the grader cannot use.
    pub invalid_variable_error: bool,
    /// A limit was exceeded.
    pub other_error: bool,
    pub python_grader_server_error: bool,
    pub python_grader_server_error_type: Option<String>,
    pub python_grader_runtime_error: bool,
    pub python_grader_runtime_error_details: Option<String>,
    pub model_grader_server_error: bool,
    pub model_grader_refusal_error: bool,
    /// The model wrote no number, or a number outside the range.
    pub model_grader_parse_error: bool,
    pub model_grader_server_error_details: Option<String>,
}

/// Reason why a grader has no value: the flag to set, and a message.
#[derive(Clone, Debug, PartialEq)]
struct Fault {
    flag: Flag,
    why: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flag {
    Formula,
    Sample,
    Variable,
    Other,
    Server,
    Refusal,
    ModelParse,
}

impl Fault {
    fn new(flag: Flag, why: impl Into<String>) -> Self {
        Self { flag, why: why.into() }
    }
}

impl Errors {
    /// Whether any flag is set.
    pub fn any(&self) -> bool {
        *self != Self::default()
    }

    fn set(&mut self, fault: &Fault) {
        match fault.flag {
            Flag::Formula => self.formula_parse_error = true,
            Flag::Sample => self.sample_parse_error = true,
            Flag::Variable => self.invalid_variable_error = true,
            Flag::Other => self.other_error = true,
            Flag::Refusal => self.model_grader_refusal_error = true,
            Flag::ModelParse => self.model_grader_parse_error = true,
            Flag::Server => {
                self.model_grader_server_error = true;
                // Only the first message is kept; the others are mostly the same.
                self.model_grader_server_error_details.get_or_insert_with(|| fault.why.clone());
            }
        }
    }
}

impl Usage {
    pub fn total_tokens(&self) -> u64 {
        self.prompt_tokens.saturating_add(self.completion_tokens)
    }
}

impl Graded {
    /// A grader's value; on a fault, 0, and the fault is recorded.
    fn settle(&mut self, name: &str, value: Result<f64, Fault>) -> f64 {
        value.unwrap_or_else(|fault| {
            self.errors.set(&fault);
            self.reasons.push(format!("{name}: {}", fault.why));
            0.0
        })
    }

    fn count(&mut self, model: &str, answer: &Answer) {
        let usage = self.usage.entry(model.to_owned()).or_default();
        usage.prompt_tokens = usage.prompt_tokens.saturating_add(answer.prompt_tokens);
        usage.completion_tokens = usage.completion_tokens.saturating_add(answer.completion_tokens);
    }
}

impl Grader {
    /// Parses a grader; errors call its path `grader`.
    ///
    /// # Errors
    /// Names the first invalid key: unknown, missing, of a wrong type or out of bounds.
    pub fn parse(value: Value) -> Result<Self, GraderError> {
        Self::parse_at("grader", value)
    }

    /// As [`Grader::parse`], with another path of the grader in errors.
    ///
    /// # Errors
    /// As [`Grader::parse`].
    pub fn parse_at(path: &str, value: Value) -> Result<Self, GraderError> {
        let mut fields = Fields::of(path.to_owned(), value)?;
        let kind = leaf::kind(&mut fields)?;
        if kind == MULTI {
            return leaf::multi(fields);
        }
        let leaf = Leaf::parse(kind, kind, fields)?;
        let name = leaf.name.clone();
        Ok(Self { leaves: vec![(name.clone(), leaf)], name, formula: None })
    }

    /// The grader's `name`; by default its kind.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The grader's `type`, such as `string_check`.
    pub fn kind(&self) -> &'static str {
        match (&self.formula, self.leaves.first()) {
            (None, Some((_, leaf))) => leaf.kind(),
            _ => MULTI,
        }
    }

    /// The models that the grader needs, each once, which must exist before a job starts; for each,
    /// whether it must be a reward model.
    pub fn models(&self) -> BTreeMap<&str, bool> {
        let models = self.leaves.iter().filter_map(|(_, leaf)| leaf.model());
        let mut all = BTreeMap::new();
        for (model, reward) in models {
            *all.entry(model).or_default() |= reward;
        }
        all
    }

    /// Error message if a template of this grader cannot be filled from an item, for any sample.
    pub fn missing_key(&self, item: &Value) -> Option<String> {
        self.leaves.iter().find_map(|(key, leaf)| {
            let why = template::missing_key(&leaf.value(), item)?;
            Some(format!("{key}: {why}"))
        })
    }

    /// The questions to models about a sample, in the order in which [`Grader::grade`] expects the
    /// answers. A question whose templates cannot be filled is left out.
    pub fn questions(&self, context: &Context<'_>) -> Vec<Question> {
        let questions = self.leaves.iter().filter_map(|(_, leaf)| leaf.question(context));
        questions.filter_map(Result::ok).collect()
    }

    /// Grades a sample. `answers` are the answers to the [`Grader::questions`] of the same context,
    /// in the same order; a missing answer counts as a model that could not be asked.
    pub fn grade(&self, context: &Context<'_>, answers: &[Result<Answer, Failed>]) -> Graded {
        let mut graded = Graded::default();
        let mut answers = answers.iter();
        let mut rewards = Vec::with_capacity(self.leaves.len());
        for (key, leaf) in &self.leaves {
            let value = match leaf.question(context) {
                None => leaf.check(context),
                Some(Err(fault)) => Err(fault),
                Some(Ok(question)) => {
                    let answer = answers.next();
                    if let Some(Ok(answer)) = answer {
                        graded.count(&question.model, answer);
                    }
                    leaf.read(answer)
                }
            };
            rewards.push(graded.settle(key, value));
        }
        let Some(formula) = &self.formula else {
            graded.reward = rewards.first().copied().unwrap_or_default();
            return graded;
        };
        graded.reward = graded.settle(&self.name, formula.value(&rewards));
        let keys = self.leaves.iter().map(|(key, _)| key.clone());
        graded.sub_rewards = keys.zip(rewards).collect();
        graded
    }

    /// The normal form.
    fn value(&self) -> Value {
        match (&self.formula, self.leaves.first()) {
            (Some(formula), _) => json!({
                "type": MULTI,
                "name": self.name,
                "graders": self.leaves.iter().map(|(key, leaf)| (key.clone(), leaf.value()))
                    .collect::<serde_json::Map<_, _>>(),
                "calculate_output": formula.source(),
            }),
            (None, Some((_, leaf))) => leaf.value(),
            (None, None) => Value::Null,
        }
    }
}

impl Serialize for Grader {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Grader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(Value::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests;
