//! [`check_lora_gguf`]: checks a LoRA GGUF against its base before llama.cpp loads it.
//!
//! Source: `src/llama-adapter.cpp` for what llama.cpp refuses, and on what it aborts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use half::{bf16, f16};

use super::lora::base_tensor;
use super::peft::MAX_RANK;
use crate::gguf::{Gguf, GgufError, LoraError, LoraInfo, TensorInfo, TensorType, Value};

/// Checks that the LoRA GGUF at `path` fits `base`, so that llama.cpp can load it: kind and
/// architecture, pairs, shapes, ranks, types, and finite numbers (including the scales of Q8_0).
///
/// # Errors
/// [`LoraError`], which names the key or tensor at fault.
pub fn check_lora_gguf(path: &Path, base: &Gguf) -> Result<LoraInfo, LoraError> {
    let adapter = Gguf::open(path)?;
    let alpha = check_metadata(&adapter, base)?;
    let mut pairs: BTreeMap<&str, [Option<&TensorInfo>; 2]> = BTreeMap::new();
    for info in adapter.tensors() {
        let name = info.name();
        if let Some(base_name) = name.strip_suffix(".lora_a") {
            pairs.entry(base_name).or_default()[0] = Some(info);
        } else if let Some(base_name) = name.strip_suffix(".lora_b") {
            pairs.entry(base_name).or_default()[1] = Some(info);
        } else if !name.ends_with("_norm.weight") {
            // llama.cpp ignores norms and refuses all other tensors.
            return Err(LoraError::tensor(name, "its name ends in neither .lora_a nor .lora_b"));
        }
    }
    if pairs.is_empty() {
        return Err(LoraError::Folder("the adapter holds no LoRA tensors".into()));
    }

    let mut info = LoraInfo {
        rank: 0,
        alpha,
        tensors: pairs.len(),
        bytes: adapter.file_size(),
        targets: Vec::new(),
        reward_model: check_head(&adapter, base)?,
    };
    let mut targets = BTreeSet::new();
    for (name, pair) in pairs {
        let [Some(a), Some(b)] = pair else {
            return Err(LoraError::tensor(name, "one half of the pair is missing"));
        };
        let rank = check_pair(a, b, base_tensor(base, name, name)?)?;
        check_finite(&adapter, a)?;
        check_finite(&adapter, b)?;
        info.rank = info.rank.max(rank as u32);
        targets.insert(short_name(name));
    }
    info.targets = targets.into_iter().collect();
    Ok(info)
}

/// Checks that the file is a LoRA for the base's architecture, and returns its alpha.
fn check_metadata(adapter: &Gguf, base: &Gguf) -> Result<f32, LoraError> {
    let expect = |key: &str, wanted: &str| match adapter.get(key) {
        Some(Value::String(found)) if found == wanted => Ok(()),
        Some(Value::String(found)) => {
            Err(LoraError::config(key, format!("it is '{found}', but must be '{wanted}'")))
        }
        _ => Err(LoraError::config(key, format!("it must be the string '{wanted}'"))),
    };
    expect("general.type", "adapter")?;
    expect("adapter.type", "lora")?;
    let architecture = base
        .str("general.architecture")?
        .ok_or_else(|| GgufError::MissingKey("general.architecture".into()))?;
    expect("general.architecture", architecture)?;
    if adapter.get("adapter.alora.invocation_tokens").is_some() {
        let reason = "activated LoRA is not supported";
        return Err(LoraError::config("adapter.alora.invocation_tokens", reason));
    }
    // llama.cpp reads alpha as f32 without checking its type.
    match adapter.get("adapter.lora.alpha") {
        None => Ok(0.0),
        Some(&Value::F32(alpha)) if alpha.is_finite() => Ok(alpha),
        Some(_) => Err(LoraError::config("adapter.lora.alpha", "it must be a finite f32")),
    }
}

/// Whether the adapter is a reward model, whose head must have as many numbers as the base's width.
fn check_head(adapter: &Gguf, base: &Gguf) -> Result<bool, LoraError> {
    if adapter.get(SCORE_HEAD).is_none() {
        return Ok(false);
    }
    let architecture = base.str("general.architecture")?.unwrap_or_default();
    let width = base.u32(&format!("{architecture}.embedding_length"))?.unwrap_or(0);
    match score_head(adapter) {
        Some(head) if head.len() == width as usize => Ok(true),
        Some(head) => {
            let why = format!("it has {} numbers, but the base is {width} wide", head.len());
            Err(LoraError::config(SCORE_HEAD, why))
        }
        None => Err(LoraError::config(SCORE_HEAD, "it must be an array of finite f32")),
    }
}

/// Checks the shapes, which are in ggml's order, and returns the rank.
fn check_pair(a: &TensorInfo, b: &TensorInfo, base: &TensorInfo) -> Result<u64, LoraError> {
    let (ne, ne_a, ne_b) = (base.ne(), a.ne(), b.ne());
    // A and B of an embedding are transposed, see `build_inp_embd` in llama.cpp.
    let (rank, fits) = if base.name() == "token_embd.weight" {
        (ne_a[0], ne[0] == ne_b[1] && ne[1] == ne_a[1])
    } else {
        (ne_a[1], ne[0] == ne_a[0] && ne[1] == ne_b[1])
    };
    let experts = ne[2] == ne_a[2] && ne[2] == ne_b[2] && ne_a[3] == 1 && ne_b[3] == 1;
    if !fits || !experts || rank != ne_b[0] || rank > MAX_RANK {
        return Err(LoraError::tensor(
            base.name(),
            format!(
                "A is {:?} and B is {:?}, which do not fit {:?} of the base",
                a.dims(),
                b.dims(),
                base.dims()
            ),
        ));
    }
    Ok(rank)
}

fn check_finite(adapter: &Gguf, info: &TensorInfo) -> Result<(), LoraError> {
    let data = adapter.data(info.name())?;
    let half = |b: &[u8; 2]| f16::from_le_bytes(*b).is_finite();
    let finite = match info.ty() {
        TensorType::F32 => data.as_chunks().0.iter().all(|b| f32::from_le_bytes(*b).is_finite()),
        TensorType::F16 => data.as_chunks().0.iter().all(half),
        TensorType::BF16 => data.as_chunks().0.iter().all(|b| bf16::from_le_bytes(*b).is_finite()),
        // A block is an f16 scale and 32 signed bytes.
        TensorType::Q8_0 => data.as_chunks::<34>().0.iter().all(|b| half(&[b[0], b[1]])),
        other => {
            let reason =
                format!("its type is {other}, but only F32, F16, BF16 and Q8_0 are supported");
            return Err(LoraError::tensor(info.name(), reason));
        }
    };
    if !finite {
        return Err(LoraError::tensor(info.name(), "it holds values that are not finite"));
    }
    Ok(())
}

/// `blk.3.attn_q.weight` → `attn_q`.
fn short_name(tensor: &str) -> String {
    let name = tensor.strip_suffix(".weight").unwrap_or(tensor);
    let inner = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
    inner.map_or(name, |(_, short)| short).to_owned()
}

/// Key of a reward model's head in its adapter: a vector of shape (width), whose product with a row
/// after the output norm is the score. llama.cpp ignores the key.
pub const SCORE_HEAD: &str = "ingot.score";

/// The head of a reward model's adapter; `None` for other adapters.
pub fn score_head(adapter: &Gguf) -> Option<Vec<f32>> {
    match adapter.get(SCORE_HEAD) {
        Some(Value::Array(crate::gguf::Array::F32(head))) if head.iter().all(|x| x.is_finite()) => {
            Some(head.to_vec())
        }
        _ => None,
    }
}
