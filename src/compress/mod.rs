//! Compression of models.
//!
//! | file | content |
//! |---|---|
//! | `quantize.rs` | quantization by llama.cpp, byte for byte as llama-quantize writes |
//! | `job.rs` | jobs that quantize |
//! | `imatrix.rs` | files of importance matrices |
//! | `activations.rs` | importance matrices from a model's activations |

#![allow(unsafe_code)]

mod activations;
mod imatrix;
pub mod job;
mod quantize;
#[cfg(test)]
mod tests;

pub use activations::imatrix;
pub use quantize::quantize;
