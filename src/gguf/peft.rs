//! PEFT adapter folders: the settings in `adapter_config.json`, and the GGUF tensor of each module.
//!
//! Source: `peft/tuners/lora/config.py` for the configuration; `conversion/*.py` and
//! `gguf-py/gguf/tensor_mapping.py` of llama.cpp for names.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value as Json};

use crate::gguf::LoraError;

/// Maximum size of `adapter_config.json`, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Maximum rank; a larger rank is not a low-rank adapter.
pub(crate) const MAX_RANK: u64 = 8192;

/// The settings of `adapter_config.json` that change what an adapter computes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PeftConfig {
    pub rank: u64,
    pub alpha: f64,
    /// Whether the scale is `alpha / sqrt(rank)` rather than `alpha / rank`.
    pub rslora: bool,
    /// Whether single modules may have another rank (`rank_pattern`).
    pub mixed_ranks: bool,
    /// Whether the adapter is a reward model, with which [`SCORE`] is saved.
    pub head: bool,
}

/// The head of a model for sequence classification, as PEFT and TRL save it.
pub(crate) const SCORE: &str = "base_model.model.score.weight";

/// Keys that must be absent, null, false or empty, each with the reason.
const REFUSED: &[(&str, &str)] = &[
    ("use_dora", "DoRA adds a magnitude vector, which a LoRA GGUF cannot hold"),
    (
        "modules_to_save",
        "whole modules but a reward model's `score` cannot be part of a LoRA GGUF; merge them into \
         the base",
    ),
    ("alpha_pattern", "alphas that differ between modules are not supported"),
    ("lora_bias", "biases cannot be part of a LoRA GGUF"),
    ("fan_in_fan_out", "transposed base weights are not supported"),
    ("layer_replication", "replicated layers are not supported"),
    ("target_parameters", "LoRA on bare parameters is not supported"),
    ("trainable_token_indices", "trained token rows cannot be part of a LoRA GGUF"),
    ("alora_invocation_tokens", "activated LoRA is not supported"),
    ("invocation_string", "activated LoRA is not supported"),
    ("use_qalora", "QALoRA pools its input, which a LoRA GGUF cannot express"),
    ("use_bdlora", "block-diagonal LoRA is not supported"),
    ("arrow_config", "Arrow routing is not supported"),
    ("megatron_config", "Megatron adapters are not supported"),
];

/// Values of `init_lora_weights` with which PEFT changes the base model (`pissa` also as
/// `pissa_niter_N`).
const CHANGE_THE_BASE: [&str; 5] = ["pissa", "olora", "corda", "loftq", "lora_ga"];

impl PeftConfig {
    /// Reads `adapter_config.json`.
    ///
    /// # Errors
    /// [`LoraError::Config`] with the key at fault.
    pub(super) fn read(folder: &Path) -> Result<PeftConfig, LoraError> {
        let path = folder.join("adapter_config.json");
        let io = |source| LoraError::Io { file: "adapter_config.json", source };
        let about = fs::metadata(&path).map_err(io)?;
        if !about.is_file() || about.len() > MAX_CONFIG {
            return Err(LoraError::Folder(
                "adapter_config.json is not a file of up to 1 MiB".into(),
            ));
        }
        let text = fs::read(&path).map_err(io)?;
        let config: Map<String, Json> = serde_json::from_slice(&text)
            .map_err(|e| LoraError::Folder(format!("adapter_config.json is not JSON: {e}")))?;
        PeftConfig::from_json(&config)
    }

    fn from_json(config: &Map<String, Json>) -> Result<PeftConfig, LoraError> {
        let fail = |key: &str, reason: String| LoraError::Config { key: key.to_owned(), reason };
        match config.get("peft_type").and_then(Json::as_str) {
            Some("LORA") => {}
            other => {
                let found = other.unwrap_or("absent");
                return Err(fail(
                    "peft_type",
                    format!("it is {found}, but only LORA is supported"),
                ));
            }
        }
        let saved = config.get("modules_to_save").and_then(Json::as_array);
        let head = saved.is_some_and(|saved| saved.len() == 1 && saved[0] == "score");
        for &(key, reason) in REFUSED {
            let unset = match config.get(key) {
                None | Some(Json::Null | Json::Bool(false)) => true,
                Some(Json::Array(list)) => list.is_empty(),
                Some(Json::Object(map)) => map.is_empty(),
                Some(Json::String(text)) => text.is_empty(),
                Some(_) => false,
            };
            if !(unset || key == "modules_to_save" && head) {
                return Err(fail(key, reason.to_owned()));
            }
        }
        match config.get("bias") {
            None | Some(Json::Null) => {}
            Some(Json::String(bias)) if bias == "none" => {}
            Some(_) => {
                let reason = "only 'none' is supported: biases cannot be part of a LoRA GGUF";
                return Err(fail("bias", reason.into()));
            }
        }
        // These methods subtract the initial product of A and B from the base weights. The changed
        // weights are not saved in the folder.
        if let Some(init) = config.get("init_lora_weights").and_then(Json::as_str)
            && CHANGE_THE_BASE.iter().any(|name| init.to_ascii_lowercase().starts_with(name))
        {
            let reason = format!(
                "`{init}` changed the base model's weights when training began, and this base has the \
                 unchanged ones; save the adapter as a plain LoRA (PEFT: \
                 `save_pretrained(..., path_initial_model_for_weight_conversion=...)`), or merge it \
                 and convert the whole model"
            );
            return Err(fail("init_lora_weights", reason));
        }
        let rank = config.get("r").and_then(Json::as_u64);
        let Some(rank) = rank.filter(|r| (1..=MAX_RANK).contains(r)) else {
            return Err(fail("r", format!("it must be a whole number from 1 to {MAX_RANK}")));
        };
        // Zero would disable the adapter in PEFT, but means "unscaled" in llama.cpp.
        let alpha = config.get("lora_alpha").and_then(Json::as_f64);
        let Some(alpha) = alpha.filter(|&a| a != 0.0 && (a as f32).is_normal()) else {
            return Err(fail("lora_alpha", "it must be a number other than 0".into()));
        };
        let rslora = match config.get("use_rslora") {
            None | Some(Json::Null) => false,
            Some(Json::Bool(on)) => *on,
            Some(_) => return Err(fail("use_rslora", "it must be true or false".into())),
        };
        let mixed_ranks = match config.get("rank_pattern") {
            None | Some(Json::Null) => false,
            Some(Json::Object(map)) => !map.is_empty(),
            Some(_) => return Err(fail("rank_pattern", "it must be an object".into())),
        };
        Ok(PeftConfig { rank, alpha, rslora, mixed_ranks, head })
    }

    /// The alpha to write. llama.cpp scales each module by `alpha / rank of the module`.
    pub(super) fn gguf_alpha(&self) -> f32 {
        let boost = if self.rslora { (self.rank as f64).sqrt() } else { 1.0 };
        (self.alpha * boost) as f32
    }

    /// The factor on B of a module with `rank` that turns llama.cpp's scale into PEFT's. It is 1
    /// except for rsLoRA with a rank pattern.
    pub(super) fn correction(&self, rank: u64) -> f32 {
        if !self.rslora || rank == self.rank {
            return 1.0;
        }
        // PEFT: alpha / sqrt(rank). llama.cpp: alpha * sqrt(self.rank) / rank.
        ((rank as f64).sqrt() / (self.rank as f64).sqrt()) as f32
    }
}

/// Factor of a LoRA pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    A,
    B,
}

/// How PEFT's factors relate to the factors in the GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// The same rows.
    Plain,
    /// Rows of B are reordered within each of this many heads.
    Heads(u64),
    /// A is transposed, because it is a table with one row per token.
    Embedding,
}

/// A base tensor that a module of the adapter changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PeftTensor {
    /// Name in the GGUF, such as `blk.3.attn_q.weight`.
    pub tensor: String,
    /// The same without layer and ending: `attn_q`.
    pub short: &'static str,
    pub layout: Layout,
}

/// Splits `base_model.model.model.layers.0.mlp.up_proj.lora_A.weight` into the module's path and
/// the factor. `None` if it is not a LoRA tensor.
pub(crate) fn split_name(name: &str) -> Option<(&str, Half)> {
    // Saved state dicts omit the adapter's name; in-memory ones contain "default".
    const ENDINGS: &[(&str, Half)] = &[
        (".lora_A.weight", Half::A),
        (".lora_B.weight", Half::B),
        (".lora_A.default.weight", Half::A),
        (".lora_B.default.weight", Half::B),
        (".lora_embedding_A", Half::A),
        (".lora_embedding_B", Half::B),
        (".lora_embedding_A.default", Half::A),
        (".lora_embedding_B.default", Half::B),
    ];
    ENDINGS.iter().find_map(|&(ending, half)| {
        let path = name.strip_suffix(ending)?;
        Some((path.strip_prefix("base_model.model.").unwrap_or(path), half))
    })
}

/// Linear modules of a layer by their Hugging Face path. Phi-3 packs q, k, v and gate, up;
/// llama.cpp keeps both packed in the same order, so the rows need no reordering.
const LAYER_MODULES: &[(&str, &str)] = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate_up_proj", "ffn_up"),
];

/// Architectures whose GGUF holds q and k in the order of interleaved rotary embedding, while
/// Hugging Face holds them in halves (`undo_permute` in `conversion/llama.py`).
const INTERLEAVED: &[&str] = &["llama", "mistral3", "smollm3", "granite", "arcee"];
/// Architectures with the same row order in both formats.
const SAME_ORDER: &[&str] = &["qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"];

/// Hugging Face's module path, within its layer, for the GGUF name `short`.
pub fn layer_module(short: &str) -> Option<&'static str> {
    LAYER_MODULES.iter().find(|(_, gguf)| *gguf == short).map(|(module, _)| *module)
}

/// Whether the rows of queries and keys are in another order than in Hugging Face's files.
pub fn is_interleaved(arch: &str) -> bool {
    INTERLEAVED.contains(&arch)
}

/// Finds the base tensor for a module's path.
///
/// `heads(layer)` returns the query heads and key heads of a layer. `Err` holds the reason.
pub(crate) fn target(
    path: &str,
    arch: &str,
    heads: impl Fn(usize) -> Option<(u64, u64)>,
) -> Result<PeftTensor, String> {
    if !INTERLEAVED.contains(&arch) && !SAME_ORDER.contains(&arch) {
        return Err(format!("PEFT adapters for the architecture '{arch}' are not supported"));
    }
    let whole = |short: &'static str, layout| {
        Ok(PeftTensor { tensor: format!("{short}.weight"), short, layout })
    };
    // Multimodal wrappers add further prefixes to the text model's names, in either order.
    let mut inner = path;
    while let Some(rest) =
        inner.strip_prefix("model.").or_else(|| inner.strip_prefix("language_model."))
    {
        inner = rest;
    }
    match inner {
        "embed_tokens" => return whole("token_embd", Layout::Embedding),
        "lm_head" => return whole("output", Layout::Plain),
        _ => {}
    }
    let unknown = || format!("the architecture '{arch}' has no module '{path}'");
    let (layer, module) =
        inner.strip_prefix("layers.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
    let layer: usize = layer.parse().map_err(|_| unknown())?;
    let (n_head, n_head_kv) =
        heads(layer).ok_or_else(|| format!("the base has no layer {layer}"))?;
    let &(_, short) = LAYER_MODULES.iter().find(|(hf, _)| *hf == module).ok_or_else(unknown)?;
    let layout = match short {
        "attn_q" if INTERLEAVED.contains(&arch) => Layout::Heads(n_head),
        "attn_k" if INTERLEAVED.contains(&arch) => Layout::Heads(n_head_kv),
        _ => Layout::Plain,
    };
    Ok(PeftTensor { tensor: format!("blk.{layer}.{short}.weight"), short, layout })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(extra: &str) -> Result<PeftConfig, LoraError> {
        let text = format!(r#"{{"peft_type":"LORA","r":8,"lora_alpha":16{extra}}}"#);
        PeftConfig::from_json(&serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn defaults_written_out_are_accepted() {
        let text = r#","bias":"none","use_dora":false,"modules_to_save":null,"alpha_pattern":{},
            "init_lora_weights":"gaussian","rank_pattern":{},"use_rslora":false,"lora_bias":false,"layer_replication":null"#;
        let config = config(text).unwrap();
        assert_eq!((config.gguf_alpha(), config.correction(4)), (16.0, 1.0));
        for init in ["true", "false", "\"eva\"", "\"orthogonal\""] {
            assert!(self::config(&format!(r#","init_lora_weights":{init}"#)).is_ok(), "{init}");
        }
    }

    #[test]
    fn what_cannot_be_expressed_is_refused_by_name() {
        for (extra, key) in [
            (r#","use_dora":true"#, "use_dora"),
            (r#","modules_to_save":["lm_head"]"#, "modules_to_save"),
            (r#","alpha_pattern":{"q_proj":2}"#, "alpha_pattern"),
            (r#","bias":"all""#, "bias"),
            (r#","r":0"#, "r"),
            (r#","r":-3"#, "r"),
            (r#","lora_alpha":0"#, "lora_alpha"),
            (r#","lora_alpha":1e300"#, "lora_alpha"),
            (r#","peft_type":"LOHA""#, "peft_type"),
            (r#","use_rslora":1"#, "use_rslora"),
            (r#","rank_pattern":[1]"#, "rank_pattern"),
            (r#","init_lora_weights":"pissa""#, "init_lora_weights"),
            (r#","init_lora_weights":"pissa_niter_16""#, "init_lora_weights"),
            (r#","init_lora_weights":"olora""#, "init_lora_weights"),
            (r#","init_lora_weights":"corda""#, "init_lora_weights"),
            (r#","init_lora_weights":"loftq""#, "init_lora_weights"),
        ] {
            let error = config(extra).unwrap_err().to_string();
            assert!(error.contains(&format!("'{key}'")), "{error}");
        }
    }

    #[test]
    fn rslora_scales_like_peft_whatever_the_rank() {
        let config = config(r#","use_rslora":true,"rank_pattern":{"q_proj":2}"#).unwrap();
        for rank in [2u64, 8, 32] {
            let llama_cpp = config.gguf_alpha() / rank as f32 * config.correction(rank);
            assert!((llama_cpp - 16.0 / (rank as f32).sqrt()).abs() < 1e-5);
        }
    }

    #[test]
    fn modules_find_their_tensors() {
        let find = |path, arch| target(path, arch, |layer| (layer < 2).then_some((4, 2)));
        let q = find("model.layers.1.self_attn.q_proj", "llama").unwrap();
        assert_eq!((q.tensor.as_str(), q.layout), ("blk.1.attn_q.weight", Layout::Heads(4)));
        let k = find("model.layers.0.self_attn.k_proj", "llama").unwrap();
        assert_eq!(k.layout, Layout::Heads(2));
        let q = find("model.language_model.layers.0.self_attn.q_proj", "gemma3").unwrap();
        assert_eq!((q.tensor.as_str(), q.layout), ("blk.0.attn_q.weight", Layout::Plain));
        let packed = find("model.layers.0.mlp.gate_up_proj", "phi3").unwrap();
        assert_eq!(packed.tensor, "blk.0.ffn_up.weight");
        assert_eq!(find("lm_head", "qwen2").unwrap().tensor, "output.weight");
        for (path, arch) in [
            ("model.layers.2.self_attn.q_proj", "llama"),
            ("model.layers.0.block_sparse_moe.experts.0.w1", "llama"),
            ("model.layers.0.self_attn.q_proj", "mamba"),
            ("vision_tower.layers.0.q_proj", "gemma3"),
        ] {
            assert!(find(path, arch).is_err(), "{path}");
        }
    }

    #[test]
    fn names_split_into_path_and_half() {
        let name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight";
        assert_eq!(split_name(name), Some(("model.layers.0.mlp.up_proj", Half::B)));
        let name = "base_model.model.model.embed_tokens.lora_embedding_A";
        assert_eq!(split_name(name), Some(("model.embed_tokens", Half::A)));
        assert_eq!(split_name("base_model.model.model.norm.weight"), None);
    }
}
