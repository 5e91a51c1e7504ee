//! PyTorch results that tests compare with: `tests/train/torch.json`, written by
//! `scripts/torch_reference.py`, and the hashed numbers that both sides generate.

use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
pub(super) struct Reference {
    pub shape: Shape,
    pub window: u32,
    pub operations: BTreeMap<String, Operation>,
    pub models: Vec<Trained>,
}

/// The shape of the tiny models.
#[derive(Deserialize)]
pub(super) struct Shape {
    pub layers: u32,
    pub width: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub ff: u32,
    pub vocab: u32,
}

/// The result of an operation, and the gradients of its arguments.
#[derive(Deserialize)]
pub(super) struct Operation {
    pub out: Vec<f64>,
    pub grads: Vec<Vec<f64>>,
    #[serde(default)]
    pub documents: Vec<usize>,
    pub window: Option<usize>,
    pub cap: Option<f64>,
    #[serde(default)]
    pub tokens: Vec<u32>,
}

/// Some training steps of a tiny model.
#[derive(Deserialize)]
pub(super) struct Trained {
    pub architecture: String,
    pub training: String,
    pub learning_rate: f64,
    pub losses: Vec<f64>,
    /// Norms of the gradients, before clipping.
    pub norms: Vec<f64>,
    /// Gradients of the first step.
    pub grads: BTreeMap<String, Numbers>,
    pub final_: BTreeMap<String, Numbers>,
}

/// A whole tensor, or enough numbers to detect any difference.
#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Numbers {
    Whole(Vec<f64>),
    Summary { norm: f64, along: f64, first: Vec<f64> },
}

impl Numbers {
    /// The distance of `found` from these numbers, relative to the norm of these numbers.
    pub(super) fn distance(&self, name: &str, found: &[f32]) -> f64 {
        let found: Vec<f64> = found.iter().map(|x| f64::from(*x)).collect();
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let apart =
            |a: &[f64], b: &[f64]| norm(&a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>());
        match self {
            Self::Whole(right) => {
                assert_eq!(right.len(), found.len(), "{name}");
                apart(right, &found) / norm(right)
            }
            Self::Summary { norm: right, along, first } => {
                let direction = uniform(&format!("{name}.direction"), found.len());
                let dot: f64 = found.iter().zip(&direction).map(|(x, d)| x * d).sum();
                // A random difference of norm 1 has a length of about 0.6 along the direction.
                let off = [norm(&found) - right, dot - along, apart(first, &found[..first.len()])];
                off.iter().fold(0.0, |most: f64, off| most.max(off.abs())) / right
            }
        }
    }
}

pub(super) fn reference() -> Reference {
    let text = include_str!("../../tests/train/torch.json").replace("\"final\":", "\"final_\":");
    serde_json::from_str(&text).unwrap()
}

/// 32-bit numbers: FNV-1a of the name, then the finalizer of MurmurHash3.
pub(super) fn hashed(name: &str, count: usize) -> impl Iterator<Item = u32> {
    let mix = |seed: u32, byte: u8| (seed ^ u32::from(byte)).wrapping_mul(16_777_619);
    let seed = name.bytes().fold(2_166_136_261, mix);
    (0..count as u32).map(move |i| {
        let z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9));
        let z = (z ^ (z >> 16)).wrapping_mul(0x85EB_CA6B);
        let z = (z ^ (z >> 13)).wrapping_mul(0xC2B2_AE35);
        z ^ (z >> 16)
    })
}

/// Numbers between -1 and 1.
pub(super) fn uniform(name: &str, count: usize) -> Vec<f64> {
    hashed(name, count).map(|z| f64::from(z) / 2f64.powi(31) - 1.0).collect()
}

/// A matrix with rows of `cols` numbers, whose products preserve the magnitude of their input;
/// without `cols`, norm weights around 1.
pub(super) fn weight(name: &str, count: usize, cols: Option<usize>) -> Vec<f32> {
    let scale = |x: f64| cols.map_or(1.0 + 0.2 * x, |cols| x * (3.0 / cols as f64).sqrt());
    uniform(name, count).into_iter().map(|x| scale(x) as f32).collect()
}
