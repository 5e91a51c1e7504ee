//! Hugging Face folders: converted once to a model of the data folder.

use super::database::Store;
use super::pull::{
    PullError, PullEvent, PulledModel, check_space, find, folder_name, io_error, lock, publish,
};
use super::reference::ModelRef;
use crate::gguf::{Gguf, convert, fingerprint};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// GGUF key with the fingerprint of the folder from which the file was converted.
const FINGERPRINT: &str = "ingot.folder_fingerprint";

/// The model of a folder. The folder is converted if it was not before, or if it has changed.
pub(super) fn from_folder(
    store: &Store,
    folder: &Path,
    events: &mut dyn FnMut(PullEvent),
) -> Result<PulledModel, PullError> {
    let folder = folder.canonicalize().map_err(|_| PullError::NoFile(folder.to_owned()))?;
    let reference = ModelRef::File(folder.clone());
    let refused = |error: crate::gguf::ConvertError| PullError::Folder {
        folder: folder.clone(),
        reason: error.to_string(),
    };
    let print = fingerprint(&folder).map_err(refused)?;
    if let Some(found) = current(store, &reference, &print)? {
        return Ok(found);
    }
    let key = folder_name(&reference.to_string());
    let _lock = lock(&store.downloads_folder().join(format!("{key}.lock")), events)?;
    if let Some(found) = current(store, &reference, &print)? {
        return Ok(found);
    }
    let part = store.downloads_folder().join(format!("{key}.part"));
    check_space(store, &part, Some(weight_bytes(&folder)))?;
    events(PullEvent::Note(format!("Converting {} to GGUF, once.", folder.display())));
    let lacking = convert(&folder, &part, &[(FINGERPRINT, print)]).map_err(refused)?;
    for what in lacking {
        events(PullEvent::Note(format!("Not taken over: {what}.")));
    }
    let sha256 = digest(&part)?;
    publish(store, &reference, &part, sha256)
}

/// The converted model of the folder in its present state, if there is one.
fn current(
    store: &Store,
    reference: &ModelRef,
    print: &str,
) -> Result<Option<PulledModel>, PullError> {
    let found = find(store, reference)?;
    Ok(found.filter(|found| {
        let file = Gguf::open_header(&found.path);
        file.is_ok_and(|file| matches!(file.str(FINGERPRINT), Ok(Some(made)) if made == print))
    }))
}

/// Approximate size of the converted GGUF, in bytes.
fn weight_bytes(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let weights =
        files.filter(|file| file.path().extension().is_some_and(|end| end == "safetensors"));
    weights.filter_map(|file| fs::metadata(file.path()).ok()).map(|about| about.len()).sum()
}

fn digest(path: &Path) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(io_error("read", path))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(io_error("read", path))? {
            0 => return Ok(super::hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}
