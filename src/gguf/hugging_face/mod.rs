//! Hugging Face folders: [`convert`] converts a folder to a GGUF, which all other code then reads.
//!
//! | file | content |
//! |---|---|
//! | `folder.rs` | bounded [`Json`] files; fingerprint of a folder |
//! | `config.rs` | `config.json` → a [`Plan`](config::Plan): metadata and the required tensors |
//! | `rope.rs` | RoPE settings, in both formats of transformers |
//! | `names.rs` | [`hugging_face_name`]: Hugging Face's names of tensors |
//! | `weights.rs` | `*.safetensors`, mapped: tensors by name, written one at a time |
//! | `tokenizer.rs` | kind of the folder's tokenizer; special tokens, chat templates |
//! | `bpe.rs`, `pre_tokenizer.rs` | `tokenizer.json` of byte-level BPE; the table of pre-tokenizers
//! |
//! | `pieces.rs`, `sentencepiece.rs` | SentencePiece, from `tokenizer.json` or `tokenizer.model` |
//!
//! Keys, tensors and tokens are those that `convert_hf_to_gguf.py` of llama.cpp writes, so that all
//! readers treat the file the same. Every part of a folder is checked before it is used. A setting
//! that a GGUF cannot represent is an error if ignoring it would change the model, and is reported
//! as a note if only a feature is missing.

mod bpe;
mod config;
mod folder;
mod names;
mod pieces;
mod pre_tokenizer;
mod rope;
mod sentencepiece;
#[cfg(test)]
mod tests;
mod tokenizer;
mod weights;

pub use folder::{fingerprint, is_hugging_face};
pub use names::hugging_face_name;
pub use pre_tokenizer::pre_tokenizer;

use super::{GgufError, GgufWriter, TensorType};
use std::io;
use std::path::Path;

/// Reason why a folder was not converted. The message names the file at fault within the folder,
/// and what to change.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// An operation of the operating system failed.
    #[error("{file}: {source}")]
    Io { file: String, source: io::Error },
    /// A file of the folder is invalid or has an unsupported setting.
    #[error("{file}: {reason}")]
    File { file: String, reason: String },
    /// The GGUF cannot be written.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

impl ConvertError {
    fn new(file: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::File { file: file.into(), reason: reason.into() }
    }

    fn io(file: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let file = file.into();
        |source| Self::Io { file, source }
    }
}

/// Key under which a converted file stores the notes about missing features, for later loads.
pub const LACKING: &str = "ingot.lacking";

/// Converts a folder to a GGUF at `out`, with the further keys `facts`. Matrices keep their type
/// F32, F16 or BF16; vectors become F32. One tensor is held at a time. Returns notes about features
/// of the folder that the file lacks.
///
/// [`ConvertError`]; no partial file is left. [`ConvertError`]; nothing half-written is left.
pub fn convert(
    folder: &Path,
    out: &Path,
    facts: &[(&str, String)],
) -> Result<Vec<String>, ConvertError> {
    let config = folder::config(folder)?;
    let weights = weights::Weights::open(folder)?;
    let mut lacking = Vec::new();
    let plan = config::plan(&config, &weights, &mut lacking)?;
    let mut writer = GgufWriter::new();
    writer.set("general.architecture", plan.architecture).set("general.type", "model");
    writer.set("general.name", folder::name(folder));
    for (key, value) in plan.keys {
        writer.set(&format!("{}.{key}", plan.architecture), value);
    }
    // Tensors first: the vocabulary is padded to the actual rows of the embedding.
    weights.write(&plan.tensors, &mut writer, &mut lacking)?;
    tokenizer::write(folder, &config, plan.vocab, &mut writer, &mut lacking)?;
    for (key, value) in facts {
        writer.set(key, value.as_str());
    }
    if !lacking.is_empty() {
        writer.set(LACKING, lacking.clone());
    }
    for (name, values) in plan.computed {
        let dims = [values.len() as u64];
        writer.tensor_f32(name, &dims, TensorType::F32, values)?;
    }
    writer.write(out)?;
    Ok(lacking)
}
