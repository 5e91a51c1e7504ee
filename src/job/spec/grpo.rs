//! The block `grpo` of a specification.

use super::{Correction, GrpoLoss, PolicyLoss, Resolved, TaskSettings, Weights, within};
use crate::dataset::DatasetKind;
use crate::grade::Grader;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Group relative policy optimization: settings of sampling, grading and the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grpo {
    pub grader: Grader,
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
    pub fn with(grader: Grader) -> Self {
        Self {
            grader,
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
        Some(&self.grader)
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
        within("grpo.target_reward", self.target_reward.unwrap_or(0.0), -1e9, 1e9)?;
        within("grpo.eval_samples", self.eval_samples as f64, 1.0, 256.0)?;
        within("grpo.beta", self.beta, 0.0, 100.0)?;
        within("grpo.epsilon", self.epsilon, f64::MIN_POSITIVE, 100.0)?;
        within("grpo.epsilon_high", self.epsilon_high.unwrap_or(1.0), f64::MIN_POSITIVE, 100.0)?;
        within("grpo.importance_sampling_cap", self.importance_sampling_cap, f64::MIN_POSITIVE, 1e6)
    }
}
