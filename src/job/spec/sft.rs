//! Supervised fine-tuning. Its block has no settings yet: those of `train` are enough.

use super::{Resolved, TaskSettings};
use crate::dataset::DatasetKind;
use serde::{Deserialize, Serialize};

/// Supervised fine-tuning on prompts and completions: the block `sft` of a specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Sft {}

impl TaskSettings for Sft {
    fn dataset(&self) -> Option<DatasetKind> {
        Some(DatasetKind::PromptCompletion)
    }

    fn learning_rates(&self) -> [f64; 2] {
        [2e-4, 2e-5]
    }

    fn check(&self, _: &Resolved) -> Result<(), String> {
        Ok(())
    }
}
