//! Settings of the losses of policies. The losses are in `train/loss/policy.rs`.

use serde::{Deserialize, Serialize};

/// Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300) with the engine's
/// correction: a part of the block `grpo` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoLoss {
    /// How far below 1 a ratio still counts.
    pub epsilon: f64,
    /// How far above 1 (Yu et al. 2025, arXiv:2503.14476); as far as below without it.
    pub epsilon_high: Option<f64>,
    /// What the distance to the reference counts.
    pub beta: f64,
    pub loss: PolicyLoss,
    pub correction: Correction,
    /// The greatest weight that a correction gives.
    pub cap: f64,
}

/// What a batch's loss is the mean of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyLoss {
    /// All tokens (Yu et al. 2025, arXiv:2503.14476)
    Dapo,
    /// The completions' own means: a token of a long one counts less.
    Grpo,
}

/// What is done about sampler and trainer not computing the same numbers: a weight w =
/// exp(ln π_old − ln π_engine), of a token or of a whole completion (Yao et al. 2025,
/// fengyao.notion.site/off-policy-rl).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Correction {
    /// min(w, cap)
    TokenTruncate,
    /// w, and 0 above the cap
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

/// Proximal policy optimization with a value head (Schulman et al. 2017, arXiv:1707.06347), for
/// language models (Ziegler et al. 2019, arXiv:1909.08593): the block `ppo` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ppo {
    /// What a token's reward counts one token earlier.
    pub gamma: f64,
    /// How far advantages look past the values' own errors (Schulman et al. 2015, arXiv:1506.02438).
    pub lambda: f64,
    /// How far from 1 a ratio still counts.
    pub clip: f64,
    /// How far a value may move from what it was.
    pub value_clip: f64,
    /// What the values' loss counts.
    pub value_weight: f64,
    /// What a nat away from the reference costs.
    pub kl: f64,
    /// How often each batch of completions is gone through.
    pub updates: usize,
    /// Whether a batch's advantages are brought to mean 0 and variance 1.
    pub whiten: bool,
}

impl Default for Ppo {
    fn default() -> Self {
        Self {
            gamma: 1.0,
            lambda: 0.95,
            clip: 0.2,
            value_clip: 0.2,
            value_weight: 0.1,
            kl: 0.05,
            updates: 4,
            whiten: true,
        }
    }
}
