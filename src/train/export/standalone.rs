//! Exports of models and adapters that are not in training: [`export`].

use super::{ExportError, hf_folder, lora_gguf, model_gguf, peft_folder};
use crate::gguf::{
    Gguf, LoraInfo, ModelFacts, Projection, TensorType, check_lora_gguf, peft_to_gguf, score_head,
};
use crate::job::spec::Lora;
use crate::job::{ExportAdapter, ExportFormat, ExportPlan, ExportRefused};
use crate::train::model::{Model, SCORE, Training, VALUE};
use candle_core::{Device, Tensor};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Positions for which the model is set up: nothing is computed with it.
const CONTEXT: usize = 8;
const CPU: Device = Device::Cpu;

/// Writes a model or adapter; matrices of models in F16. Returns what the result lacks.
///
/// # Errors
/// [`ExportRefused`]; no incomplete file is left.
pub fn export(plan: &ExportPlan) -> Result<Vec<String>, ExportRefused> {
    carry_out(plan).map_err(|error| ExportRefused(error.to_string()))
}

fn carry_out(plan: &ExportPlan) -> Result<Vec<String>, ExportError> {
    let base = Arc::new(Gguf::open(&plan.base)?);
    let Some(adapter) = &plan.adapter else {
        // Nothing is adapted.
        let (rank, targets) = (1, Vec::new());
        let nothing =
            Lora { rank, alpha: 1.0, targets, rank_stabilized: false, dropout: 0.0, seed: 0 };
        let model = Model::load(base.clone(), &Training::Lora(nothing.clone()), CONTEXT, &CPU)?;
        return write(plan, &model, &nothing, &base);
    };
    let (file, info) = as_gguf(adapter, &base)?;
    let outcome = export_adapter(plan, adapter.scale, &file, &info, &base);
    let _ = std::fs::remove_file(&adapter.work_file);
    outcome
}

/// Exports the adapter in the LoRA GGUF `file`.
fn export_adapter(
    plan: &ExportPlan,
    scale: f32,
    file: &Path,
    info: &LoraInfo,
    base: &Arc<Gguf>,
) -> Result<Vec<String>, ExportError> {
    if info.reward_model && !plan.format.is_adapter() {
        return Err(ExportError::Other(format!(
            "the adapter is a reward model, whose score head `{}` cannot hold: use --format peft or \
             lora-gguf",
            plan.format.name()
        )));
    }
    if plan.format == ExportFormat::LoraGguf && scale == 1.0 {
        std::fs::copy(file, &plan.output).map_err(super::at(&plan.output))?;
        return Ok(Vec::new());
    }
    // An alpha of 0 would mean that there is no scale.
    if scale == 0.0 {
        return Err(ExportError::Other(
            "the adapter's scale is 0, with which it changes nothing: upload it with another scale"
                .into(),
        ));
    }
    let lora = lora_of(info, 0).map_err(ExportError::Other)?;
    let lora = Lora { alpha: lora.alpha * f64::from(scale), ..lora };
    let mut model = Model::load(base.clone(), &Training::Lora(lora.clone()), CONTEXT, &CPU)?;
    if let Some(head) = score_head(&Gguf::open(file)?) {
        model = model.with_head(SCORE, head)?;
    }
    begin_with(&model, file)?;
    write(plan, &model, &lora, base)
}

/// The adapter as LoRA GGUF, checked against the base.
fn as_gguf(adapter: &ExportAdapter, base: &Gguf) -> Result<(PathBuf, LoraInfo), ExportError> {
    let ExportAdapter { path, work_file, .. } = adapter;
    let refuse = |why: &dyn std::fmt::Display| {
        ExportError::Other(format!("the adapter {}: {why}", path.display()))
    };
    if path.join("adapter_config.json").is_file() {
        let facts = ModelFacts::read(base)?;
        let info = peft_to_gguf(path, &facts, base, work_file).map_err(|why| refuse(&why))?;
        return Ok((work_file.clone(), info));
    }
    let file = match path.is_dir() {
        false => path.clone(),
        true => {
            let files = std::fs::read_dir(path).map_err(super::at(path))?;
            let paths = files.filter_map(|file| Some(file.ok()?.path()));
            let gguf = |path: &PathBuf| path.extension().is_some_and(|end| end == "gguf");
            let mut found = paths.filter(gguf);
            match (found.next(), found.next()) {
                (Some(file), None) => file,
                _ => return Err(refuse(&"the folder holds neither a PEFT adapter nor one GGUF")),
            }
        }
    };
    let info = check_lora_gguf(&file, base).map_err(|why| refuse(&why))?;
    Ok((file, info))
}

fn write(
    plan: &ExportPlan,
    model: &Model,
    lora: &Lora,
    base: &Gguf,
) -> Result<Vec<String>, ExportError> {
    let output = &plan.output;
    match plan.format {
        ExportFormat::Gguf => {
            model_gguf(model, Some(lora), base, TensorType::F16, &[], output)?;
        }
        ExportFormat::HuggingFace => {
            let parent = plan.parent.as_deref();
            return hf_folder(model, Some(lora), base, TensorType::F16, parent, output);
        }
        ExportFormat::Peft => peft_folder(model, lora, &plan.base_name, output)?,
        ExportFormat::LoraGguf => {
            lora_gguf(model, lora, &[], output)?;
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
