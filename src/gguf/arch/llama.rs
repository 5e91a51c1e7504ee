//! Llama (Touvron et al. 2023, arXiv:2302.13971; Llama 3: arXiv:2407.21783) and models with the
//! same architecture name: Mistral (arXiv:2310.06825), TinyLlama, SmolLM2.
//!
//! `x += Wo·attend(rope(Wq·norm(x)), …)`, `x += Wd·(silu(Wg·norm(x)) * (Wu·norm(x)))`. Rotated
//! pairs are adjacent elements. Llama 3.1 divides the frequencies by `rope_freqs.weight`.

use super::{Family, Keys, ModelConfig, RopeFactors, UnsupportedModel};

pub(super) const LLAMA: Family = Family {
    name: "llama",
    needs: &[],
    takes: &["rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"],
    read,
};

fn read(keys: &Keys) -> Result<ModelConfig, UnsupportedModel> {
    let mut model = keys.decoder(true)?;
    model.ropes[0].factors = match keys.rope_scaling()?.as_str() {
        "longrope" => RopeFactors::ByContext { original: keys.original_context()? },
        _ => RopeFactors::Always,
    };
    Ok(model)
}
