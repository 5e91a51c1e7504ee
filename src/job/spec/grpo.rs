//! The block `grpo` of a specification.

use super::task::resolve_tuning;
use super::{
    Correction, GrpoLoss, PolicyLoss, Resolved, RewardSource, Spec, TaskSettings, Weights, within,
};
use crate::dataset::DatasetKind;
use crate::grade::Grader;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Group relative policy optimization: settings of sampling, grading and the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grpo {
    pub grader: RewardSource,
    /// Completions sampled for each prompt (the group size).
    #[serde(default = "group", alias = "group")]
    pub num_generations: usize,
    /// Maximum number of tokens of a completion.
    #[serde(default = "max_tokens")]
    pub max_tokens: usize,
    #[serde(default = "one")]
    pub temperature: f64,
    /// Optimizer steps on each batch of completions.
    #[serde(default = "updates", alias = "updates")]
    pub num_iterations: usize,
    /// Excludes completions that were truncated at `max_tokens` from training.
    #[serde(default)]
    pub mask_overlong: bool,
    #[serde(default)]
    pub beta: f64,
    #[serde(default = "epsilon")]
    pub epsilon: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epsilon_high: Option<f64>,
    #[serde(default = "loss")]
    pub loss: PolicyLoss,
    #[serde(default = "correction", alias = "correction")]
    pub importance_sampling_correction: Correction,
    #[serde(default = "cap", alias = "cap")]
    pub importance_sampling_cap: f64,
    /// The form of the completions, as in requests to the server. Tokens that the form does not allow
    /// are not sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<Value>,
    /// Training ends when the mean reward has reached this value in three batches in a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_reward: Option<f64>,
    /// Completions sampled for each validation prompt.
    #[serde(default = "eval_samples")]
    pub eval_samples: usize,
    /// Samples the next batch while the model is trained on this one, with the weights before this
    /// update: one step off-policy, which the importance-sampling correction weights.
    #[serde(default)]
    pub async_rollouts: bool,
}

pub(super) fn group() -> usize {
    8
}
pub(super) fn max_tokens() -> usize {
    128
}
pub(super) fn one() -> f64 {
    1.0
}
fn updates() -> usize {
    1
}
fn epsilon() -> f64 {
    GrpoLoss::default().epsilon
}
fn loss() -> PolicyLoss {
    GrpoLoss::default().loss
}
fn correction() -> Correction {
    GrpoLoss::default().correction
}
fn cap() -> f64 {
    GrpoLoss::default().cap
}
pub(super) fn eval_samples() -> usize {
    1
}

impl Grpo {
    /// The default settings, with this grader.
    pub fn with(grader: impl Into<RewardSource>) -> Self {
        Self {
            grader: grader.into(),
            num_generations: group(),
            max_tokens: max_tokens(),
            temperature: one(),
            num_iterations: updates(),
            mask_overlong: false,
            beta: 0.0,
            epsilon: epsilon(),
            epsilon_high: None,
            loss: loss(),
            importance_sampling_correction: correction(),
            importance_sampling_cap: cap(),
            response_format: None,
            target_reward: None,
            eval_samples: eval_samples(),
            async_rollouts: false,
        }
    }

    /// Settings of the policy loss.
    pub fn objective(&self) -> GrpoLoss {
        GrpoLoss {
            epsilon: self.epsilon,
            epsilon_high: self.epsilon_high,
            beta: self.beta,
            loss: self.loss,
            correction: self.importance_sampling_correction,
            cap: self.importance_sampling_cap,
        }
    }
}

impl TaskSettings for Grpo {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::PromptOnly)
    }

    /// With TRL's 1e-6 to 1e-5, small tasks need thousands of steps.
    fn learning_rates(&self) -> [f64; 2] {
        [2e-4, 1e-6]
    }

    fn weights(&self) -> Weights {
        Weights::Adapter(
            "answers are sampled from the served model with an adapter that is swapped at every \
             step, and all weights cannot be swapped",
        )
    }

    fn grader(&self) -> Option<&Grader> {
        self.grader.grader()
    }

    fn samples(&self) -> bool {
        true
    }

    fn models(&self) -> Vec<(String, &str, bool)> {
        let found = match &self.grader {
            RewardSource::Grader(grader) => grader.models().into_iter().collect(),
            RewardSource::Rank(rank) => vec![(rank.model.as_str(), false)],
        };
        found.into_iter().map(|(name, scores)| ("grader".into(), name, scores)).collect()
    }

    fn resolve(&self, spec: &Spec) -> Result<Resolved, String> {
        if matches!(self.grader, RewardSource::Rank(_)) && spec.data.validation.is_some() {
            return Err(
                "data.validation: a `rank` grader compares answers to the same prompt with \
                        each other; their mean reward is always one half, so leave it out"
                    .into(),
            );
        }
        resolve_tuning(self.learning_rates(), spec)
    }

    fn response_format(&self) -> Option<&Value> {
        self.response_format.as_ref()
    }

    fn check(&self, settings: &Resolved) -> Result<(), String> {
        let most = settings.max_length as f64 - 1.0;
        within("grpo.num_generations", self.num_generations as f64, 2.0, 256.0)?;
        within("grpo.max_tokens", self.max_tokens as f64, 1.0, most)?;
        within("grpo.temperature", self.temperature, 0.01, 10.0)?;
        within("grpo.num_iterations", self.num_iterations as f64, 1.0, 64.0)?;
        if matches!(self.grader, RewardSource::Rank(_)) && self.target_reward.is_some() {
            return Err(
                "grpo.target_reward: the mean reward of a `rank` grader is always one half".into(),
            );
        }
        within("grpo.target_reward", self.target_reward.unwrap_or(0.0), -1e9, 1e9)?;
        within("grpo.eval_samples", self.eval_samples as f64, 1.0, 256.0)?;
        within("grpo.beta", self.beta, 0.0, 100.0)?;
        within("grpo.epsilon", self.epsilon, f64::MIN_POSITIVE, 100.0)?;
        within("grpo.epsilon_high", self.epsilon_high.unwrap_or(1.0), f64::MIN_POSITIVE, 100.0)?;
        within("grpo.importance_sampling_cap", self.importance_sampling_cap, f64::MIN_POSITIVE, 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::spec::{Rank, Task};

    fn spec(grader: &str, more: &str) -> Result<Spec, String> {
        let text = format!(
            r#"{{"kind": "grpo", "model": "m", "data": {{"train": "f"{more}}},
                "grpo": {{"grader": {grader}}}}}"#
        );
        let spec: Spec = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        spec.resolve().map(|_| spec)
    }

    #[test]
    fn a_rank_grader_compares_completions() {
        let rank =
            r#"{"type": "rank", "name": "r", "model": "j", "question": "Which is shorter?"}"#;
        let found = spec(rank, "").unwrap();
        let Task::Grpo(Grpo { grader: RewardSource::Rank(Rank { model, question, .. }), .. }) =
            &found.task
        else {
            panic!("{found:?}")
        };
        assert_eq!((model.as_str(), question.as_str()), ("j", "Which is shorter?"));
        let settings = found.task.settings();
        assert!(settings.samples() && settings.grader().is_none());
        assert_eq!(settings.models(), [("grader".to_owned(), "j", false)]);
        let text = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), found);
        for (grader, more, why) in [
            (rank, r#", "validation": "v""#, "data.validation"),
            (&rank.replace("Which is shorter?", " "), "", "grader.question"),
            (&rank.replace("question", "ask"), "", "ask"),
            (r#"{"type": "rank", "name": "r", "model": "j"}"#, "", "question"),
            (r#"{"type": "dance", "name": "r"}"#, "", "dance"),
        ] {
            let error = spec(grader, more).unwrap_err();
            assert!(error.contains(why), "{grader}: {error}");
        }
    }
}
