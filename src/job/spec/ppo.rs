//! The block `ppo` of a specification.

use super::task::resolve_tuning;
use super::{PpoLoss, Resolved, Spec, TaskSettings, Weights, within};
use crate::dataset::DatasetKind;
use crate::grade::Grader;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Proximal policy optimization with a value head (Schulman et al. 2017, arXiv:1707.06347; Ziegler
/// et al. 2019, arXiv:1909.08593): settings of sampling, grading and the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ppo {
    /// Gives the score of a completion; a grader of type `score_model` asks a reward model.
    pub grader: Grader,
    /// Completions sampled for each prompt.
    #[serde(default = "super::grpo::group")]
    pub num_generations: usize,
    /// Maximum number of tokens of a completion.
    #[serde(default = "super::grpo::max_tokens")]
    pub max_tokens: usize,
    #[serde(default = "super::grpo::one")]
    pub temperature: f64,
    /// Optimizer steps on each batch of completions.
    #[serde(default = "num_iterations")]
    pub num_iterations: usize,
    /// Discount factor of rewards, per token.
    #[serde(default = "gamma")]
    pub gamma: f64,
    /// λ of generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438).
    #[serde(default = "lambda")]
    pub lambda: f64,
    /// Clip range of the policy ratio around 1.
    #[serde(default = "epsilon")]
    pub epsilon: f64,
    /// Clip range of a value around the old value.
    #[serde(default = "value_clip")]
    pub value_clip: f64,
    /// Weight of the value loss.
    #[serde(default = "value_weight")]
    pub value_weight: f64,
    /// Reward penalty per nat of divergence from the initial model.
    #[serde(default = "beta")]
    pub beta: f64,
    /// Subtracted from the score of a completion that was truncated at `max_tokens`.
    #[serde(default)]
    pub missing_eos_penalty: f64,
    /// Whether the advantages of a batch are normalized to mean 0 and variance 1.
    #[serde(default = "yes")]
    pub whiten: bool,
    /// The form of the completions, as in requests to the server. Tokens that the form does not allow
    /// are not sampled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response_format: Option<Value>,
    /// Training ends when the mean reward has reached this value in three batches in a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_reward: Option<f64>,
    /// Completions sampled for each validation prompt.
    #[serde(default = "super::grpo::eval_samples")]
    pub eval_samples: usize,
}

fn num_iterations() -> usize {
    4
}
fn gamma() -> f64 {
    PpoLoss::default().gamma
}
fn lambda() -> f64 {
    PpoLoss::default().lambda
}
fn epsilon() -> f64 {
    PpoLoss::default().epsilon
}
fn value_clip() -> f64 {
    PpoLoss::default().value_clip
}
fn value_weight() -> f64 {
    PpoLoss::default().value_weight
}
fn beta() -> f64 {
    PpoLoss::default().beta
}
fn yes() -> bool {
    true
}

impl Ppo {
    /// Settings of the loss.
    pub fn objective(&self) -> PpoLoss {
        PpoLoss {
            gamma: self.gamma,
            lambda: self.lambda,
            epsilon: self.epsilon,
            value_clip: self.value_clip,
            value_weight: self.value_weight,
            beta: self.beta,
            whiten: self.whiten,
        }
    }
}

impl TaskSettings for Ppo {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::PromptOnly)
    }

    fn learning_rates(&self) -> [f64; 2] {
        [2e-4, 1e-6]
    }

    fn weights(&self) -> Weights {
        Weights::Adapter(
            "answers are sampled from the served model with an adapter that is swapped at every \
             step, and all weights cannot be swapped",
        )
    }

    /// The loss compares log-probabilities and values of several passes, so no pass may drop
    /// anything.
    fn resolve(&self, spec: &Spec) -> Result<Resolved, String> {
        if spec.adapter.as_ref().is_some_and(|adapter| adapter.dropout > 0.0) {
            return Err("adapter.dropout: it must be 0 for a job of kind `ppo`".into());
        }
        resolve_tuning(self.learning_rates(), spec)
    }

    fn grader(&self) -> Option<&Grader> {
        Some(&self.grader)
    }

    fn response_format(&self) -> Option<&Value> {
        self.response_format.as_ref()
    }

    fn check(&self, settings: &Resolved) -> Result<(), String> {
        let most = settings.max_length as f64 - 1.0;
        within("ppo.num_generations", self.num_generations as f64, 1.0, 256.0)?;
        within("ppo.max_tokens", self.max_tokens as f64, 1.0, most)?;
        within("ppo.temperature", self.temperature, 0.01, 10.0)?;
        within("ppo.num_iterations", self.num_iterations as f64, 1.0, 64.0)?;
        within("ppo.gamma", self.gamma, 0.0, 1.0)?;
        within("ppo.lambda", self.lambda, 0.0, 1.0)?;
        within("ppo.epsilon", self.epsilon, f64::MIN_POSITIVE, 100.0)?;
        within("ppo.value_clip", self.value_clip, f64::MIN_POSITIVE, 1e6)?;
        within("ppo.value_weight", self.value_weight, 0.0, 100.0)?;
        within("ppo.beta", self.beta, 0.0, 100.0)?;
        within("ppo.missing_eos_penalty", self.missing_eos_penalty, 0.0, 1e6)?;
        within("ppo.target_reward", self.target_reward.unwrap_or(0.0), -1e9, 1e9)?;
        within("ppo.eval_samples", self.eval_samples as f64, 1.0, 256.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Spec;

    fn spec(ppo: &str) -> Result<Spec, String> {
        let text = format!(
            r#"{{"kind": "ppo", "model": "m", "data": {{"train": "f"}}, "ppo": {{{ppo}}}}}"#
        );
        let spec: Spec = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        spec.resolve()?;
        Ok(spec)
    }

    const GRADER: &str = r#""grader": {"type": "string_check", "name": "g", "operation": "eq",
        "input": "{{sample.output_text}}", "reference": "yes"}"#;

    #[test]
    fn a_grader_is_enough() {
        let spec = spec(GRADER).unwrap();
        assert!(spec.task.settings().grader().is_some());
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<Spec>(&text).unwrap(), spec);
    }

    #[test]
    fn mistakes_are_named() {
        for (more, why) in [
            (r#""lambda": 1.5"#, "ppo.lambda"),
            (r#""gamma": -0.1"#, "ppo.gamma"),
            (r#""num_generations": 0"#, "ppo.num_generations"),
            (r#""num_iterations": 0"#, "ppo.num_iterations"),
            (r#""max_tokens": 1024"#, "ppo.max_tokens"),
            (r#""epsilon": 0"#, "ppo.epsilon"),
            (r#""value_clip": 0"#, "ppo.value_clip"),
            (r#""missing_eos_penalty": -1"#, "ppo.missing_eos_penalty"),
            (r#""kl": 0.1"#, "unknown field `kl`"),
        ] {
            let error = spec(&format!("{GRADER}, {more}")).unwrap_err();
            assert!(error.contains(why), "{more}: {error}");
        }
        let dropout = format!(
            r#"{{"kind": "ppo", "model": "m", "data": {{"train": "f"}}, "ppo": {{{GRADER}}},
                "adapter": {{"dropout": 0.1}}}}"#
        );
        let error = serde_json::from_str::<Spec>(&dropout).unwrap().resolve().unwrap_err();
        assert!(error.contains("adapter.dropout"), "{error}");
        let error = spec(r#""beta": 0.1"#).unwrap_err();
        assert!(error.contains("missing field `grader`"), "{error}");
    }
}
