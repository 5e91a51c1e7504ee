//! The block `constitutional` of a specification, and constitutions.

use super::{Dpo, Grpo, Rank, Resolved, RewardSource, Sft, Spec, TaskSettings, Weights, within};
use crate::dataset::DatasetKind;
use crate::grade::Grader;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// The constitutions that are named instead of written, with their files.
const BUILT_IN: [(&str, &str); 2] = [
    (
        "helpful_honest_harmless",
        include_str!("../../../configs/constitutions/helpful_honest_harmless.toml"),
    ),
    ("brand_tone", include_str!("../../../configs/constitutions/brand_tone.toml")),
];

/// The highest probability of a label that follows a chain of thought.
const CHAIN_OF_THOUGHT_LABEL: f64 = 0.6;

/// Constitutional AI (Bai et al. 2022, arXiv:2212.08073): a model criticizes and revises its own
/// answers under written principles and learns the revisions; then a judge compares pairs of answers
/// under the principles, and the model learns the preferences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constitutional {
    /// The name of a built-in constitution, or a constitution.
    #[serde(deserialize_with = "named_or_written")]
    pub constitution: Constitution,
    /// The served model or adapter that compares answers; by default the model that is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<String>,
    #[serde(default = "stages")]
    pub stages: Vec<Stage>,
    /// Critiques and revisions of each answer.
    #[serde(default = "one")]
    pub rounds: usize,
    /// Maximum number of tokens of an answer, a critique or a revision.
    #[serde(default = "super::grpo::max_tokens")]
    pub max_tokens: usize,
    #[serde(default = "super::grpo::one")]
    pub temperature: f64,
    /// A revision is kept if the probability, by the judge, that it responds to the request is above
    /// this. 0: not asked.
    #[serde(default = "half")]
    pub min_on_topic: f64,
    /// A revision is kept if the probability, by the judge, that it is better than the first answer
    /// is above this. 0: not asked.
    #[serde(default = "half")]
    pub min_preferred: f64,
    #[serde(default)]
    pub preference_method: PreferenceMethod,
    /// Completions of each prompt that are compared with each other (`rank`).
    #[serde(default = "super::grpo::group")]
    pub num_generations: usize,
    #[serde(default)]
    pub pairs: PairSource,
    /// Principles under which the judge compares a pair; the label is their mean.
    #[serde(default = "one")]
    pub principles_per_pair: usize,
    /// Has the judge reason before it compares two answers.
    #[serde(default)]
    pub chain_of_thought: bool,
    /// Maximum number of tokens of this reasoning.
    #[serde(default = "super::grpo::max_tokens")]
    pub chain_of_thought_tokens: usize,
    /// The highest probability that a label has; the lowest is 1 less this. With chain of thought
    /// 0.6 by default, since its labels are overconfident (Bai et al. 2022, section 4.1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_label: Option<f64>,
    /// Trains on pairs whose better answer depends on the order in which the judge read them.
    #[serde(default)]
    pub keep_inconsistent: bool,
    /// β of the loss on preferences (DPO).
    #[serde(default = "beta")]
    pub beta: f64,
    /// Learning rate on preferences; `train.learning_rate` is that on revisions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference_learning_rate: Option<f64>,
    /// Epochs on preferences; `train.epochs` are those on revisions.
    #[serde(default = "epochs")]
    pub preference_epochs: f64,
    /// Maximum number of pairs labelled by people (`data.human`) on which the judge is measured.
    #[serde(default = "human_pairs")]
    pub human_pairs: usize,
    /// Maximum number of prompts whose answers before and after training are compared.
    #[serde(default = "eval_prompts")]
    pub eval_prompts: usize,
    /// Graders of the answers before and after training, by name: measures that do not depend on
    /// the judge.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub graders: BTreeMap<String, Grader>,
}

/// A part of the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Answers, critiques, revisions; supervised fine-tuning on the revisions.
    Revise,
    /// Pairs of answers, labels by the judge; DPO on the pairs.
    Compare,
}

/// How the stage `compare` trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceMethod {
    /// On pairs that are labelled before (direct preference optimization).
    #[default]
    Dpo,
    /// The judge itself is the reward (GRPO): it compares the completions of a prompt, which the
    /// model samples while it is trained (Lee et al. 2023, section 4.1).
    Rank,
}

/// Where the pairs of answers come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairSource {
    /// Two answers of the model, compared by the judge.
    #[default]
    Sampled,
    /// A revision, preferred to the first answer without a judge.
    Revised,
}

/// Principles, and examples of revisions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Constitution {
    pub principles: Vec<Principle>,
    /// Examples shown before each critique, which small models need.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<RevisionExample>,
}

/// A principle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Principle {
    pub name: String,
    /// Asks the model what is wrong with its answer.
    pub critique: String,
    /// Asks the model to rewrite its answer.
    pub revision: String,
    /// Asks the judge which of two answers is better.
    pub comparison: String,
    /// How often the principle is drawn, relative to the others.
    #[serde(default = "super::grpo::one")]
    pub weight: f64,
}

/// A prompt with an answer, its critique and its revision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RevisionExample {
    pub prompt: String,
    pub answer: String,
    pub critique: String,
    pub revision: String,
}

fn stages() -> Vec<Stage> {
    vec![Stage::Revise, Stage::Compare]
}
fn one() -> usize {
    1
}
fn half() -> f64 {
    0.5
}
fn beta() -> f64 {
    Dpo::default().beta
}
fn epochs() -> f64 {
    1.0
}
fn human_pairs() -> usize {
    200
}
fn eval_prompts() -> usize {
    64
}

fn named_or_written<'de, D: Deserializer<'de>>(from: D) -> Result<Constitution, D::Error> {
    let found = match Value::deserialize(from)? {
        Value::String(name) => Constitution::named(&name),
        written @ Value::Object(_) => {
            serde_json::from_value(written).map_err(|error| format!("constitution: {error}"))
        }
        _ => Err("constitution: it is neither a name nor a table".to_owned()),
    };
    found.map_err(D::Error::custom)
}

impl Constitution {
    /// # Errors
    /// The names there are, if there is none of this name.
    fn named(name: &str) -> Result<Self, String> {
        let found = BUILT_IN.iter().find(|(built_in, _)| *built_in == name);
        let Some((_, text)) = found else {
            let names: Vec<_> = BUILT_IN.iter().map(|(name, _)| format!("`{name}`")).collect();
            return Err(format!(
                "constitution: there is no `{name}`; there are {}, or write `principles`",
                names.join(" and ")
            ));
        };
        toml::from_str(text).map_err(|error| format!("constitution: {error}"))
    }

    fn check(&self) -> Result<(), String> {
        let key = "constitutional.constitution.principles";
        within(key, self.principles.len() as f64, 1.0, 256.0)?;
        for (number, principle) in self.principles.iter().enumerate() {
            let Principle { name, critique, revision, comparison, weight } = principle;
            within(&format!("{key}[{number}].weight"), *weight, f64::MIN_POSITIVE, 1e6)?;
            let texts = [
                ("name", name),
                ("critique", critique),
                ("revision", revision),
                ("comparison", comparison),
            ];
            if let Some((what, _)) = texts.iter().find(|(_, text)| text.trim().is_empty()) {
                return Err(format!("{key}[{number}].{what}: it is empty"));
            }
            if self.principles[..number].iter().any(|other| other.name == *name) {
                return Err(format!("{key}[{number}].name: `{name}` is there already"));
            }
        }
        Ok(())
    }
}

impl Constitutional {
    /// Whether a stage is carried out.
    pub fn runs(&self, stage: Stage) -> bool {
        self.stages.contains(&stage)
    }

    /// The probability of a judge as a label.
    pub fn label(&self, probability: f64) -> f64 {
        let usual = if self.chain_of_thought { CHAIN_OF_THOUGHT_LABEL } else { 1.0 };
        let most = self.max_label.unwrap_or(usual);
        probability.clamp(1.0 - most, most)
    }

    /// The loss on preferences.
    pub fn preference_loss(&self) -> Dpo {
        Dpo { beta: self.beta, ..Dpo::default() }
    }

    /// The policy that is trained if the judge is the reward.
    pub fn policy(&self, judge: &str) -> Grpo {
        let rank = Rank { name: "judge".into(), model: judge.into(), question: String::new() };
        Grpo {
            num_generations: self.num_generations,
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            ..Grpo::with(RewardSource::Rank(rank))
        }
    }

    /// The settings of training on preferences.
    pub fn preference_settings(&self, settings: &Resolved) -> Resolved {
        let [of_dpo, _] = Dpo::default().learning_rates();
        let usual = match self.preference_method {
            PreferenceMethod::Dpo => 10.0 * of_dpo,
            PreferenceMethod::Rank => self.policy("").learning_rates()[0],
        };
        Resolved {
            learning_rate: self.preference_learning_rate.unwrap_or(usual),
            epochs: Some(self.preference_epochs),
            max_steps: None,
            ..settings.clone()
        }
    }
}

impl TaskSettings for Constitutional {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::PromptOnly)
    }

    fn learning_rates(&self) -> [f64; 2] {
        Sft::default().learning_rates()
    }

    fn weights(&self) -> Weights {
        Weights::Adapter(
            "answers are sampled from the served model with the adapter that is trained, and all \
             weights cannot be swapped",
        )
    }

    fn samples(&self) -> bool {
        true
    }

    fn models(&self) -> Vec<(String, &str, bool)> {
        let judge = self.judge.iter().map(|judge| ("judge".to_owned(), judge.as_str(), false));
        let graders = self.graders.iter().flat_map(|(key, grader)| {
            let models = grader.models().into_iter();
            models.map(move |(name, scores)| (format!("graders.{key}"), name, scores))
        });
        judge.chain(graders).collect()
    }

    fn trains_on_pairs(&self) -> bool {
        self.runs(Stage::Compare) && self.preference_method == PreferenceMethod::Dpo
    }

    fn takes_human_pairs(&self) -> bool {
        true
    }

    /// Answers to the validation prompts are compared before and after training only.
    fn is_evaluated(&self, _: &Spec) -> bool {
        false
    }

    fn check(&self, settings: &Resolved) -> Result<(), String> {
        let most = settings.max_length as f64 - 1.0;
        self.constitution.check()?;
        if self.stages.is_empty() {
            return Err("constitutional.stages: name `revise`, `compare` or both".into());
        }
        if self.preference_method == PreferenceMethod::Rank && self.pairs == PairSource::Revised {
            return Err("constitutional.pairs: `revised` is for `preference_method` `dpo`".into());
        }
        if self.pairs == PairSource::Revised && !self.runs(Stage::Revise) {
            return Err("constitutional.pairs: `revised` needs the stage `revise`".into());
        }
        let principles = self.constitution.principles.len() as f64;
        let rate = self.preference_learning_rate.unwrap_or(1.0);
        within("constitutional.rounds", self.rounds as f64, 1.0, 16.0)?;
        within("constitutional.max_tokens", self.max_tokens as f64, 1.0, most)?;
        within("constitutional.temperature", self.temperature, 0.01, 10.0)?;
        // At 1 nothing would be kept.
        within("constitutional.min_on_topic", self.min_on_topic, 0.0, 0.999)?;
        within("constitutional.min_preferred", self.min_preferred, 0.0, 0.999)?;
        let per_pair = self.principles_per_pair as f64;
        within("constitutional.principles_per_pair", per_pair, 1.0, principles)?;
        let tokens = self.chain_of_thought_tokens as f64;
        within("constitutional.chain_of_thought_tokens", tokens, 1.0, 65_536.0)?;
        // A label of one half prefers neither answer.
        within("constitutional.max_label", self.max_label.unwrap_or(1.0), 0.501, 1.0)?;
        within("constitutional.num_generations", self.num_generations as f64, 2.0, 256.0)?;
        within("constitutional.beta", self.beta, f64::MIN_POSITIVE, 100.0)?;
        within("constitutional.preference_learning_rate", rate, f64::MIN_POSITIVE, 10.0)?;
        let epochs = self.preference_epochs;
        within("constitutional.preference_epochs", epochs, f64::MIN_POSITIVE, 1e4)?;
        within("constitutional.human_pairs", self.human_pairs as f64, 1.0, 1e5)?;
        within("constitutional.eval_prompts", self.eval_prompts as f64, 1.0, 1e5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::{Spec, Task};

    fn spec(block: &str) -> Result<Spec, String> {
        let text = format!(
            r#"{{"kind": "constitutional", "model": "m", "data": {{"train": "f"}},
                "constitutional": {{{block}}}}}"#
        );
        let spec: Spec = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        spec.resolve().map(|_| spec)
    }

    #[test]
    fn built_in_constitutions_are_valid() {
        for (name, _) in BUILT_IN {
            let spec = spec(&format!(r#""constitution": "{name}""#)).unwrap();
            let Task::Constitutional(block) = &spec.task else { panic!("{spec:?}") };
            assert!(block.constitution.principles.len() >= 4, "{name}");
            assert!(!block.constitution.examples.is_empty(), "{name}");
            // What is stored holds the principles, and is read again.
            let text = serde_json::to_string(&spec).unwrap();
            assert!(text.contains(&block.constitution.principles[0].name));
            assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);
        }
    }

    #[test]
    fn labels_that_follow_a_chain_of_thought_are_clamped() {
        let labels = |more: &str| {
            let spec = spec(&format!(r#""constitution": "brand_tone"{more}"#)).unwrap();
            let Task::Constitutional(block) = spec.task else { panic!("{spec:?}") };
            [0.0, 0.45, 0.55, 1.0].map(|probability| block.label(probability))
        };
        assert_eq!(labels(""), [0.0, 0.45, 0.55, 1.0]);
        assert_eq!(labels(r#", "chain_of_thought": true"#), [0.4, 0.45, 0.55, 0.6]);
        assert_eq!(labels(r#", "max_label": 0.75"#), [0.25, 0.45, 0.55, 0.75]);
        let both = r#", "chain_of_thought": true, "max_label": 1.0"#;
        assert_eq!(labels(both), [0.0, 0.45, 0.55, 1.0]);
    }

    #[test]
    fn errors_name_the_key() {
        let principle = |more: &str| {
            format!(r#"{{"name": "n", "critique": "c", "revision": "r", "comparison": "q"{more}}}"#)
        };
        let written = |principles: &str, more: &str| {
            format!(r#""constitution": {{"principles": [{principles}]}}{more}"#)
        };
        let good = principle("");
        assert!(spec(&written(&good, "")).is_ok());
        for (block, why) in [
            (r#""constitution": "none""#.to_owned(), "helpful_honest_harmless"),
            (r#""constitution": 3"#.to_owned(), "constitution"),
            (String::new(), "constitution"),
            (written("", ""), "principles: 0"),
            (written(&format!("{good}, {good}"), ""), "principles[1].name"),
            (written(&principle(r#", "weight": 0"#), ""), "principles[0].weight"),
            (written(&principle("").replace("\"c\"", "\" \""), ""), "principles[0].critique"),
            (written(&principle(r#", "more": 1"#), ""), "more"),
            (written(&good, r#", "stages": []"#), "stages"),
            (written(&good, r#", "stages": ["sell"]"#), "sell"),
            (written(&good, r#", "stages": ["compare"], "pairs": "revised""#), "pairs"),
            (written(&good, r#", "principles_per_pair": 2"#), "principles_per_pair"),
            (written(&good, r#", "rounds": 0"#), "rounds"),
            (written(&good, r#", "max_label": 0.5"#), "max_label"),
            (written(&good, r#", "preference_method": "rank", "pairs": "revised""#), "pairs"),
            (written(&good, r#", "num_generations": 1"#), "num_generations"),
            (written(&good, r#", "max_label": 1.1"#), "max_label"),
            (written(&good, r#", "chain_of_thought_tokens": 0"#), "chain_of_thought_tokens"),
        ] {
            let error = spec(&block).unwrap_err();
            assert!(error.contains(why), "{block}: {error}");
        }
    }
}
