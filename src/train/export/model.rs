//! Exports models as GGUF.

use super::ExportError;
use super::weights::Weights;
use crate::gguf::{Gguf, GgufWriter, TensorInfo, TensorType, quantize_q8_0, write_f32};
use crate::job::spec::Lora;
use crate::train::model::Model;
use std::io;
use std::path::Path;

/// Numbers that are quantized at a time: a whole number of blocks.
const CHUNK: usize = 1 << 16;

/// Writes the model as a GGUF of F32, F16, BF16 or Q8_0: `base` with the trained weights in place
/// of its own, or with the adapter merged into them. The metadata is the base's plus `facts`. One
/// tensor is held in memory at a time. Returns the number of bytes written.
///
/// # Errors
/// [`ExportError`]; no incomplete file is left.
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
    // `general.file_type` by llama.cpp's numbers.
    let file_type = match ty {
        TensorType::F32 => 0u32,
        TensorType::F16 => 1,
        TensorType::BF16 => 32,
        TensorType::Q8_0 => 7,
        other => return Err(ExportError::Other(format!("models are not written as {other} yet"))),
    };
    writer.set("general.file_type", file_type);
    for tensor in base.tensors() {
        let (name, weights) = (tensor.name(), &weights);
        let ty = stored(tensor, ty);
        writer.tensor_with(name, tensor.dims(), ty, move |out| {
            let values = weights.values(name).map_err(io::Error::other)?;
            match ty {
                TensorType::Q8_0 => {
                    values.chunks(CHUNK).try_for_each(|part| out.write_all(&quantize_q8_0(part)))
                }
                ty => write_f32(out, ty, values.into_iter()),
            }
        })?;
    }
    Ok(writer.write(path)?)
}

/// The storage type of a tensor if matrices are stored as `ty`: vectors are F32, and matrices whose
/// rows are not whole blocks are F16, as in llama.cpp.
fn stored(tensor: &TensorInfo, ty: TensorType) -> TensorType {
    match tensor.dims() {
        [_] => TensorType::F32,
        dims if dims[0].is_multiple_of(ty.block_size()) => ty,
        _ => TensorType::F16,
    }
}
