//! Exports adapters as PEFT folders and as llama.cpp's LoRA GGUF.

use super::{ExportError, at};
use crate::gguf::{GgufWriter, ModelConfig, SCORE_HEAD, TensorType, is_interleaved, layer_module};
use crate::job::spec::Lora;
use crate::train::model::{Model, SCORE};
use crate::train::optim::Param;
use candle_core::{Device, Tensor};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// The LoRA matrices of an adapted matrix: A (rank, inputs), B (outputs, rank).
pub(super) struct Pair<'a> {
    /// `blk.3.attn_q`
    pub(super) tensor: &'a str,
    pub(super) a: Vec<f32>,
    pub(super) b: Vec<f32>,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
}

pub(super) fn pairs<'a>(model: &'a Model, lora: &Lora) -> Result<Vec<Pair<'a>>, ExportError> {
    let find = |name: &str| model.params().iter().find(|param| param.name == name);
    let values = |param: &Param| param.var.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>();
    let mut pairs = Vec::new();
    for a in model.params() {
        let Some(weight) = a.name.strip_suffix(".lora_a") else { continue };
        let Some(b) = find(&format!("{weight}.lora_b")) else { continue };
        let Some(tensor) = weight.strip_suffix(".weight") else {
            return Err(ExportError::Other(format!(
                "`{weight}` is a part of a tensor; adapters of fused tensors cannot be written yet"
            )));
        };
        let (outputs, inputs) = (b.var.dims()[0], a.var.dims()[1]);
        let pair = Pair { tensor, a: values(a)?, b: values(b)?, inputs, outputs };
        if pair.a.len() != lora.rank * inputs || pair.b.len() != outputs * lora.rank {
            return Err(ExportError::Other(format!("`{weight}` is not of rank {}", lora.rank)));
        }
        pairs.push(pair);
    }
    Ok(pairs)
}

/// The score head of a reward model.
fn head(model: &Model) -> Result<Option<Vec<f32>>, ExportError> {
    let Some(param) = model.params().iter().find(|param| param.name == SCORE) else {
        return Ok(None);
    };
    Ok(Some(param.var.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?))
}

/// Writes the adapter as llama.cpp's LoRA GGUF, with `facts` about its origin as metadata. Returns
/// its size in bytes.
///
/// # Errors
/// [`ExportError`]; no incomplete file is left.
pub fn lora_gguf(
    model: &Model,
    lora: &Lora,
    facts: &[(&str, String)],
    path: &Path,
) -> Result<u64, ExportError> {
    let pairs = pairs(model, lora)?;
    // llama.cpp scales by alpha/rank.
    let alpha = lora.scale() * lora.rank as f64;
    let mut writer = GgufWriter::new();
    writer
        .set("general.type", "adapter")
        .set("general.architecture", model.shape().architecture.as_str())
        .set("adapter.type", "lora")
        .set("adapter.lora.alpha", alpha as f32);
    for (key, value) in facts {
        writer.set(key, value.as_str());
    }
    if let Some(head) = head(model)? {
        writer.set(SCORE_HEAD, head);
    }
    for pair in pairs {
        let (a, b) =
            ([pair.inputs as u64, lora.rank as u64], [lora.rank as u64, pair.outputs as u64]);
        writer.tensor_f32(
            &format!("{}.weight.lora_a", pair.tensor),
            &a,
            TensorType::F32,
            pair.a,
        )?;
        writer.tensor_f32(
            &format!("{}.weight.lora_b", pair.tensor),
            &b,
            TensorType::F32,
            pair.b,
        )?;
    }
    Ok(writer.write(path)?)
}

/// Writes the adapter as a PEFT folder for the base model named `base`.
///
/// # Errors
/// [`ExportError`].
pub fn peft_folder(
    model: &Model,
    lora: &Lora,
    base: &str,
    folder: &Path,
) -> Result<(), ExportError> {
    let shape = model.shape();
    let mut tensors = HashMap::new();
    let mut modules = Vec::new();
    for pair in pairs(model, lora)? {
        let (layer, short) = pair
            .tensor
            .strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.'))
            .ok_or_else(|| ExportError::Other(format!("`{}` is in no layer", pair.tensor)))?;
        let module = layer_module(short)
            .ok_or_else(|| ExportError::Other(format!("PEFT has no name for `{short}`")))?;
        let b = match heads(shape, short) {
            Some(heads) => to_halves(&pair.b, heads, lora.rank),
            None => pair.b,
        };
        let name = |half: &str| {
            format!("base_model.model.model.layers.{layer}.{module}.lora_{half}.weight")
        };
        let a = Tensor::from_vec(pair.a, (lora.rank, pair.inputs), &Device::Cpu)?;
        tensors.insert(name("A"), a);
        tensors.insert(name("B"), Tensor::from_vec(b, (pair.outputs, lora.rank), &Device::Cpu)?);
        let last = module.rsplit('.').next().unwrap_or(module);
        if !modules.contains(&last) {
            modules.push(last);
        }
    }
    let head = head(model)?;
    let task = if head.is_some() { "SEQ_CLS" } else { "CAUSAL_LM" };
    let saved = head.as_ref().map(|_| ["score"]);
    if let Some(head) = head {
        let head = Tensor::from_vec(head, (1, shape.width), &Device::Cpu)?;
        tensors.insert("base_model.model.score.weight".into(), head);
    }
    let config = json!({
        "peft_type": "LORA",
        "task_type": task,
        "modules_to_save": saved,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
    });
    fs::create_dir_all(folder).map_err(at(folder))?;
    let path = folder.join("adapter_config.json");
    let text = serde_json::to_vec_pretty(&config)
        .map_err(|error| ExportError::Other(error.to_string()))?;
    fs::write(&path, text).map_err(at(&path))?;
    let path = folder.join("adapter_model.safetensors");
    let bytes = safetensors::serialize(tensors, None)
        .map_err(|error| ExportError::Other(error.to_string()))?;
    fs::write(&path, bytes).map_err(at(&path))
}

/// Number of heads within which the rows of a matrix have another order in the Hugging Face format;
/// `None` if the order is the same.
pub(super) fn heads(shape: &ModelConfig, short: &str) -> Option<usize> {
    match short {
        _ if !is_interleaved(&shape.architecture) => None,
        "attn_q" => Some(shape.heads),
        "attn_k" => Some(shape.kv_heads),
        _ => None,
    }
}

/// Reorders rows from interleaved pairs to halves: row 2i + j of a head becomes row i + j·half.
pub(super) fn to_halves(rows: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let dim = rows.len() / cols / heads;
    let mut out = vec![0.0; rows.len()];
    for (from, row) in rows.chunks_exact(cols).enumerate() {
        let (head, at) = (from / dim, from % dim);
        let to = head * dim + at / 2 + at % 2 * (dim / 2);
        out[to * cols..(to + 1) * cols].copy_from_slice(row);
    }
    out
}
