//! Compression of models.
//!
//! | file | content |
//! |---|---|
//! | `quantize.rs` | quantization by llama.cpp, byte for byte as llama-quantize writes |
//! | `imatrix.rs` | importance matrices |
//! | `log.rs` | what llama.cpp says while it works |

#![allow(unsafe_code)]

mod imatrix;
mod log;
mod quantize;
#[cfg(test)]
mod tests;

pub use quantize::quantize;
