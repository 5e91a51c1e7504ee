//! What a job is to do, with every name looked up.

use super::now;
use super::spec::Spec;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The version of [`Order`]'s form.
pub(super) const VERSION: u32 = 1;

/// What a job is to do, with everything looked up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Order {
    pub version: u32,
    pub id: String,
    /// With every default filled in.
    pub spec: Spec,
    /// The name of what it makes.
    pub name: String,
    /// The model that is trained further, a GGUF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// SHA-256 of it, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_sha256: Option<String>,
    /// The Hugging Face folder that the model was converted from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<PathBuf>,
    pub train: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation: Option<PathBuf>,
    /// The adapter to go on from: a PEFT folder or a GGUF.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// The model whose tokenizer a fresh model takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// When the job was created, in seconds since 1970: the date that chat templates write, however
    /// often and whenever the job goes on.
    #[serde(default)]
    pub created_at: i64,
}

impl Order {
    /// An order that names only its data.
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
            init: None,
            tokenizer: None,
            created_at: now() as i64,
        }
    }
}

/// `ft:<base>:<organization>:<suffix>:<id>`, or the name that the specification gives.
pub fn name_of(spec: &Spec, id: &str) -> String {
    if let Some(name) = &spec.name {
        return name.clone();
    }
    let base = spec.model.as_deref().unwrap_or_default();
    let suffix = spec.suffix.as_deref().unwrap_or_default();
    let id = &id[id.len().saturating_sub(8)..];
    format!("ft:{base}:ingot:{suffix}:{id}")
}
