//! Exports of models and adapters that are not in training: [`export`].

use super::{ExportError, hf_folder, model_gguf, peft_folder};
use crate::gguf::{Gguf, LoraInfo, Projection, TensorType, check_lora_gguf};
use crate::job::spec::Lora;
use crate::job::{ExportFormat, ExportPlan, ExportRefused};
use crate::train::model::{Model, SCORE, Training, VALUE};
use candle_core::{Device, Tensor};
use std::path::Path;
use std::sync::Arc;

/// Positions for which the model is set up: nothing is computed with it.
const CONTEXT: usize = 8;

/// Writes a model or adapter; matrices of models in F16. Returns what the result lacks.
///
/// # Errors
/// [`ExportRefused`]; no incomplete file is left.
pub fn export(plan: &ExportPlan) -> Result<Vec<String>, ExportRefused> {
    carry_out(plan).map_err(|error| ExportRefused(error.to_string()))
}

fn carry_out(plan: &ExportPlan) -> Result<Vec<String>, ExportError> {
    let base = Arc::new(Gguf::open(&plan.base)?);
    let lora = match &plan.adapter {
        Some(adapter) => {
            let refuse = |why: &dyn std::fmt::Display| ExportError::Other(why.to_string());
            let info = check_lora_gguf(adapter, &base).map_err(|why| refuse(&why))?;
            lora_of(&info, 0).map_err(|why| refuse(&why))?
        }
        // Nothing is adapted.
        None => Lora {
            rank: 1,
            alpha: 1.0,
            targets: Vec::new(),
            rank_stabilized: false,
            dropout: 0.0,
            seed: 0,
        },
    };
    let training = Training::Lora(lora.clone());
    let model = Model::load(base.clone(), &training, CONTEXT, &Device::Cpu)?;
    if let Some(adapter) = &plan.adapter {
        begin_with(&model, adapter)?;
    }
    match plan.format {
        ExportFormat::Gguf => {
            model_gguf(&model, Some(&lora), &base, TensorType::F16, &[], &plan.output)?;
        }
        ExportFormat::HuggingFace => {
            let parent = plan.parent.as_deref();
            return hf_folder(&model, Some(&lora), &base, TensorType::F16, parent, &plan.output);
        }
        ExportFormat::Peft => peft_folder(&model, &lora, &plan.base_name, &plan.output)?,
        ExportFormat::LoraGguf => {
            let adapter = plan.adapter.as_deref().unwrap_or(&plan.base);
            std::fs::copy(adapter, &plan.output).map_err(super::at(&plan.output))?;
        }
    }
    Ok(Vec::new())
}

/// The LoRA settings of an adapter in llama.cpp's format.
///
/// # Errors
/// If it adapts matrices that are not trained here.
pub fn lora_of(info: &LoraInfo, seed: u64) -> Result<Lora, String> {
    let target = |name: &String| match name.as_str() {
        "attn_q" => Ok(Projection::Q),
        "attn_k" => Ok(Projection::K),
        "attn_v" => Ok(Projection::V),
        "attn_output" => Ok(Projection::O),
        "ffn_gate" => Ok(Projection::Gate),
        "ffn_up" => Ok(Projection::Up),
        "ffn_down" => Ok(Projection::Down),
        other => Err(format!("it changes `{other}`, which is not trained here")),
    };
    let targets = info.targets.iter().map(target).collect::<Result<_, _>>()?;
    let (rank, alpha) = (info.rank as usize, f64::from(info.alpha));
    // An alpha of 0 means that there is no scale.
    let alpha = if alpha == 0.0 { rank as f64 } else { alpha };
    Ok(Lora { rank, alpha, targets, rank_stabilized: false, dropout: 0.0, seed })
}

/// Replaces the model's LoRA matrices with those of an adapter.
///
/// # Errors
/// If the adapter lacks a matrix, or cannot be read.
pub fn begin_with(model: &Model, adapter: &Path) -> Result<(), ExportError> {
    let file = Gguf::open(adapter)?;
    for param in model.params().iter().filter(|param| ![SCORE, VALUE].contains(&&*param.name)) {
        let values = file.to_f32(&param.name)?;
        let values = Tensor::from_vec(values, param.var.shape(), param.var.device())?;
        param.var.set(&values)?;
    }
    Ok(())
}
