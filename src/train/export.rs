//! What training made, in the forms that others read: PEFT folders, llama.cpp's LoRA GGUF, models as
//! GGUF.

use super::model::{Lora, Model};
use super::optim::Param;
use crate::gguf::{
    Covered, Gguf, GgufError, GgufWriter, TensorType, dequantize, is_interleaved, layer_module,
};
use candle_core::{Device, Tensor};
use serde_json::json;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    #[error("{0}")]
    Other(String),
}

/// The two halves of an adapted matrix: A (rank, inputs), B (outputs, rank).
struct Pair<'a> {
    /// `blk.3.attn_q`
    tensor: &'a str,
    a: Vec<f32>,
    b: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

fn pairs<'a>(model: &'a Model, lora: &Lora) -> Result<Vec<Pair<'a>>, ExportError> {
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

/// Writes the adapter as llama.cpp's LoRA GGUF, with `facts` of where it comes from; returns its bytes.
///
/// # Errors
/// [`ExportError`]; nothing half-written is left.
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

/// Writes the adapter as a PEFT folder for the base that is called `base`.
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
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
    });
    let io = |path: &Path| {
        let path = path.to_owned();
        |source| ExportError::Io { path, source }
    };
    fs::create_dir_all(folder).map_err(io(folder))?;
    let path = folder.join("adapter_config.json");
    let text = serde_json::to_vec_pretty(&config)
        .map_err(|error| ExportError::Other(error.to_string()))?;
    fs::write(&path, text).map_err(io(&path))?;
    let path = folder.join("adapter_model.safetensors");
    let bytes = safetensors::serialize(tensors, None)
        .map_err(|error| ExportError::Other(error.to_string()))?;
    fs::write(&path, bytes).map_err(io(&path))
}

/// Heads within which the rows of a matrix stand in another order at Hugging Face.
fn heads(shape: &Covered, short: &str) -> Option<usize> {
    match short {
        _ if !is_interleaved(&shape.architecture) => None,
        "attn_q" => Some(shape.heads),
        "attn_k" => Some(shape.kv_heads),
        _ => None,
    }
}

/// Rows of neighbours to rows of halves: row 2i + j of a head becomes row i + j·half.
fn to_halves(rows: &[f32], heads: usize, cols: usize) -> Vec<f32> {
    let dim = rows.len() / cols / heads;
    let mut out = vec![0.0; rows.len()];
    for (from, row) in rows.chunks_exact(cols).enumerate() {
        let (head, at) = (from / dim, from % dim);
        let to = head * dim + at / 2 + at % 2 * (dim / 2);
        out[to * cols..(to + 1) * cols].copy_from_slice(row);
    }
    out
}

/// Writes the model as a GGUF of floats: `base` with the trained weights in place of its own, or with
/// the adapter added to them. Metadata is the base's, besides `facts`. Returns its bytes.
///
/// # Errors
/// [`ExportError`]; nothing half-written is left.
pub fn model_gguf(
    model: &Model,
    lora: Option<&Lora>,
    base: &Gguf,
    ty: TensorType,
    facts: &[(&str, String)],
    path: &Path,
) -> Result<u64, ExportError> {
    let trained: HashMap<&str, &Param> =
        model.params().iter().map(|param| (param.name.as_str(), param)).collect();
    let adapted: HashMap<String, Pair> = match lora {
        Some(lora) => pairs(model, lora)?
            .into_iter()
            .map(|pair| (format!("{}.weight", pair.tensor), pair))
            .collect(),
        None => HashMap::new(),
    };
    let mut writer = GgufWriter::new();
    for (key, value) in base.metadata() {
        writer.set(key, value.clone());
    }
    for (key, value) in facts {
        writer.set(key, value.as_str());
    }
    // `general.file_type` as llama.cpp numbers it.
    let file_type = match ty {
        TensorType::F32 => 0u32,
        TensorType::F16 => 1,
        TensorType::BF16 => 32,
        other => return Err(ExportError::Other(format!("models are not written as {other} yet"))),
    };
    writer.set("general.file_type", file_type);
    for tensor in base.tensors() {
        let name = tensor.name();
        let mut values = match trained.get(name) {
            Some(param) => param.var.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?,
            None => {
                let mut values = vec![0.0; tensor.elements() as usize];
                dequantize(tensor.ty(), base.data(name)?, &mut values)
                    .map_err(|error| ExportError::Other(error.to_string()))?;
                values
            }
        };
        if let (Some(pair), Some(lora)) = (adapted.get(name), lora) {
            use crate::kernels::gemm::{Mat, product};
            let mut b = pair.b.clone();
            b.iter_mut().for_each(|x| *x *= lora.scale() as f32);
            let b = Mat::new(&b, pair.outputs, lora.rank);
            let a = Mat::new(&pair.a, lora.rank, pair.inputs);
            product(b, a, &mut values, pair.inputs, 0, true);
        }
        // Vectors stay exact, as llama.cpp keeps them.
        let ty = if tensor.dims().len() > 1 { ty } else { TensorType::F32 };
        writer.tensor_f32(name, tensor.dims(), ty, values)?;
    }
    Ok(writer.write(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::fixture::TinyDecoder;
    use crate::gguf::{ModelFacts, Target, peft_to_gguf};
    use crate::train::model::{Batch, Training};
    use std::sync::Arc;

    fn lora() -> Lora {
        use Target::*;
        let targets = vec![Q, K, V, Output, Gate, Up, Down];
        Lora { rank: 4, alpha: 6.0, targets, rank_stabilized: true, seed: 5 }
    }

    fn model(file: &Arc<Gguf>, training: &Training) -> Model {
        let model = Model::load(file.clone(), training, 64, &Device::Cpu).unwrap();
        for (i, param) in model.params().iter().enumerate() {
            let count = param.var.elem_count();
            let values: Vec<f32> =
                (0..count).map(|j| ((i * 7 + j * 13) % 23) as f32 / 200.0 - 0.05).collect();
            if param.name.ends_with("lora_b") {
                let moved = Tensor::from_vec(values, param.var.shape(), &Device::Cpu).unwrap();
                param.var.set(&moved).unwrap();
            }
        }
        model
    }

    fn loss(model: &Model) -> f64 {
        let example = crate::train::data::Encoded {
            tokens: (0..40).map(|i| i * 11 % TinyDecoder::vocab()).collect(),
            trained: vec![true; 40],
        };
        let sum = model.losses(&Batch::of([&example])).unwrap().sum;
        sum.to_dtype(candle_core::DType::F64).unwrap().to_scalar().unwrap()
    }

    #[test]
    fn a_peft_folder_becomes_the_same_gguf() {
        for architecture in ["llama", "qwen2"] {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            TinyDecoder { heads: 4, kv_heads: 2, ..TinyDecoder::new(architecture) }
                .write(&path("base.gguf"))
                .unwrap();
            let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
            let model = model(&base, &Training::Lora(lora()));
            lora_gguf(&model, &lora(), &[("general.name", "x".into())], &path("ours.gguf"))
                .unwrap();
            peft_folder(&model, &lora(), "base", &path("peft")).unwrap();
            let facts = ModelFacts::read(&base).unwrap();
            peft_to_gguf(&path("peft"), &facts, &base, &path("theirs.gguf")).unwrap();
            let [ours, theirs] =
                ["ours.gguf", "theirs.gguf"].map(|name| Gguf::open(path(name)).unwrap());
            assert_eq!(ours.tensors().len(), theirs.tensors().len());
            for tensor in ours.tensors() {
                let name = tensor.name();
                let (a, b) = (ours.to_f32(name).unwrap(), theirs.to_f32(name).unwrap());
                assert_eq!(a, b, "{architecture}: {name}");
            }
            let alpha = |file: &Gguf| file.f32("adapter.lora.alpha").unwrap();
            assert_eq!(alpha(&ours), alpha(&theirs));
        }
    }

    #[test]
    fn a_merged_model_has_the_adapters_loss() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        TinyDecoder::new("llama").write(&path("base.gguf")).unwrap();
        let base = Arc::new(Gguf::open(path("base.gguf")).unwrap());
        let model = model(&base, &Training::Lora(lora()));
        model_gguf(&model, Some(&lora()), &base, TensorType::F32, &[], &path("merged.gguf"))
            .unwrap();
        let merged = Arc::new(Gguf::open(path("merged.gguf")).unwrap());
        let whole = Model::load(merged.clone(), &Training::Full, 64, &Device::Cpu).unwrap();
        let (adapted, merged_loss) = (loss(&model), loss(&whole));
        assert!((adapted - merged_loss).abs() < 1e-4 * adapted, "{adapted}, {merged_loss}");
        // What was trained is what is written.
        model_gguf(&whole, None, &merged, TensorType::F32, &[], &path("again.gguf")).unwrap();
        let again = Gguf::open(path("again.gguf")).unwrap();
        for tensor in merged.tensors() {
            assert_eq!(merged.to_f32(tensor.name()).unwrap(), again.to_f32(tensor.name()).unwrap());
        }
    }
}
