//! Exports models as folders for transformers: `config.json`, `model.safetensors`, the tokenizer's
//! files, `generation_config.json`.

use super::adapter::{heads, to_halves};
use super::config::config;
use super::tokenizer::{tokenizer_config, tokenizer_json};
use super::weights::Weights;
use super::{ExportError, at};
use crate::gguf::{Gguf, ModelConfig, ModelFacts, TensorType, hugging_face_name, write_f32};
use crate::job::spec::Lora;
use crate::train::model::Model;
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

const TOKENIZER: &str = "tokenizer.json";

/// Writes the model as a folder, with its matrices and vectors in `ty` (F32, F16 or BF16). `parent`
/// is the folder from which the base model was converted, if it exists: its tokenizer is copied,
/// and the RoPE settings of its `config.json` are used. One tensor is held in memory at a time.
/// Returns messages about what the folder lacks.
///
/// # Errors
/// [`ExportError`]; an old `model.safetensors` is replaced last.
pub fn hf_folder(
    model: &Model,
    lora: Option<&Lora>,
    base: &Gguf,
    ty: TensorType,
    parent: Option<&Path>,
    folder: &Path,
) -> Result<Vec<String>, ExportError> {
    let shape = model.shape();
    let read = |parent: &Path| -> Result<Map<String, Value>, ExportError> {
        let path = parent.join("config.json");
        let text = fs::read(&path).map_err(at(&path))?;
        serde_json::from_slice(&text)
            .map_err(|error| ExportError::Other(format!("{}: {error}", path.display())))
    };
    let of_parent = parent.map(read).transpose()?;
    let config = config(base, shape, ty, of_parent.as_ref())?;
    fs::create_dir_all(folder).map_err(at(folder))?;
    let lacking = write_tokenizer(base, &config, parent, folder)?;
    put(folder, "config.json", &config)?;
    let tokens = ModelFacts::read(base)?.tokenizer;
    let mut ends: Vec<u32> = Vec::new();
    for end in [tokens.eos, tokens.eot, tokens.eom].into_iter().flatten() {
        if !ends.contains(&end.id) {
            ends.push(end.id);
        }
    }
    let generation = json!({"bos_token_id": config["bos_token_id"], "eos_token_id": ends});
    put(folder, "generation_config.json", &generation)?;
    write_weights(&Weights::new(model, lora, base)?, base, shape, ty, folder)?;
    Ok(lacking)
}

fn put(folder: &Path, name: &str, value: &Value) -> Result<(), ExportError> {
    let path = folder.join(name);
    let text =
        serde_json::to_vec_pretty(value).map_err(|error| ExportError::Other(error.to_string()))?;
    fs::write(&path, text).map_err(at(&path))
}

fn write_tokenizer(
    base: &Gguf,
    config: &Value,
    parent: Option<&Path>,
    folder: &Path,
) -> Result<Vec<String>, ExportError> {
    if let Some(parent) = parent.filter(|parent| parent.join(TOKENIZER).is_file()) {
        for name in [TOKENIZER, "tokenizer_config.json", "special_tokens_map.json"] {
            let from = parent.join(name);
            if from.is_file() {
                fs::copy(&from, folder.join(name)).map_err(at(&from))?;
            }
        }
        return Ok(Vec::new());
    }
    match tokenizer_json(base) {
        Ok(tokenizer) => {
            put(folder, TOKENIZER, &tokenizer)?;
            let context = config["max_position_embeddings"].as_u64().unwrap_or(2048) as usize;
            put(folder, "tokenizer_config.json", &tokenizer_config(base, context)?)?;
            Ok(Vec::new())
        }
        Err(why) => Ok(vec![format!("{TOKENIZER}: {why}; copy that of the original model")]),
    }
}

/// A tensor that is computed when it is written.
struct Lazy<'a> {
    weights: &'a Weights<'a>,
    name: &'a str,
    /// Number of heads within which rows are reordered for the Hugging Face format.
    heads: Option<usize>,
    /// Subtracted from the values: in a GGUF, 1 is added to Gemma's norm weights.
    less: f32,
    ty: TensorType,
    shape: Vec<usize>,
    failed: &'a Mutex<Option<ExportError>>,
}

impl Lazy<'_> {
    fn values(&self) -> Result<Vec<f32>, ExportError> {
        let mut values = self.weights.values(self.name)?;
        if let Some(heads) = self.heads {
            values = to_halves(&values, heads, self.shape.get(1).copied().unwrap_or(1));
        }
        if self.less != 0.0 {
            values.iter_mut().for_each(|x| *x -= self.less);
        }
        Ok(values)
    }
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.ty {
            TensorType::F16 => Dtype::F16,
            TensorType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        let written = self.values().and_then(|values| {
            let written = write_f32(&mut bytes, self.ty, values.into_iter());
            written.map_err(|error| ExportError::Other(error.to_string()))
        });
        if let Err(error) = written {
            // The trait's method cannot return an error; it is checked after everything is written.
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            bytes.resize(self.data_len(), 0);
        }
        bytes.into()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * self.ty.block_bytes() as usize
    }
}

fn write_weights(
    weights: &Weights,
    base: &Gguf,
    shape: &ModelConfig,
    ty: TensorType,
    folder: &Path,
) -> Result<(), ExportError> {
    let failed = Mutex::new(None);
    let mut views = Vec::new();
    for tensor in base.tensors() {
        // The configuration contains the RoPE factors.
        if tensor.name().starts_with("rope_") {
            continue;
        }
        let name = hugging_face_name(tensor.name(), &shape.architecture).ok_or_else(|| {
            ExportError::Other(format!("transformers has no name for `{}`", tensor.name()))
        })?;
        let short = tensor.name().split('.').nth(2).unwrap_or_default();
        let norm = tensor.name().contains("norm");
        let less = if norm && shape.architecture.starts_with("gemma") { 1.0 } else { 0.0 };
        let dims = tensor.dims().iter().rev().map(|dim| *dim as usize).collect();
        let (heads, failed) = (heads(shape, short), &failed);
        let name_here = tensor.name();
        views.push((name, Lazy { weights, name: name_here, heads, less, ty, shape: dims, failed }));
    }
    let (part, whole) = (folder.join(".model.safetensors.part"), folder.join("model.safetensors"));
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let written = serialize_to_file(views, Some(about), &part)
        .map_err(|error| ExportError::Other(format!("{}: {error}", part.display())));
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    let done = written.and(failed.map_or(Ok(()), Err)).and_then(|()| {
        File::open(&part).and_then(|file| file.sync_all()).map_err(at(&part))?;
        fs::rename(&part, &whole).map_err(at(&whole))
    });
    if done.is_err() {
        let _ = fs::remove_file(&part);
    }
    done
}
