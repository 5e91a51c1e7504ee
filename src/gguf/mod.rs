//! GGUF files: reading of untrusted files, atomic writing, and conversion of LoRA adapters.
//!
//! | file | content |
//! |---|---|
//! | `types.rs` | tensor types, metadata values |
//! | `error.rs` | [`GgufError`], one sentence each |
//! | `parser.rs` | bounded numbers, strings and values |
//! | `reader.rs` | [`Gguf`]: checked header, memory-mapped tensors |
//! | `dequantize.rs` | [`dequantize()`]: stored tensors as `f32`, bit for bit as in ggml |
//! | `dequantized.rs` | [`write_dequantized`]: a model's copy in F32, to measure rounding against |
//! | `arch.rs` | [`ModelConfig`]: configuration of a model that the native runner supports |
//! | `arch/` | one file per family of models, their RoPE settings, and the layout of matrices |
//! | `facts.rs` | [`ModelFacts`]: properties of a model that serving needs, from its header alone |
//! | `tokens.rs` | [`TokenizerFacts`]: the special tokens and templates within those facts |
//! | `writer.rs` | [`GgufWriter`] |
//! | `layers.rs` | [`keep_layers`]: a model without some of its layers |
//! | `peft.rs` | PEFT folders: configuration, tensor names |
//! | `lora.rs` | [`peft_to_gguf`] |
//! | `lora_check.rs` | [`check_lora_gguf`], [`score_head`] |
//! | `quantize.rs` | [`quantize_q8_0`]: quantization as in ggml |
//! | `hugging_face/` | [`convert`]: conversion of Hugging Face folders to GGUF |
//! | `fixture.rs` | tiny models for tests |
//!
//! Every file is untrusted input: no length, offset, count or shape is used before it was compared
//! with the size of the file, and no allocation is larger than a small multiple of that size.

#![allow(unsafe_code)]

mod arch;
mod dequantize;
mod dequantized;
mod error;
mod facts;
#[doc(hidden)]
pub mod fixture;
mod hugging_face;
mod layers;
mod lora;
mod lora_check;
mod parser;
mod peft;
mod quantize;
mod reader;
#[cfg(test)]
mod tests;
mod tokens;
mod types;
mod writer;

pub use arch::{
    Gating, KERNEL_TYPES, LayerKind, ModelConfig, PARTS, PROJECTIONS, Projection, RopeFactors,
    RopeFacts, UnsupportedModel, Yarn, rows_of,
};
pub use dequantize::{DequantizeError, IQ4_LEVELS, can_dequantize, dequantize};
pub use dequantized::{dequantized_bytes, write_dequantized};
pub use error::GgufError;
pub use facts::{KvType, ModelFacts, PoolingType, SplitFacts};
pub use hugging_face::{
    ConvertError, LACKING, convert, fingerprint, hugging_face_name, is_hugging_face, pre_tokenizer,
};
pub use layers::keep_layers;
pub use lora::{LoraError, LoraInfo, peft_to_gguf};
pub use lora_check::{SCORE_HEAD, check_lora_gguf, score_head};
pub use peft::{is_interleaved, layer_module};
pub use quantize::quantize_q8_0;
pub use reader::{Gguf, TensorInfo};
pub use tokens::{SpecialToken, TokenizerFacts};
pub use types::{Array, TensorType, UnknownTensorType, Value};
pub use writer::GgufWriter;
pub(crate) use writer::write_f32;
