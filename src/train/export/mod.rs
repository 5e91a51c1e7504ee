//! Exports trained models and adapters in the formats of other programs.
//!
//! | file | content |
//! |---|---|
//! | `adapter.rs` | PEFT folders, llama.cpp's LoRA GGUF |
//! | `weights.rs` | a model's current tensors, one at a time |
//! | `model.rs` | models as GGUF |
//! | `folder.rs` | models as Hugging Face folders |
//! | `config.rs` | a model's `config.json` |
//! | `standalone.rs` | `ingot export` |
//! | `tokenizer.rs` | a GGUF's tokenizer as `tokenizer.json` |

mod adapter;
mod config;
mod folder;
mod model;
mod standalone;
#[cfg(test)]
mod tests;
mod tokenizer;
mod weights;

pub use adapter::{lora_gguf, peft_folder};
pub use folder::hf_folder;
pub use model::model_gguf;
pub use standalone::{begin_with, export, lora_of};

use crate::gguf::GgufError;
use std::path::{Path, PathBuf};

/// Why an export failed.
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

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> ExportError {
    let path = path.to_owned();
    |source| ExportError::Io { path, source }
}
