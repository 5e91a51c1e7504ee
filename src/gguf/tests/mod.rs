//! Tests: round trips, malformed files, and adapters compared with direct computation.

mod alloc;
mod arch;
mod dequantize;
mod facts;
mod fuzz;
mod lora;
mod reader;

use std::path::Path;

use tempfile::TempDir;

use super::fixture::{TinyLlama, tiny_llama};
use crate::gguf::Gguf;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn llama(dir: &Path, options: &TinyLlama) -> Gguf {
    let path = dir.join("llama.gguf");
    tiny_llama(&path, options).unwrap();
    Gguf::open(&path).unwrap()
}
