//! `config.json`: the configuration of a model for transformers.

use super::ExportError;
use crate::gguf::{Gguf, ModelConfig, ModelFacts, RopeFactors, RopeFacts, TensorType};
use serde_json::{Map, Value, json};

/// Keys of the parent's configuration that describe RoPE, which GGUF metadata does not describe in
/// full.
const ROPE: [&str; 5] = [
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "max_position_embeddings",
];

/// The configuration of a model stored as `ty`. If `parent` is given, the configuration from which
/// the base model was converted, its RoPE settings are used.
///
/// # Errors
/// If transformers cannot represent the model.
pub(super) fn config(
    base: &Gguf,
    shape: &ModelConfig,
    ty: TensorType,
    parent: Option<&Map<String, Value>>,
) -> Result<Value, ExportError> {
    let (model_type, class) = match shape.architecture.as_str() {
        "llama" => ("llama", "LlamaForCausalLM"),
        "qwen2" => ("qwen2", "Qwen2ForCausalLM"),
        "qwen3" => ("qwen3", "Qwen3ForCausalLM"),
        "phi3" => ("phi3", "Phi3ForCausalLM"),
        "gemma2" => ("gemma2", "Gemma2ForCausalLM"),
        "gemma3" => ("gemma3_text", "Gemma3ForCausalLM"),
        other => {
            return Err(ExportError::Other(format!("`{other}` is not written as a folder yet")));
        }
    };
    let dtype = match ty {
        TensorType::F16 => "float16",
        TensorType::BF16 => "bfloat16",
        _ => "float32",
    };
    let facts = ModelFacts::read(base)?;
    let tokens = &facts.tokenizer;
    let id = |token: &Option<crate::gguf::SpecialToken>| token.as_ref().map(|token| token.id);
    let context = base.u32(&format!("{}.context_length", shape.architecture))?;
    let mut config = json!({
        "architectures": [class],
        "model_type": model_type,
        "dtype": dtype,
        "torch_dtype": dtype,
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "intermediate_size": shape.ff,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": decimal(shape.epsilon),
        "max_position_embeddings": context.unwrap_or(2048),
        "tie_word_embeddings": base.tensor("output.weight").is_none(),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_cache": true,
        "bos_token_id": id(&tokens.bos),
        "eos_token_id": id(&tokens.eos),
        "pad_token_id": id(&tokens.pad),
    });
    let mut set = |key: &str, value: Value| config[key] = value;
    match model_type {
        "llama" => {
            set("attention_bias", json!(false));
            set("mlp_bias", json!(false));
        }
        "qwen2" => set("use_sliding_window", json!(false)),
        "phi3" => {
            set("original_max_position_embeddings", json!(context.unwrap_or(2048)));
            set("sliding_window", json!(shape.kinds[0].window));
        }
        "qwen3" => {
            set("use_sliding_window", json!(false));
            set("attention_bias", json!(false));
        }
        _ => {
            set("hidden_activation", json!("gelu_pytorch_tanh"));
            set("hidden_act", json!("gelu_pytorch_tanh"));
            set("attention_bias", json!(false));
            let scale = f64::from(shape.attention_scale);
            set("query_pre_attn_scalar", json!((1.0 / (scale * scale)).round() as u64));
            set("attn_logit_softcapping", json!(shape.attention_cap.map(decimal)));
            set("final_logit_softcapping", json!(shape.logit_cap.map(decimal)));
            let windows = || shape.kinds.iter().map(|kind| kind.window);
            set("sliding_window", json!(windows().flatten().next().unwrap_or(4096)));
            let kind = |window: Option<usize>| match window {
                Some(_) => "sliding_attention",
                None => "full_attention",
            };
            set("layer_types", windows().map(kind).collect());
        }
    }
    match parent {
        Some(parent) => {
            for (key, value) in parent.iter().filter(|(key, _)| ROPE.contains(&&key[..])) {
                set(key, value.clone());
            }
        }
        None => {
            for (key, value) in rope(base, shape)? {
                set(key, value);
            }
        }
    }
    Ok(config)
}

/// The shortest decimal number of an f32: 1e-5, not its exact binary value.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn rope(base: &Gguf, shape: &ModelConfig) -> Result<Vec<(&'static str, Value)>, ExportError> {
    let facts = &shape.ropes[0];
    let plain = facts.yarn.is_none() && facts.magnitude == 1.0 && facts.dims == shape.head_dim;
    let factors = match facts.factors {
        RopeFactors::None => None,
        RopeFactors::Always => base.tensor("rope_freqs.weight"),
        RopeFactors::ByContext { .. } => {
            let stands = |name: &&str| base.tensor(name).is_some();
            ["rope_factors_long.weight", "rope_factors_short.weight"]
                .iter()
                .find(|name| stands(name))
                .and_then(|name| base.tensor(name))
        }
    };
    if !plain || factors.is_some() {
        return Err(ExportError::Other(
            "the model's rope is stretched in a way that its GGUF does not tell in full: give the \
             folder of the model that it was made from, whose `config.json` does"
                .into(),
        ));
    }
    let theta = json!(decimal(facts.base));
    let mut keys = vec![("rope_theta", theta.clone())];
    let parameters = |facts: &RopeFacts| match facts.scale {
        1.0 => json!({"rope_type": "default", "rope_theta": decimal(facts.base)}),
        scale => json!({
            "rope_type": "linear",
            "rope_theta": decimal(facts.base),
            "factor": decimal(1.0 / scale),
        }),
    };
    if facts.scale != 1.0 {
        let factor = decimal(1.0 / facts.scale);
        keys.push(("rope_scaling", json!({"rope_type": "linear", "factor": factor})));
    }
    // Since transformers 5, RoPE settings are given by kind of layer where they differ.
    if shape.architecture == "gemma3" {
        let local = shape.ropes.last().unwrap_or(facts);
        keys.push(("rope_local_base_freq", json!(decimal(local.base))));
        keys.push((
            "rope_parameters",
            json!({
                "full_attention": parameters(facts),
                "sliding_attention": parameters(local),
            }),
        ));
    } else {
        keys.push(("rope_parameters", parameters(facts)));
    }
    Ok(keys)
}
