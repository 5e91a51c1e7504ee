//! The blocks `dpo` and `reward`. The losses are in `train/loss/preference.rs`.

use serde::{Deserialize, Serialize};

/// Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and its kin: the block
/// `dpo` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dpo {
    /// How much the policy is held to where it began.
    pub beta: f64,
    pub loss: DpoLoss,
    /// The share of pairs that are taken to be the wrong way round (Mitchell 2023, cDPO).
    pub label_smoothing: f64,
    /// What the better answer's own loss counts, in nats a token (Pang et al. 2024,
    /// arXiv:2404.19733).
    pub sft: f64,
}

/// What is made of β times the margin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// −ln σ(β h)
    Sigmoid,
    /// (h − 1/2β)², h averaged over each answer's tokens (Azar et al. 2023, arXiv:2310.12036)
    Ipo,
    /// max(0, 1 − β h) (Zhao et al. 2023, SLiC-HF, arXiv:2305.10425)
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
    /// How far apart two answers ought to be; a pair's own `margin` comes before it (Touvron et al.
    /// 2023, arXiv:2307.09288).
    pub margin: f64,
    /// What the square of a pair's sum counts, which keeps scores around zero (Eisenstein et al. 2023,
    /// arXiv:2312.09244).
    pub centering: f64,
}
