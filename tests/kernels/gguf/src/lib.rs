//! The readers of GGUF, for the kernels.

// The crate has users of what is unused here.
#![allow(dead_code, unused_imports)]

#[path = "../../../../src/gguf/mod.rs"]
pub mod gguf;
