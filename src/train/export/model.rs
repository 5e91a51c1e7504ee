//! Models as GGUF.

use super::ExportError;
use super::weights::Weights;
use crate::gguf::{Gguf, GgufWriter, TensorType, write_f32};
use crate::train::model::{Lora, Model};
use std::io;
use std::path::Path;

/// Writes the model as a GGUF of floats: `base` with the trained weights in place of its own, or with
/// the adapter added to them. Metadata is the base's, besides `facts`. One tensor is held at a time.
/// Returns the bytes written.
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
    let weights = Weights::new(model, lora, base)?;
    let mut writer = GgufWriter::new();
    writer.copy_metadata(base, |_| true);
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
        let (name, weights) = (tensor.name(), &weights);
        // Vectors stay exact, as llama.cpp keeps them.
        let ty = if tensor.dims().len() > 1 { ty } else { TensorType::F32 };
        writer.tensor_with(name, tensor.dims(), ty, move |out| {
            let values = weights.values(name).map_err(io::Error::other)?;
            write_f32(out, ty, values.into_iter())
        })?;
    }
    Ok(writer.write(path)?)
}
