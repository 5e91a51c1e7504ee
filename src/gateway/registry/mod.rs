//! Registry of loaded models and adapters by name.
//!
//! A name resolves to a model and, if it names an adapter, to one version of that adapter. The
//! result ([`Served`]) keeps both alive. An adapter version is unloaded from its engine when the
//! last request that started with it has ended, so a reload under the same name is atomic. An
//! unloaded model finishes its running requests first. Only one model is loaded at a time, so that
//! each memory plan includes the models loaded before. If a model does not fit, the least recently
//! used idle model is unloaded.

mod adapters;
mod load;
mod model;
mod named;
mod published;

pub(crate) use adapters::work_folder;
pub use adapters::{AdapterSpec, AdapterVersion};
pub use model::Model;
pub use named::{ModelFiles, OfJob};

use crate::config::ServeConfig;
use crate::gateway::error::ApiError;
use crate::gateway::memory::MemoryPlan;
use crate::gateway::metrics::EngineSample;
use crate::gateway::store::{Published, Store};
use crate::gateway::supervisor::{Engine, EngineState};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Maximum length of the name of a model or adapter.
pub(in crate::gateway) const MAX_NAME: usize = 200;

/// All loaded models and adapters.
#[derive(Debug)]
pub struct Registry {
    config: Arc<ServeConfig>,
    store: Arc<Store>,
    state: Mutex<State>,
    /// Held while a model is loaded or unloaded.
    one_at_a_time: tokio::sync::Mutex<()>,
    /// Held while an adapter is loaded on demand by a request.
    one_adapter_at_a_time: tokio::sync::Mutex<()>,
    /// Held while what a published name stands for is changed.
    one_publication_at_a_time: tokio::sync::Mutex<()>,
    /// Next number of an adapter version or of a use of a model (for the least-recently-used
    /// order).
    next: AtomicU64,
    /// Lower bound of the number of running requests that belong to jobs.
    of_jobs: AtomicUsize,
}

#[derive(Debug, Default)]
struct State {
    models: BTreeMap<String, Arc<Model>>,
    adapters: BTreeMap<String, Arc<AdapterVersion>>,
    loading: BTreeSet<String>,
    /// Names that stand for models or adapters.
    published: BTreeMap<String, Published>,
    publication: Option<published::Publication>,
    /// Reasons why models and adapters of published names could not be loaded at start.
    load_failures: BTreeMap<String, String>,
    /// Loaded models and adapters that every start with the same command line loads.
    command_line: BTreeSet<String>,
    /// Adapters that an operator unloaded: requests do not load them again.
    unloaded: BTreeSet<String>,
    /// Unloaded models that still finish their last requests, for the metrics and the memory plan.
    leaving: BTreeMap<String, Arc<Model>>,
}

/// Model and adapter that a request's `model` names. Hold it until the request has ended.
#[derive(Debug, Clone)]
pub struct Served {
    /// The name as the request wrote it.
    pub name: String,
    /// The name of the model or adapter, which differs from `name` if that is published.
    pub target: String,
    pub model: Arc<Model>,
    pub adapter: Option<Arc<AdapterVersion>>,
}

/// An entry of `GET /v1/models`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelCard {
    pub id: String,
    pub object: &'static str,
    /// Load time in seconds since 1970.
    pub created: u64,
    pub owned_by: &'static str,
    /// The base model of an adapter; for a model, the model itself.
    pub root: String,
    /// The base model of an adapter.
    pub parent: Option<String>,
    /// Longest prompt plus output, in tokens (vLLM's name).
    pub max_model_len: u32,
}

/// State of a model as shown to operators.
#[derive(Debug, Clone, Serialize)]
pub struct ModelStatus {
    pub name: String,
    /// `ready`, `loading`, `restarting`, `failed` or `unloading`.
    pub state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub architecture: String,
    pub quantization: String,
    pub parameters: u64,
    pub running: u32,
    pub waiting: u32,
    pub restarts: u64,
    pub adapters: Vec<String>,
    /// Total of the memory plan, in bytes.
    pub memory_total: u64,
    pub memory: MemoryPlan,
}

impl Registry {
    /// Creates an empty registry; relative names of models and adapters are resolved in `store`.
    pub fn new(config: Arc<ServeConfig>, store: Arc<Store>) -> Arc<Self> {
        adapters::sweep_work_folders(&store);
        let published = store.published().unwrap_or_else(|error| {
            tracing::error!("the published names cannot be read: {error}");
            Vec::new()
        });
        let names = published.into_iter().map(|published| (published.name.clone(), published));
        let state = State { published: names.collect(), ..State::default() };
        Arc::new(Self {
            config,
            store,
            state: Mutex::new(state),
            one_at_a_time: tokio::sync::Mutex::default(),
            one_adapter_at_a_time: tokio::sync::Mutex::default(),
            one_publication_at_a_time: tokio::sync::Mutex::default(),
            next: AtomicU64::new(1),
            of_jobs: AtomicUsize::new(0),
        })
    }

    /// Notes that the command line names a loaded model or adapter, so that a restart loads it too.
    pub fn note_command_line(&self, name: &str) {
        self.lock().command_line.insert(name.to_owned());
    }

    /// The data folder in which names are resolved.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Resolves the name of a model or adapter. Published names are resolved by
    /// [`Registry::find`].
    ///
    /// # Errors
    /// 404 `model_not_found`, or 503 while the model is loading.
    pub fn resolve(&self, name: &str) -> Result<Served, ApiError> {
        let state = self.lock();
        let adapter = state.adapters.get(name);
        let base = adapter.map_or(name, |adapter| adapter.base());
        let Some(model) = state.models.get(base) else {
            return Err(match state.loading.contains(name) {
                true => ApiError::unavailable(format!(
                    "The model `{name}` is still loading; try again soon."
                )),
                false => ApiError::model_not_found(name),
            });
        };
        model.touch(self.next.fetch_add(1, Ordering::Relaxed));
        let (name, target) = (name.to_owned(), name.to_owned());
        Ok(Served { name, target, model: model.clone(), adapter: adapter.cloned() })
    }

    /// Everything that `find` finds, sorted by name: models, adapters, and those that a request
    /// would load.
    pub fn list(&self) -> Vec<ModelCard> {
        let mut loaded = self.loaded();
        loaded.extend(self.on_demand_cards(&loaded));
        let of = |published: Published| {
            let served = loaded.iter().find(|card| card.id == published.model)?;
            let Published { name, model, changed_at, .. } = published;
            let created = changed_at.unsigned_abs();
            Some(ModelCard { id: name, created, root: model, parent: None, ..served.clone() })
        };
        let published: Vec<_> = self.published().into_iter().filter_map(of).collect();
        loaded.extend(published);
        loaded
    }

    fn loaded(&self) -> Vec<ModelCard> {
        let state = self.lock();
        let card = |id: &str, created, parent: Option<&str>, model: &Model| ModelCard {
            id: id.to_owned(),
            object: "model",
            created,
            owned_by: "ingot",
            root: parent.unwrap_or(id).to_owned(),
            parent: parent.map(str::to_owned),
            max_model_len: model.plan.context_length,
        };
        let models =
            state.models.values().map(|model| card(&model.name, model.created, None, model));
        let adapters = state.adapters.values().filter_map(|adapter| {
            let model = state.models.get(adapter.base())?;
            Some(card(&adapter.name, adapter.created, Some(adapter.base()), model))
        });
        models.chain(adapters).collect()
    }

    /// The model card of one name.
    ///
    /// # Errors
    /// 404 `model_not_found`.
    pub fn card(&self, name: &str) -> Result<ModelCard, ApiError> {
        let found = self.list().into_iter().find(|card| card.id == name);
        found.ok_or_else(|| ApiError::model_not_found(name))
    }

    /// Loaded adapters, sorted by name.
    pub fn adapters(&self) -> Vec<Arc<AdapterVersion>> {
        self.lock().adapters.values().cloned().collect()
    }

    /// The engines of all models, including models that are being unloaded.
    pub fn engines(&self) -> Vec<Arc<Engine>> {
        let state = self.lock();
        state.models.values().chain(state.leaving.values()).map(|m| m.engine.clone()).collect()
    }

    /// Metric samples of all engines.
    pub fn samples(&self) -> Vec<EngineSample> {
        self.engines().iter().map(|engine| EngineSample::of(engine)).collect()
    }

    /// Status of all models, for operators.
    pub fn status(&self) -> Vec<ModelStatus> {
        let state = self.lock();
        let status = |model: &Arc<Model>, leaving: bool| {
            let adapters = state.adapters.values().filter(|adapter| adapter.base() == model.name);
            model.status(leaving, adapters.map(|adapter| adapter.name.clone()).collect())
        };
        let models = state.models.values().map(|model| status(model, false));
        models.chain(state.leaving.values().map(|model| status(model, true))).collect()
    }

    /// Names of models that are being loaded.
    pub fn loading(&self) -> Vec<String> {
        self.lock().loading.iter().cloned().collect()
    }

    /// Models that cannot accept requests now, each with the reason.
    pub fn not_ready(&self) -> Vec<(String, String)> {
        let state = self.lock();
        let loading = state.loading.iter().map(|name| (name.clone(), "loading".to_owned()));
        let down = state.models.values().filter_map(|model| {
            let reason = match model.engine.state() {
                EngineState::Ready(_) => return None,
                EngineState::Loading => "loading".to_owned(),
                EngineState::Restarting { reason } => format!("restarting: {reason}"),
                EngineState::Failed { reason } => format!("failed: {reason}"),
                EngineState::Stopped => "stopped".to_owned(),
            };
            Some((model.name.clone(), reason))
        });
        loading.chain(down).collect()
    }

    /// Stops every engine; running requests fail.
    pub async fn stop(&self) {
        let (models, adapters) = {
            let mut state = self.lock();
            let mut models = std::mem::take(&mut state.models);
            models.append(&mut state.leaving);
            (models, std::mem::take(&mut state.adapters))
        };
        drop(adapters);
        let stops = models.into_values().map(|model| async move { model.stop().await });
        futures_util::future::join_all(stops).await;
        adapters::remove_work_folder(&self.store);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses names that would be ambiguous in a log or a URL.
pub(in crate::gateway) fn check_name(param: &str, name: &str) -> Result<(), ApiError> {
    let plain = |c: char| !c.is_control() && !c.is_whitespace();
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(plain) {
        return Err(ApiError::invalid(
            param,
            format!("{param} must be 1 to {MAX_NAME} bytes without white space."),
        ));
    }
    Ok(())
}

/// 409.
fn conflict(message: impl Into<String>) -> ApiError {
    ApiError::new(http::StatusCode::CONFLICT, "invalid_request_error", message)
}

/// Runs `work` on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(ApiError::internal(error)))
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests;
