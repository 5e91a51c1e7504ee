//! [`write_dequantized`]: writes a copy of a model with every matrix in F32.
//!
//! The copy computes what the quantized file represents exactly, without the rounding of kernels.
//! It is the reference by which kernels of quantized types are measured.

use std::io::{self, Write};
use std::path::Path;

use super::dequantize::{can_dequantize, dequantize};
use super::error::malformed;
use super::writer::write_f32;
use crate::gguf::{Gguf, GgufError, GgufWriter, TensorInfo, TensorType};

/// Approximate number of elements decoded at a time, in whole blocks.
const CHUNK: usize = 1 << 16;

/// Bytes of the copy's tensor data, without padding.
pub fn dequantized_bytes(from: &Gguf) -> u64 {
    let bytes = |tensor: &TensorInfo| match can_dequantize(tensor.ty()) {
        true => tensor.elements().saturating_mul(4),
        false => tensor.bytes(),
    };
    from.tensors().iter().map(bytes).fold(0, u64::saturating_add)
}

/// Writes the copy to `to` atomically and returns its size in bytes. Metadata is copied; integer
/// tensors are copied unchanged.
///
/// # Errors
/// [`GgufError`] if a tensor's type has no decoder in [`dequantize()`], if the model is split over
/// several files or holds text that is not UTF-8 (a copy would change it), or if the disk is full.
pub fn write_dequantized(from: &Gguf, to: &Path) -> Result<u64, GgufError> {
    if from.u32("split.count")?.unwrap_or(0) > 1 {
        malformed!("a model that is split over several files cannot be copied; merge it first");
    }
    if let Some(key) = from.lossy_keys().first() {
        malformed!("key '{key}' holds text that is not UTF-8, which a copy would change");
    }
    let mut writer = GgufWriter::new();
    writer.copy_metadata(from, |_| true);
    // LLAMA_FTYPE_ALL_F32
    writer.set("general.file_type", 0u32);
    for tensor in from.tensors() {
        let (name, ty, data) = (tensor.name(), tensor.ty(), from.data(tensor.name())?);
        if can_dequantize(ty) {
            let produce = move |out: &mut dyn Write| write_decoded(out, ty, data);
            writer.tensor_with(name, tensor.dims(), TensorType::F32, produce)?;
        } else if ty.is_quantized() {
            malformed!("tensor '{name}' is of type {ty}, which has no decoder here");
        } else {
            writer.tensor(name, tensor.dims(), ty, data)?;
        }
    }
    writer.write(to)
}

fn write_decoded(out: &mut dyn Write, ty: TensorType, data: &[u8]) -> io::Result<()> {
    let (block, bytes) = (ty.block_size() as usize, ty.block_bytes() as usize);
    let blocks = CHUNK.div_ceil(block);
    let mut values = vec![0.0; blocks * block];
    for part in data.chunks(blocks * bytes) {
        let values = &mut values[..part.len() / bytes * block];
        dequantize(ty, part, values).map_err(io::Error::other)?;
        write_f32(out, TensorType::F32, values.iter().copied())?;
    }
    Ok(())
}
