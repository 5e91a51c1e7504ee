//! Gemma 2 (arXiv:2408.00118) and Gemma 3 (arXiv:2503.19786).
//!
//! Llama's layer with these differences: embeddings are multiplied by √width, the gate is GELU,
//! each half of the layer has a norm after it as well as before it, and layers with a sliding
//! window alternate with layers of full attention. Gemma 2 caps scores and logits by tanh and has a
//! window in every other layer. Gemma 3 instead has norms on query and key heads, and windows in
//! five of six layers, whose RoPE has its own base and is never scaled. The `1 +` of Gemma's norms
//! is already included in the weights of the file.

use super::{Family, Gating, Keys, ModelConfig, RopeFacts, UnsupportedModel, other};
use crate::gguf::{Array, Value};

pub(super) const GEMMA2: Family = Family {
    name: "gemma2",
    needs: &["post_attention_norm", "post_ffw_norm"],
    takes: &[],
    read: read_2,
};

pub(super) const GEMMA3: Family = Family {
    name: "gemma3",
    needs: &["attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm"],
    takes: &[],
    read: read_3,
};

fn read_2(keys: &Keys) -> Result<ModelConfig, UnsupportedModel> {
    let mut model = decoder(keys, 46)?;
    model.attention_cap = keys.cap("attn_logit_softcapping", 50.0)?;
    model.logit_cap = keys.cap("final_logit_softcapping", 30.0)?;
    let rope = model.ropes[0].clone();
    let local = RopeFacts { base: local_base(keys, rope.base)?, ..rope };
    let window = keys.optional("attention.sliding_window")?.unwrap_or(4096);
    windows(keys, &mut model, window, 2, local)?;
    Ok(model)
}

fn read_3(keys: &Keys) -> Result<ModelConfig, UnsupportedModel> {
    let mut model = decoder(keys, 62)?;
    model.logit_cap = keys.cap("final_logit_softcapping", 0.0)?;
    let rope = model.ropes[0].clone();
    let local = RopeFacts { base: local_base(keys, 10_000.0)?, scale: 1.0, ..rope };
    let window = keys.optional("attention.sliding_window")?.unwrap_or(0);
    windows(keys, &mut model, window, 6, local)?;
    Ok(model)
}

/// Reads the common part. The largest model of each generation, recognized by its number of layers
/// `deepest`, scales queries by the width divided by the number of heads, which in that model is
/// not the width of a head.
fn decoder(keys: &Keys, deepest: usize) -> Result<ModelConfig, UnsupportedModel> {
    let mut model = keys.decoder(false)?;
    model.embedding_scale = (model.width as f32).sqrt();
    model.gating = Gating::Gelu;
    if model.layers == deepest {
        model.attention_scale = 1.0 / ((model.width / model.heads) as f32).sqrt();
    }
    Ok(model)
}

fn local_base(keys: &Keys, default: f32) -> Result<f32, UnsupportedModel> {
    match keys.float("rope.freq_base_swa")?.unwrap_or(default) {
        base if base.is_finite() && base > 1.0 => Ok(base),
        base => other(format!("its local rope has base {base}")),
    }
}

/// Sets the window and the RoPE of windowed layers. If the file does not list them, the last of
/// every `period` layers has full attention.
fn windows(
    keys: &Keys,
    model: &mut ModelConfig,
    window: usize,
    period: usize,
    local: RopeFacts,
) -> Result<(), UnsupportedModel> {
    if window == 0 {
        return Ok(());
    }
    let key = keys.key("attention.sliding_window_pattern");
    let listed = keys.file.get(&key).and_then(Value::as_array).map(Array::to_u64s);
    let period = match listed {
        None => keys.optional("attention.sliding_window_pattern")?.unwrap_or(period),
        Some(_) => period,
    };
    for (layer, kind) in model.kinds.iter_mut().enumerate() {
        let windowed = match &listed {
            None => period == 0 || layer % period < period - 1,
            Some(Some(list)) if layer < list.len() => list[layer] != 0,
            Some(_) => return other(format!("`{key}` is no list with a number for every layer")),
        };
        if windowed {
            (kind.window, kind.rope) = (Some(window), 1);
        }
    }
    model.ropes.push(local);
    Ok(())
}
