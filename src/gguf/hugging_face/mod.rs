//! Hugging Face folders: [`convert`] makes a GGUF of one, which everything else then reads.
//!
//! | file | what |
//! |---|---|
//! | `folder.rs` | [`Json`] files, bounded; what a folder is known by |
//! | `config.rs` | `config.json` → a [`Plan`](config::Plan): metadata and the tensors that must be there |
//! | `rope.rs` | how positions turn, in both spellings of transformers |
//! | `names.rs` | [`hugging_face_name`]: what a tensor is called there |
//! | `weights.rs` | `*.safetensors`, mapped: tensors by name, written one at a time |
//! | `tokenizer.rs` | which tokenizer a folder has; special tokens, chat templates |
//! | `bpe.rs`, `pre_tokenizer.rs` | `tokenizer.json` of byte-level BPE; the table of pre-tokenizers |
//! | `pieces.rs`, `sentencepiece.rs` | SentencePiece, out of `tokenizer.json` or `tokenizer.model` |
//!
//! Keys, tensors and tokens are those that `convert_hf_to_gguf.py` of llama.cpp writes, so that the
//! file is the same to whatever reads it. Nothing of a folder is believed before it is checked; what
//! cannot be carried over is an error where the model would be another one, and is said in words
//! where it only lacks something.

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

/// Why a folder was not converted. The text names the file at fault within the folder, and what to
/// change.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The operating system refused.
    #[error("{file}: {source}")]
    Io { file: String, source: io::Error },
    /// A file of the folder says what cannot be, or what is not carried over.
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

/// The key under which a converted file keeps what it lacks of its folder, for those who use it later.
pub const LACKING: &str = "ingot.lacking";

/// Makes a GGUF of a folder, at `out`, with further keys, `facts`. F32, F16 and BF16 stay what they
/// are; vectors become F32. One tensor is held at a time. Returns what the file lacks of what the
/// folder has, in words.
///
/// # Errors
/// [`ConvertError`]; nothing half-written is left.
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
    // Shapes first: the vocabulary is padded to what the embedding really has.
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
