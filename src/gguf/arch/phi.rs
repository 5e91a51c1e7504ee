//! Phi-3 and Phi-4-mini (arXiv:2404.14219): Llama's layer, stored with queries, keys and values in
//! one tensor, and gate and up in another; LongRoPE; some models have a sliding window.
//!
//! The window is interpreted as in the model's own code: a query sees that many tokens, including
//! its own as the last. llama.cpp reads the key but ignores it, so the two runners differ beyond
//! the window.

use super::{Family, Keys, ModelConfig, RopeFactors, UnsupportedModel};

pub(super) const PHI3: Family = Family {
    name: "phi3",
    needs: &[],
    takes: &["rope_factors_long.weight", "rope_factors_short.weight"],
    read,
};

fn read(keys: &Keys) -> Result<ModelConfig, UnsupportedModel> {
    let mut model = keys.decoder(false)?;
    model.gate_in_up = true;
    model.ropes[0].factors = RopeFactors::ByContext { original: keys.original_context()? };
    let window = keys.optional("attention.sliding_window")?.filter(|&window| window > 0);
    model.kinds.iter_mut().for_each(|kind| kind.window = window);
    Ok(model)
}
