//! Names of tensors in Hugging Face folders.

use crate::gguf::layer_module;

/// Hugging Face's name of the tensor that a GGUF of the architecture calls `name`; `None` for a
/// tensor without a counterpart.
pub fn hugging_face_name(name: &str, architecture: &str) -> Option<String> {
    let Some(part) = name.strip_prefix("blk.") else {
        let whole = match name {
            "token_embd.weight" => "model.embed_tokens.weight",
            "output.weight" => "lm_head.weight",
            "output_norm.weight" => "model.norm.weight",
            _ => return None,
        };
        return Some(whole.to_owned());
    };
    let (layer, part) = part.split_once('.')?;
    let (short, end) = part.rsplit_once('.')?;
    let gemma = architecture.starts_with("gemma");
    let module = match short {
        "attn_norm" => "input_layernorm",
        "ffn_norm" if gemma => "pre_feedforward_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "post_attention_norm" => "post_attention_layernorm",
        "post_ffw_norm" => "post_feedforward_layernorm",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        // Gate and up are one tensor in both formats.
        "ffn_up" if architecture == "phi3" => "mlp.gate_up_proj",
        other => layer_module(other)?,
    };
    Some(format!("model.layers.{layer}.{module}.{end}"))
}
