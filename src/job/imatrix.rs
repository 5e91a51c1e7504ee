//! What the computation of an importance matrix is.

use std::path::PathBuf;

/// Tokens of a chunk by default, as in llama-imatrix.
pub const IMATRIX_CONTEXT: usize = 512;

/// The computation of an importance matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImatrixPlan {
    /// A GGUF file.
    pub model: PathBuf,
    /// The file to write, in llama.cpp's GGUF format.
    pub output: PathBuf,
    /// The calibration text, and its name in the file.
    pub text: String,
    pub text_name: String,
    /// Tokens of a chunk, which is read from an empty cache.
    pub context: usize,
    /// Maximum number of chunks.
    pub chunks: Option<usize>,
    /// Also collects the inputs of `output.weight`.
    pub output_tensor: bool,
    pub threads: usize,
    /// Replaces an existing output.
    pub force: bool,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImatrixReport {
    pub tensors: usize,
    pub chunks: usize,
    /// Tokens that were read.
    pub tokens: usize,
    /// Tensors of which some experts were never used, with the number of these experts.
    pub unused_experts: Vec<(String, usize)>,
}
