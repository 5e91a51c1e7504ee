//! [`Order`]: the resolved description of a job.

use super::now;
use super::spec::Spec;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Version of the [`Order`] format.
pub(super) const VERSION: u32 = 1;

/// The resolved description of a job: every name is replaced by a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    pub version: u32,
    pub id: String,
    /// The specification with every default filled in.
    pub spec: Spec,
    /// Name of the model or adapter that the job produces.
    pub name: String,
    /// The base model, a GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// SHA-256 of `model`, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_sha256: Option<String>,
    /// The Hugging Face folder from which the model was converted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PathBuf>,
    pub train: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<PathBuf>,
    /// Preference pairs labelled by people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub human: Option<PathBuf>,
    /// The adapter to continue training from: a PEFT folder or a GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// The model whose tokenizer a new model uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// The model whose distributions are learned, a GGUF file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<PathBuf>,
    /// When the job was created, in seconds since 1970. Chat templates print this date, so it stays
    /// the same when the job resumes.
    #[serde(default)]
    pub created_at: i64,
}

impl Order {
    /// An order with only its data files set.
    pub fn new(id: String, spec: Spec, name: String, train: PathBuf) -> Self {
        Self {
            version: VERSION,
            id,
            spec,
            name,
            model: None,
            model_sha256: None,
            parent: None,
            train,
            validation: None,
            human: None,
            init: None,
            tokenizer: None,
            teacher: None,
            created_at: now() as i64,
        }
    }
}

/// `ft:<base>:<organization>:<suffix>:<id>`, or the `name` of the specification.
pub fn name_of(spec: &Spec, id: &str) -> String {
    if let Some(name) = &spec.name {
        return name.clone();
    }
    let base = spec.model.as_deref().unwrap_or_default();
    let suffix = spec.suffix.as_deref().unwrap_or_default();
    let id = &id[id.len().saturating_sub(8)..];
    format!("ft:{base}:ingot:{suffix}:{id}")
}
