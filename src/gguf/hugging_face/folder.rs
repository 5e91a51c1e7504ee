//! Files of a folder: bounded JSON, the model's name, the fingerprint.

use super::ConvertError;
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

pub(super) const CONFIG: &str = "config.json";
pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
pub(super) const TOKENIZER_MODEL: &str = "tokenizer.model";

/// Maximum size of a file that is read as a whole, in bytes. Tokenizers with vocabularies of 256k
/// tokens have 35 MB.
const MAX_FILE: u64 = 256 << 20;

/// A JSON object.
pub(super) type Object = Map<String, Json>;

/// Whether `folder` looks like a Hugging Face model.
pub fn is_hugging_face(folder: &Path) -> bool {
    folder.is_dir() && folder.join(CONFIG).is_file()
}

/// A digest of the folder's small files, and of the names, sizes and times of its large ones. If
/// the digest is unchanged, so is the output of [`convert`](super::convert).
///
/// # Errors
/// [`ConvertError`] if the folder cannot be read.
pub fn fingerprint(folder: &Path) -> Result<String, ConvertError> {
    let shown = || folder.display().to_string();
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(ConvertError::io(shown()))? {
        let entry = entry.map_err(ConvertError::io(shown()))?;
        // Follows links, which hub caches use.
        let about = fs::metadata(entry.path()).map_err(ConvertError::io(shown()))?;
        if about.is_file() {
            files.push((entry.file_name(), about));
        }
    }
    files.sort_by(|a, b| a.0.cmp(&b.0));
    let mut hash = Sha256::new();
    // Another version of the conversion may produce another file.
    hash.update(env!("CARGO_PKG_VERSION"));
    for (name, about) in files {
        let changed = about.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        hash.update(name.as_encoded_bytes());
        hash.update([0]);
        hash.update(about.len().to_le_bytes());
        hash.update(changed.map_or(0, |at| at.as_nanos()).to_le_bytes());
    }
    hash.update(bytes(folder, CONFIG)?.unwrap_or_default());
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The model's name, which is that of its folder.
pub(super) fn name(folder: &Path) -> String {
    let whole = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

/// Reads a whole file; `None` if it does not exist.
pub(super) fn bytes(folder: &Path, file: &str) -> Result<Option<Vec<u8>>, ConvertError> {
    let path = folder.join(file);
    let about = match fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        about => about.map_err(ConvertError::io(file))?,
    };
    if !about.is_file() || about.len() > MAX_FILE {
        return Err(ConvertError::new(file, "it is not a file of up to 256 MiB"));
    }
    fs::read(&path).map(Some).map_err(ConvertError::io(file))
}

/// Reads a file that holds a JSON object; `None` if it does not exist.
pub(super) fn object(folder: &Path, file: &str) -> Result<Option<Object>, ConvertError> {
    let Some(bytes) = bytes(folder, file)? else { return Ok(None) };
    let object = serde_json::from_slice(&bytes);
    object.map(Some).map_err(|error| {
        ConvertError::new(file, format!("it does not hold a JSON object: {error}"))
    })
}

/// Reads `config.json`; for a multimodal model, its part about text.
pub(super) fn config(folder: &Path) -> Result<Object, ConvertError> {
    if !folder.is_dir() {
        let reason = "there is no such folder; name one that holds config.json";
        return Err(ConvertError::new(folder.display().to_string(), reason));
    }
    let Some(mut config) = object(folder, CONFIG)? else {
        let reason = "there is no such file; name the folder of a model of Hugging Face's";
        return Err(ConvertError::new(CONFIG, reason));
    };
    if let Some(Json::Object(mut text)) = config.remove("text_config") {
        for key in ["tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"] {
            if let (None, Some(value)) = (text.get(key), config.remove(key)) {
                text.insert(key.to_owned(), value);
            }
        }
        return Ok(text);
    }
    Ok(config)
}
