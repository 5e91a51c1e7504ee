//! How a job ended, and the files that it made.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Outcome {
    Succeeded {
        /// Tokens of all steps, context included.
        trained_tokens: u64,
        artifacts: Vec<Artifact>,
    },
    Failed(Failure),
}

/// Why it failed, as OpenAI's job objects say it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub code: String,
    pub message: String,
    /// `training_file` or `validation_file`.
    pub param: Option<String>,
}

/// A file that a job made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    #[serde(rename = "type")]
    pub kind: ArtifactKind,
    /// Below the job's folder.
    pub file: PathBuf,
    pub bytes: u64,
    pub sha256: String,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactKind {
    /// A LoRA adapter as llama.cpp reads it; what is served.
    Adapter,
    /// A file of the same adapter as PEFT reads it.
    Peft,
    /// A model, GGUF.
    Model,
    /// A file of the same model as transformers reads it.
    HuggingFace,
    /// Losses by step, CSV.
    Results,
    /// Where all this comes from.
    Provenance,
}

impl ArtifactKind {
    /// As the API says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Peft => "peft",
            Self::Model => "model",
            Self::HuggingFace => "hugging_face",
            Self::Results => "results",
            Self::Provenance => "provenance",
        }
    }
}
