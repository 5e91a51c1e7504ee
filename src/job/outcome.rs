//! How a job ended, and the files that it produced.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum Outcome {
    Succeeded {
        /// Tokens processed in all steps, including context tokens; 0 if the job does not train.
        trained_tokens: u64,
        artifacts: Vec<Artifact>,
    },
    Failed {
        #[serde(flatten)]
        failure: Failure,
        /// Files that it wrote all the same, such as the report of an evaluation whose bounds are
        /// missed.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        artifacts: Vec<Artifact>,
    },
}

/// Why a job failed, in the form of OpenAI's job objects.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub code: String,
    pub message: String,
    /// `training_file` or `validation_file`, or a key of the specification.
    pub param: Option<String>,
}

/// A file that a job produced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Artifact {
    #[serde(rename = "type")]
    pub kind: ArtifactKind,
    /// Path relative to the job's folder.
    pub file: PathBuf,
    pub bytes: u64,
    pub sha256: String,
}

/// The kind of an artifact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ArtifactKind {
    /// A LoRA adapter in llama.cpp's format; this file is served.
    Adapter,
    /// A file of the same adapter in PEFT's format.
    Peft,
    /// A model as GGUF.
    Model,
    /// A file of the same model in transformers' format.
    HuggingFace,
    /// Losses by step, as CSV.
    Results,
    /// The completions that a policy was trained on, as JSON lines.
    Rollouts,
    /// Examples that the job made, as JSON lines.
    Examples,
    /// A report about them, as JSON or HTML.
    Report,
    /// The origin of the artifacts: base model, data and settings.
    Provenance,
}

impl ArtifactKind {
    /// The name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adapter => "adapter",
            Self::Peft => "peft",
            Self::Model => "model",
            Self::HuggingFace => "hugging_face",
            Self::Results => "results",
            Self::Rollouts => "rollouts",
            Self::Examples => "examples",
            Self::Report => "report",
            Self::Provenance => "provenance",
        }
    }
}
