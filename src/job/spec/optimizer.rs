//! Optimizer settings. The arithmetic is in `train/optim.rs`.

use serde::{Deserialize, Serialize};

/// Optimizer settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "snake_case", deny_unknown_fields)]
pub enum Optimizer {
    /// AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101).
    #[serde(rename = "adamw")]
    AdamW {
        #[serde(default = "betas")]
        betas: [f64; 2],
        #[serde(default = "eps")]
        eps: f64,
        #[serde(default = "weight_decay")]
        weight_decay: f64,
        /// Maximum norm of the gradients; 0 disables clipping.
        #[serde(default = "clip")]
        clip: f64,
    },
    /// Muon for the hidden matrices, AdamW for the rest.
    Muon {
        #[serde(default = "muon_rate")]
        learning_rate: f64,
        #[serde(default = "momentum")]
        momentum: f64,
        #[serde(default = "betas")]
        betas: [f64; 2],
        #[serde(default = "eps")]
        eps: f64,
        #[serde(default = "weight_decay")]
        weight_decay: f64,
        #[serde(default = "clip")]
        clip: f64,
    },
}

fn betas() -> [f64; 2] {
    [0.9, 0.999]
}
fn eps() -> f64 {
    1e-8
}
fn weight_decay() -> f64 {
    0.01
}
fn clip() -> f64 {
    1.0
}
fn muon_rate() -> f64 {
    0.02
}
fn momentum() -> f64 {
    0.95
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::AdamW { betas: betas(), eps: eps(), weight_decay: weight_decay(), clip: clip() }
    }
}
