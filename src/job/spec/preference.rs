//! The blocks `dpo` and `reward`. The losses are in `train/loss/preference.rs`.

use serde::{Deserialize, Serialize};

/// Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and related losses: the
/// block `dpo` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dpo {
    /// Strength β of the constraint that keeps the policy close to the reference model.
    pub beta: f64,
    pub loss: DpoLoss,
    /// Assumed fraction of pairs whose chosen and rejected completions are swapped (Mitchell 2023,
    /// cDPO).
    pub label_smoothing: f64,
    /// Weight of the chosen completion's cross-entropy, in nats per token (Pang et al. 2024,
    /// arXiv:2404.19733).
    pub sft: f64,
}

/// The loss as a function of β and the margin h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// −ln σ(β h).
    Sigmoid,
    /// (h − 1/2β)², with h averaged over each completion's tokens (Azar et al. 2023,
    /// arXiv:2310.12036).
    Ipo,
    /// max(0, 1 − β h) (Zhao et al. 2023, SLiC-HF, arXiv:2305.10425).
    Hinge,
}

impl Default for Dpo {
    fn default() -> Self {
        Self { beta: 0.1, loss: DpoLoss::Sigmoid, label_smoothing: 0.0, sft: 0.0 }
    }
}

/// A reward model's loss (Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155): the block
/// `reward` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Reward {
    /// Required difference between the scores of the chosen and the rejected completion. The
    /// `margin` of a pair takes precedence (Touvron et al. 2023, arXiv:2307.09288).
    pub margin: f64,
    /// Weight of the squared sum of a pair's two scores. This term keeps scores centered around
    /// zero (Eisenstein et al. 2023, arXiv:2312.09244).
    pub centering: f64,
}
