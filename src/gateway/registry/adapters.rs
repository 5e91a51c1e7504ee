//! Loading of LoRA adapters: from a folder or file to a version in an engine.
//!
//! The engine loads a private copy that was checked against the base model's header, so the file
//! cannot change between the check and the load, or before a restarted engine loads it again.

use super::load::store_error;
use super::{Model, Registry, blocking, check_name, conflict, seconds_since_1970};
use crate::gateway::error::ApiError;
use crate::gateway::store::Store;
use crate::gateway::supervisor::{Engine, EngineAdapter};
use crate::gguf::{Gguf, LoraInfo, check_lora_gguf, peft_to_gguf};
use crate::ipc::{AdapterId, Call, EngineErrorKind, Event, Generate, Prompt, Reply};
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Maximum size of a LoRA GGUF, in bytes.
const MAX_GGUF: u64 = 4 << 30;

/// Specification of an adapter to load.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterSpec {
    /// The name that requests use.
    pub name: String,
    /// The loaded model that the adapter was trained on; `None` means the only loaded model.
    pub base: Option<String>,
    /// A PEFT folder, a LoRA GGUF, or a folder that holds one. Never taken from a request.
    pub path: PathBuf,
    /// Factor on the adapter's own scale; 1 is the scale of training.
    pub scale: f32,
    /// Whether to check, before requests can use the adapter, that its weights are finite and that
    /// it can generate a token.
    pub check: bool,
}

/// One loaded version of an adapter. Dropping the last reference unloads it from its engine;
/// every request that uses the version holds a reference until the request has ended.
pub struct AdapterVersion {
    pub id: AdapterId,
    pub name: String,
    /// SHA-256 of the GGUF that the engine loaded.
    pub digest: [u8; 32],
    pub scale: f32,
    /// Load time in seconds since 1970.
    pub created: u64,
    /// Result of the check; `None` with the mock runner.
    pub info: Option<LoraInfo>,
    /// The folder or file that was loaded; it may have been moved since.
    pub(super) source: PathBuf,
    base: String,
    engine: Arc<Engine>,
    file: WorkFile,
}

impl fmt::Debug for AdapterVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AdapterVersion").field(&self.name).field(&self.id).finish()
    }
}

impl AdapterVersion {
    /// Name of the base model.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Whether the adapter is a reward model, which returns scores instead of text.
    pub fn is_reward_model(&self) -> bool {
        self.info.as_ref().is_some_and(|info| info.reward_model)
    }

    /// The GGUF that the engine loaded.
    pub(super) fn file(&self) -> &Path {
        &self.file.0
    }
}

impl Drop for AdapterVersion {
    fn drop(&mut self) {
        self.engine.unload_adapter(self.id);
    }
}

impl Registry {
    /// Resolves an adapter id to a path. The id is a name in the store's list, or the name of a
    /// file or folder in `<data>/adapters`.
    ///
    /// # Errors
    /// 400 for an invalid id, 404 if there is no such adapter.
    pub async fn adapter_path(&self, id: &str) -> Result<PathBuf, ApiError> {
        check_name("source", id)?;
        let (store, id) = (self.store.clone(), id.to_owned());
        blocking(move || {
            let listed = store.adapter(&id).map_err(store_error)?;
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            let path = match listed {
                Some(adapter) => store.folder().join(adapter.file),
                None if !id.starts_with('.') && id.chars().all(plain) => {
                    store.adapters_folder().join(&id)
                }
                None => {
                    return Err(ApiError::invalid(
                        "source",
                        "source must be the name of a file or folder inside the adapters folder: \
                         letters, digits, dots, dashes and underscores.",
                    ));
                }
            };
            let missing = |_| {
                ApiError::not_found(format!("There is no adapter `{id}`.")).with_param("source")
            };
            let path = path.canonicalize().map_err(missing)?;
            // A link that leads out of the folders is not followed.
            if ![store.adapters_folder(), store.jobs_folder()]
                .iter()
                .any(|folder| folder.canonicalize().is_ok_and(|inside| path.starts_with(inside)))
            {
                return Err(missing(std::io::ErrorKind::NotFound.into()));
            }
            Ok(path)
        })
        .await
    }

    /// Loads an adapter and atomically replaces the version of the same name: a request uses either
    /// the old or the new version.
    ///
    /// # Errors
    /// 404 if the base is not loaded, 409 if the name is a model's, 422 if the adapter does not fit
    /// the base or the engine refuses it.
    pub async fn load_adapter(
        self: &Arc<Self>,
        spec: AdapterSpec,
    ) -> Result<Arc<AdapterVersion>, ApiError> {
        check_name("name", &spec.name)?;
        if !(spec.scale.is_finite() && spec.scale.abs() <= 100.0) {
            return Err(ApiError::invalid("scale", "scale must lie between -100 and 100."));
        }
        let base = self.adapter_base(spec.base.as_deref())?;
        let registry = self.clone();
        // Runs in its own task: if the client disconnects, no half-loaded adapter is left behind.
        let task = tokio::spawn(async move { registry.load_adapter_on(base, spec).await });
        task.await.unwrap_or_else(|error| Err(ApiError::internal(error)))
    }

    fn adapter_base(&self, name: Option<&str>) -> Result<Arc<Model>, ApiError> {
        let state = self.lock();
        match (name, state.models.len()) {
            (Some(name), _) => state.models.get(name).cloned().ok_or_else(|| {
                let mut error = ApiError::model_not_found(name);
                error.param = Some("base".into());
                error
            }),
            (None, 1) => Ok(state.models.values().next().expect("there is one").clone()),
            (None, _) => Err(ApiError::invalid(
                "base",
                "base must name the loaded model that the adapter was trained on.",
            )),
        }
    }

    async fn load_adapter_on(
        self: Arc<Self>,
        base: Arc<Model>,
        spec: AdapterSpec,
    ) -> Result<Arc<AdapterVersion>, ApiError> {
        self.adapter_name_is_free(&spec.name)?;
        let version = self.version_on(&base, spec).await?;
        let replaced = {
            let mut state = self.lock();
            state.unloaded.remove(&version.name);
            state.command_line.remove(&version.name);
            let still_there =
                state.models.get(&base.name).is_some_and(|model| Arc::ptr_eq(model, &base));
            if !still_there {
                return Err(ApiError::model_not_found(&base.name));
            }
            if state.models.contains_key(&version.name) || state.loading.contains(&version.name) {
                return Err(name_is_a_models(&version.name));
            }
            if state.is_published(&version.name) {
                return Err(name_is_published(&version.name));
            }
            state.adapters.insert(version.name.clone(), version.clone())
        };
        tracing::info!(adapter = version.name, model = base.name, "adapter loaded");
        drop(replaced);
        Ok(version)
    }

    /// Loads a version that requests cannot name; only the holder of the result can use it.
    ///
    /// # Errors
    /// As [`Registry::load_adapter`].
    pub async fn private_adapter(
        self: &Arc<Self>,
        base: &Arc<Model>,
        spec: AdapterSpec,
    ) -> Result<Arc<AdapterVersion>, ApiError> {
        let (registry, base) = (self.clone(), base.clone());
        // Runs in its own task, as in `load_adapter`.
        let task = tokio::spawn(async move { registry.version_on(&base, spec).await });
        task.await.unwrap_or_else(|error| Err(ApiError::internal(error)))
    }

    async fn version_on(
        &self,
        base: &Arc<Model>,
        spec: AdapterSpec,
    ) -> Result<Arc<AdapterVersion>, ApiError> {
        let id = AdapterId(self.next.fetch_add(1, Ordering::Relaxed));
        let file = WorkFile::new(&self.store, &format!("adapter-{}.gguf", id.0));
        let (source, model) = (spec.path.clone(), base.clone());
        let (file, info, digest) = blocking(move || {
            let info = prepare(&source, &model, &file.0).inspect_err(|error| {
                tracing::warn!("an adapter was refused: {error}");
            })?;
            let digest = digest_of(&file.0).map_err(ApiError::internal)?;
            Ok((file, info, digest))
        })
        .await?;
        let cache_digest = with_scale(&digest, spec.scale);
        if spec.check {
            let path = file.0.clone();
            blocking(move || check_finite(&path)).await?;
        }
        let what = EngineAdapter { path: file.0.clone(), digest: cache_digest, scale: spec.scale };
        base.engine.load_adapter(id, what).await.map_err(|error| match error.kind {
            EngineErrorKind::Unavailable | EngineErrorKind::Overloaded => error.into(),
            _ => ApiError::unprocessable(format!("The engine refused the adapter: {error}")),
        })?;
        let version = Arc::new(AdapterVersion {
            id,
            name: spec.name,
            digest,
            scale: spec.scale,
            created: seconds_since_1970(),
            info,
            source: spec.path,
            base: base.name.clone(),
            engine: base.engine.clone(),
            file,
        });
        match (spec.check, version.is_reward_model()) {
            (true, false) => check_generation(&version).await?,
            (true, true) => check_score(&version).await?,
            (false, _) => {}
        }
        Ok(version)
    }

    fn adapter_name_is_free(&self, name: &str) -> Result<(), ApiError> {
        let state = self.lock();
        if state.models.contains_key(name) || state.loading.contains(name) {
            return Err(name_is_a_models(name));
        }
        match state.is_published(name) {
            true => Err(name_is_published(name)),
            false => Ok(()),
        }
    }

    /// Removes an adapter. Running requests finish with it.
    ///
    /// # Errors
    /// 404 if there is no adapter of that name, 409 if a published name stands for it.
    pub fn unload_adapter(&self, name: &str) -> Result<(), ApiError> {
        let removed = {
            let mut state = self.lock();
            state.check_unpublished(name)?;
            state.unloaded.insert(name.to_owned());
            state.adapters.remove(name)
        };
        match removed {
            Some(version) => {
                tracing::info!(adapter = version.name, model = version.base, "adapter unloaded");
                Ok(())
            }
            None => Err(ApiError::not_found(format!("There is no adapter `{name}` loaded."))),
        }
    }
}

/// Refuses adapters with a weight that is not finite.
fn check_finite(path: &Path) -> Result<(), ApiError> {
    let file = Gguf::open(path).map_err(ApiError::internal)?;
    for tensor in file.tensors() {
        let values = file.to_f32(tensor.name()).map_err(ApiError::internal)?;
        if values.iter().any(|value| !value.is_finite()) {
            let name = tensor.name();
            return Err(ApiError::unprocessable(format!(
                "The adapter's tensor `{name}` holds values that are no numbers."
            )));
        }
    }
    Ok(())
}

/// Checks that the adapter generates one token with a finite log-probability.
async fn check_generation(version: &AdapterVersion) -> Result<(), ApiError> {
    let refused =
        |why: String| ApiError::unprocessable(format!("The adapter does not work: {why}."));
    let prompt = Prompt::Text { text: "Hello".into(), add_special: true, parse_special: false };
    let mut request = Generate::plain(0, prompt);
    request.adapter = Some(version.id);
    request.logprobs = Some(0);
    request.stop.max_tokens = Some(1);
    let mut running = version.engine.generate(request)?;
    while let Some(event) = running.next().await {
        match event {
            Event::Delta { logprobs, .. }
                if logprobs.iter().any(|token| !token.logprob.is_some_and(f32::is_finite)) =>
            {
                return Err(refused("its logits are no numbers".into()));
            }
            Event::Failed(error) => return Err(refused(error.to_string())),
            _ => {}
        }
    }
    Ok(())
}

/// Checks that a reward model scores a word with a finite number.
async fn check_score(version: &AdapterVersion) -> Result<(), ApiError> {
    let refused =
        |why: String| ApiError::unprocessable(format!("The reward model does not work: {why}."));
    let input = Prompt::Text { text: "Hello".into(), add_special: true, parse_special: false };
    let call = Call::Score { adapter: version.id, inputs: vec![input] };
    match version.engine.call(call).await {
        Ok(Reply::Scores { scores, .. }) if scores.iter().all(|score| score.is_finite()) => Ok(()),
        Ok(_) => Err(refused("its scores are no numbers".into())),
        Err(error) => Err(refused(error.to_string())),
    }
}

fn name_is_a_models(name: &str) -> ApiError {
    conflict(format!("`{name}` is the name of a model.")).with_param("name")
}

fn name_is_published(name: &str) -> ApiError {
    conflict(format!("`{name}` is a published name; give the adapter another name."))
        .with_param("name")
}

/// Writes the checked adapter to `out`. Blocks.
fn prepare(source: &Path, base: &Model, out: &Path) -> Result<Option<LoraInfo>, ApiError> {
    let refused = |error: &dyn std::fmt::Display| {
        ApiError::unprocessable(format!("The adapter cannot be used: {error}."))
    };
    let file = adapter_file(source)?;
    if file.is_dir() {
        if base.fileless {
            let weights = source.join("adapter_model.safetensors");
            return copy(&weights, out).map(|()| None).map_err(|e| refused(&e));
        }
        let gguf = Gguf::open_header(&base.path).map_err(ApiError::internal)?;
        let info = peft_to_gguf(source, &base.facts, &gguf, out).map_err(|e| refused(&e))?;
        return Ok(Some(info));
    }
    copy(&file, out).map_err(|e| refused(&e))?;
    if base.fileless {
        return Ok(None);
    }
    let gguf = Gguf::open_header(&base.path).map_err(ApiError::internal)?;
    check_lora_gguf(out, &gguf).map(Some).map_err(|e| refused(&e))
}

/// The adapter itself: a PEFT folder, a file, or the only GGUF in a folder without
/// `adapter_config.json`, as uploads have. Blocks.
pub(super) fn adapter_file(source: &Path) -> Result<PathBuf, ApiError> {
    if !source.is_dir() || source.join("adapter_config.json").is_file() {
        return Ok(source.to_owned());
    }
    only_gguf(source)
}

fn only_gguf(folder: &Path) -> Result<PathBuf, ApiError> {
    let files = std::fs::read_dir(folder).map_err(ApiError::internal)?;
    let mut ggufs = files
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    match (ggufs.next(), ggufs.next()) {
        (Some(path), None) => Ok(path),
        _ => Err(ApiError::unprocessable(
            "The folder is no adapter: it must hold adapter_config.json and \
             adapter_model.safetensors, or one GGUF file.",
        )),
    }
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    let mut from = File::open(from)?;
    let file = from.metadata()?;
    if !file.is_file() || file.len() > MAX_GGUF {
        return Err(std::io::Error::other("it is no file, or too large"));
    }
    std::io::copy(&mut from, &mut File::create_new(to)?).map(drop)
}

/// SHA-256 of a file. Blocks.
pub(crate) fn digest_of(path: &Path) -> std::io::Result<[u8; 32]> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().into()),
            read => hash.update(&buffer[..read]),
        }
    }
}

/// Cache key of prefixes: the same weights with another scale compute other values.
fn with_scale(digest: &[u8; 32], scale: f32) -> [u8; 32] {
    Sha256::new().chain_update(digest).chain_update(scale.to_le_bytes()).finalize().into()
}

/// A file of this process in the data folder, removed when it is dropped.
#[derive(Debug)]
struct WorkFile(PathBuf);

impl WorkFile {
    fn new(store: &Store, name: &str) -> Self {
        let folder = work_folder(store);
        if let Err(error) = std::fs::create_dir_all(&folder) {
            tracing::error!("{} cannot be created: {error}", folder.display());
        }
        Self(folder.join(name))
    }
}

impl Drop for WorkFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// `<data>/run/<pid>`: folder for files that this process needs while it runs.
pub(crate) fn work_folder(store: &Store) -> PathBuf {
    store.folder().join("run").join(std::process::id().to_string())
}

pub(super) fn remove_work_folder(store: &Store) {
    let _ = std::fs::remove_dir_all(work_folder(store));
}

/// Removes the work folders of processes that have ended.
pub(super) fn sweep_work_folders(store: &Store) {
    let Ok(folders) = std::fs::read_dir(store.folder().join("run")) else { return };
    for folder in folders.flatten() {
        let pid = folder.file_name().to_string_lossy().parse::<u32>().ok();
        let alive = pid.is_some_and(|pid| {
            pid != std::process::id() && Path::new(&format!("/proc/{pid}")).exists()
        });
        if pid.is_some() && !alive {
            let _ = std::fs::remove_dir_all(folder.path());
        }
    }
}
