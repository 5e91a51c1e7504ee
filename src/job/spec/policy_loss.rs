//! Settings of policy losses. The losses are in `train/loss/policy.rs`.

use serde::{Deserialize, Serialize};

/// The loss of group relative policy optimization (Shao et al. 2024, arXiv:2402.03300), with an
/// importance-sampling correction for the engine's log-probabilities. These settings are part of
/// the block `grpo` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoLoss {
    /// Clip range of the policy ratio below 1.
    pub epsilon: f64,
    /// Clip range of the policy ratio above 1 (Yu et al. 2025, arXiv:2503.14476); `epsilon` if
    /// missing.
    pub epsilon_high: Option<f64>,
    /// Weight of the KL divergence from the reference model.
    pub beta: f64,
    pub loss: PolicyLoss,
    pub correction: Correction,
    /// Maximum importance-sampling weight.
    pub cap: f64,
}

/// How the loss is averaged over the tokens of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyLoss {
    /// Mean over all tokens (Yu et al. 2025, arXiv:2503.14476).
    Dapo,
    /// Mean over the completions' own means: a token of a long completion has less weight.
    Grpo,
}

/// Importance-sampling correction for differences between the engine's and the trainer's
/// log-probabilities. The weight of a token or of a whole completion is w = exp(ln π_old − ln
/// π_engine) (Yao et al. 2025, fengyao.notion.site/off-policy-rl).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Correction {
    /// min(w, cap).
    TokenTruncate,
    /// w, or 0 if w is above the cap.
    TokenMask,
    SequenceTruncate,
    SequenceMask,
}

impl Default for GrpoLoss {
    fn default() -> Self {
        Self {
            epsilon: 0.2,
            epsilon_high: None,
            beta: 0.0,
            loss: PolicyLoss::Dapo,
            correction: Correction::TokenTruncate,
            cap: 3.0,
        }
    }
}

/// The loss of proximal policy optimization with a value head (Schulman et al. 2017,
/// arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593). These settings are part of the block
/// `ppo` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PpoLoss {
    /// Discount factor of rewards, per token.
    pub gamma: f64,
    /// λ of generalized advantage estimation (Schulman et al. 2015, arXiv:1506.02438).
    pub lambda: f64,
    /// Clip range of the policy ratio around 1.
    pub epsilon: f64,
    /// Clip range of a value around the old value.
    pub value_clip: f64,
    /// Weight of the value loss.
    pub value_weight: f64,
    /// Reward penalty per nat of divergence from the initial model.
    pub beta: f64,
    /// Whether the advantages of a batch are normalized to mean 0 and variance 1.
    pub whiten: bool,
}

impl Default for PpoLoss {
    fn default() -> Self {
        Self {
            gamma: 1.0,
            lambda: 0.95,
            epsilon: 0.2,
            value_clip: 0.2,
            value_weight: 0.1,
            beta: 0.05,
            whiten: true,
        }
    }
}
