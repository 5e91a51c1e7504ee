//! The block `reward`. The loss is in `train/loss/preference.rs`.

use super::{Resolved, TaskSettings, Weights, within};
use crate::dataset::DatasetKind;
use serde::{Deserialize, Serialize};

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

impl TaskSettings for Reward {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::Preference)
    }

    fn learning_rates(&self) -> [f64; 2] {
        [1e-4, 1e-5]
    }

    fn weights(&self) -> Weights {
        Weights::Adapter("a reward model is an adapter with a head")
    }

    fn check(&self, _: &Resolved) -> Result<(), String> {
        within("reward.margin", self.margin, -1e3, 1e3)?;
        within("reward.centering", self.centering, 0.0, 100.0)
    }
}
