//! Where the rewards of a policy's completions come from.

use crate::grade::Grader;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

/// The `type` of [`Rank`].
const RANK: &str = "rank";

/// The key `grader` of the block `grpo`.
#[derive(Debug, Clone, PartialEq)]
pub enum RewardSource {
    /// Each completion is graded on its own.
    Grader(Grader),
    Rank(Rank),
}

/// The completions of a prompt are compared with each other by a judge: each with the next one, and
/// the last one with the first, both read in both orders. The reward is the mean probability of
/// being the better one.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rank {
    pub name: String,
    /// The served model that compares.
    pub model: String,
    /// Asks which of two answers is better.
    pub question: String,
}

impl RewardSource {
    /// The grader, if completions are graded on their own.
    pub fn grader(&self) -> Option<&Grader> {
        match self {
            Self::Grader(grader) => Some(grader),
            Self::Rank(_) => None,
        }
    }
}

impl From<Grader> for RewardSource {
    fn from(grader: Grader) -> Self {
        Self::Grader(grader)
    }
}

impl<'de> Deserialize<'de> for RewardSource {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(from)?;
        if value["type"] != RANK {
            return serde_json::from_value(value).map(Self::Grader).map_err(D::Error::custom);
        }
        if let Some(keys) = value.as_object_mut() {
            keys.remove("type");
        }
        let rank: Rank = serde_json::from_value(value)
            .map_err(|error| D::Error::custom(format!("grader: {error}")))?;
        let texts = [("name", &rank.name), ("model", &rank.model), ("question", &rank.question)];
        match texts.iter().find(|(_, text)| text.trim().is_empty()) {
            Some((key, _)) => Err(D::Error::custom(format!("grader.{key}: it is empty"))),
            None => Ok(Self::Rank(rank)),
        }
    }
}

impl Serialize for RewardSource {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Grader(grader) => grader.serialize(to),
            Self::Rank(Rank { name, model, question }) => {
                json!({"type": RANK, "name": name, "model": model, "question": question})
                    .serialize(to)
            }
        }
    }
}
