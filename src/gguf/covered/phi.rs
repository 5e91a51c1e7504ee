//! Phi-3 and Phi-4-mini (arXiv:2404.14219): Llama's layer, stored with queries, keys and values in
//! one tensor, and gate and up in another; LongRoPE; a sliding window in some.
//!
//! The window is taken as the model's own code takes it: a query sees that many tokens, its own
//! the last. llama.cpp reads the key and leaves it unused, so the two runners differ beyond it.

use super::{Covered, Family, Keys, RopeFactors, Uncovered};

pub(super) const PHI3: Family = Family {
    name: "phi3",
    needs: &[],
    takes: &["rope_factors_long.weight", "rope_factors_short.weight"],
    read,
};

fn read(keys: &Keys) -> Result<Covered, Uncovered> {
    let mut model = keys.decoder(false)?;
    model.gate_in_up = true;
    model.ropes[0].factors = RopeFactors::ByContext { original: keys.original_context()? };
    let window = keys.optional("attention.sliding_window")?.filter(|&window| window > 0);
    model.kinds.iter_mut().for_each(|kind| kind.window = window);
    Ok(model)
}
