//! Graders: what an answer is worth, as OpenAI's reinforcement fine-tuning specifies them, and some
//! of our own.
//!
//! A [`Grader`] is parsed once, strictly. It does no IO: some graders need a model to be asked, and
//! say what in [`Grader::questions`]; whoever holds a model answers, and [`Grader::grade`] turns the
//! answers into a [`Graded`]. So a server and a job share every line here.
//!
//! | kind | what it rewards | file |
//! |---|---|---|
//! | `string_check` | equal, unequal, containing | [`checks`] |
//! | `text_similarity` | fuzzy match, BLEU, GLEU, ROUGE | [`text`] |
//! | `number_match` | the number that the answer comes to | [`number`] |
//! | `json_schema` | JSON that a schema accepts | [`schema`] |
//! | `length` | so many characters or words | [`checks`] |
//! | `regex` | text that a pattern matches | [`checks`] |
//! | `score_model` | what a model says when asked for a number | [`judges`] |
//! | `reward_model` | a reward model's score | [`judges`] |
//! | `multi` | a formula over up to 32 of the others | [`formula`] |
//!
//! Texts of a grader are templates over the item and the sample ([`template`]). A grader that cannot
//! be computed is worth 0 and sets a flag of [`Errors`]; inside a `multi` it counts as 0 in the
//! formula. `number_match`, `json_schema`, `length`, `regex` and `reward_model` are ours.

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

pub use judges::{Ask, Message, Question, Sampling};
pub use template::Context;

/// How many graders one `multi` may hold.
pub const MOST_GRADERS: usize = 32;

/// Why a grader is refused: the key at fault, such as `grader.graders.a.operation`, and what is
/// wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct GraderError {
    pub param: String,
    pub message: String,
}

/// A grader that was found valid. It is written as JSON in its normal form: every default filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct Grader {
    name: String,
    /// One grader, or those of a `multi` by their keys, in the order given.
    leaves: Vec<(String, Leaf)>,
    /// What a `multi` computes of its graders.
    formula: Option<Formula>,
}

/// What a model made of a [`Question`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// The number it gave, or the score; `None` if its text could not be read as a number.
    pub number: Option<f64>,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// Why there is no answer to a [`Question`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    /// The model declined; else it could not be asked.
    pub refused: bool,
    pub message: String,
}

/// What an answer is worth.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graded {
    /// Finite, and 0 if the grader failed.
    pub reward: f64,
    /// Of each grader of a `multi` by its key; empty for any other grader.
    pub sub_rewards: BTreeMap<String, f64>,
    pub errors: Errors,
    /// What the flags of `errors` mean here, a sentence for each grader that failed.
    pub reasons: Vec<String>,
    /// Tokens used by each model that was asked, failed gradings included.
    pub usage: BTreeMap<String, Usage>,
}

/// Tokens of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// The flags of OpenAI's `GraderRunResponse.metadata.errors`. Those of the Python grader, of
/// truncated observations and of unresponsive rewards are never set here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Errors {
    /// The formula has no finite value for these sub-rewards.
    pub formula_parse_error: bool,
    /// The sample is not JSON, and the template asks for a part of it.
    pub sample_parse_error: bool,
    pub truncated_observation_error: bool,
    pub unresponsive_reward_error: bool,
    /// What a template names is not there, or is not what the grader needs.
    pub invalid_variable_error: bool,
    /// A limit was exceeded.
    pub other_error: bool,
    pub python_grader_server_error: bool,
    pub python_grader_server_error_type: Option<String>,
    pub python_grader_runtime_error: bool,
    pub python_grader_runtime_error_details: Option<String>,
    pub model_grader_server_error: bool,
    pub model_grader_refusal_error: bool,
    /// The model gave no number, or one outside the range.
    pub model_grader_parse_error: bool,
    pub model_grader_server_error_details: Option<String>,
}

/// Why a grader has no value here: the flag to set, and a sentence.
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
                // The first is told: the others are mostly the same.
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
    /// A grader's value, or 0 with the fault noted.
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
    /// Reads a grader that stands at `grader` in what the client sent.
    ///
    /// # Errors
    /// Names the first key at fault: unknown, missing, of a wrong type or out of its bounds.
    pub fn parse(value: Value) -> Result<Self, GraderError> {
        Self::parse_at("grader", value)
    }

    /// As [`Grader::parse`], for a grader that stands at `path`: errors name it so.
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

    /// Its `name`; where none was given, its kind.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its `type`, such as `string_check`.
    pub fn kind(&self) -> &'static str {
        match (&self.formula, self.leaves.first()) {
            (None, Some((_, leaf))) => leaf.kind(),
            _ => MULTI,
        }
    }

    /// The models it asks, each once: those to be there before a job starts. With each, whether it
    /// must be a reward model.
    pub fn models(&self) -> BTreeMap<&str, bool> {
        let models = self.leaves.iter().filter_map(|(_, leaf)| leaf.model());
        let mut all = BTreeMap::new();
        for (model, reward) in models {
            *all.entry(model).or_default() |= reward;
        }
        all
    }

    /// Why a template of this grader cannot be filled from an item, whatever the sample is.
    pub fn missing_key(&self, item: &Value) -> Option<String> {
        self.leaves.iter().find_map(|(key, leaf)| {
            let why = template::missing_key(&leaf.value(), item)?;
            Some(format!("{key}: {why}"))
        })
    }

    /// What models are to be asked about a sample, in the order in which [`Grader::grade`] wants the
    /// answers. A question whose templates cannot be filled is not asked.
    pub fn questions(&self, context: &Context<'_>) -> Vec<Question> {
        let questions = self.leaves.iter().filter_map(|(_, leaf)| leaf.question(context));
        questions.filter_map(Result::ok).collect()
    }

    /// What a sample is worth. `answers` are those to the [`Grader::questions`] of the same context,
    /// in their order; one that is missing counts as a model that could not be asked.
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
