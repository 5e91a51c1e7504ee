//! The block `dpo`. The loss is in `train/loss/preference.rs`.

use super::{Resolved, TaskSettings, within};
use crate::dataset::DatasetKind;
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

impl TaskSettings for Dpo {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::Preference)
    }

    fn learning_rates(&self) -> [f64; 2] {
        [1e-5, 1e-6]
    }

    fn check(&self, _: &Resolved) -> Result<(), String> {
        within("dpo.beta", self.beta, f64::MIN_POSITIVE, 100.0)?;
        within("dpo.label_smoothing", self.label_smoothing, 0.0, 0.5)?;
        within("dpo.sft", self.sft, 0.0, 100.0)
    }
}
