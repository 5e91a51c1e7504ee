//! Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama's layer, with biases on queries, keys and values.
//! Qwen3 (arXiv:2505.09388): without them, and with an RMS norm on every query and key head.
//!
//! The elements of a rotated pair are half a head apart.

use super::{Family, Keys, ModelConfig, UnsupportedModel};

pub(super) const QWEN2: Family = Family { name: "qwen2", needs: &[], takes: &[], read };

pub(super) const QWEN3: Family =
    Family { name: "qwen3", needs: &["attn_q_norm", "attn_k_norm"], takes: &[], read };

fn read(keys: &Keys) -> Result<ModelConfig, UnsupportedModel> {
    keys.decoder(false)
}
