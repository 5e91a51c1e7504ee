//! Loading and unloading models.
//!
//! Both run in tasks of their own, so they continue if the client disconnects while it waits.

use super::{Model, Registry, blocking, check_name, conflict, seconds_since_1970};
use crate::gateway::error::ApiError;
use crate::gateway::header::ModelHeader;
use crate::gateway::memory::{DoesNotFit, MemoryPlan, ModelFile, available};
use crate::gateway::store::StoreError;
use crate::gateway::supervisor::Engine;
use crate::ipc::{RunnerKind, Speculate};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time limit for loading a model; after it, the load is considered hung.
const LOAD_PATIENCE: Duration = Duration::from_secs(15 * 60);

impl Registry {
    /// Loads a model that the data folder knows, by its name there or by the reference it was
    /// pulled with, and serves it as `name` (by default its own name).
    ///
    /// # Errors
    /// 404 if the data folder does not know the model; otherwise as [`Registry::load_path`].
    pub async fn load_model(
        self: &Arc<Self>,
        reference: &str,
        name: Option<&str>,
    ) -> Result<Arc<Model>, ApiError> {
        check_name("model", reference)?;
        let (store, wanted) = (self.store.clone(), reference.to_owned());
        let found = blocking(move || store.model(&wanted).map_err(store_error)).await?;
        let stored = found.ok_or_else(|| {
            ApiError::not_found(format!(
                "The data folder has no model `{reference}`: get it with `ingot pull` first."
            ))
            .with_param("model")
            .with_code("model_not_found")
        })?;
        let path = self.store.folder().join(&stored.file);
        self.load_path(name.unwrap_or(&stored.name), path, None).await
    }

    /// Loads the model file at `path` (never taken from a request) and serves it as `name`, with
    /// the model at `draft` as its draft model. Returns once the model accepts requests.
    ///
    /// # Errors
    /// 409 if the name is taken; 422 with the numbers if the model does not fit into memory, or
    /// with the last lines of the engine's log if it does not load.
    pub async fn load_path(
        self: &Arc<Self>,
        name: &str,
        path: PathBuf,
        draft: Option<PathBuf>,
    ) -> Result<Arc<Model>, ApiError> {
        check_name("name", name)?;
        let loading = Loading::reserve(self, name)?;
        let task = tokio::spawn(async move {
            let registry = loading.registry.clone();
            registry.load_reserved(loading, path, draft).await
        });
        task.await.unwrap_or_else(|error| Err(ApiError::internal(error)))
    }

    async fn load_reserved(
        self: Arc<Self>,
        loading: Loading,
        path: PathBuf,
        draft: Option<PathBuf>,
    ) -> Result<Arc<Model>, ApiError> {
        let _turn = self.one_at_a_time.lock().await;
        let runner = self.config.engine.runner;
        let draft = draft.filter(|_| self.config.engine.speculate != Speculate::Off);
        let (model, draft) = blocking(move || {
            let read = |path: PathBuf| -> Result<_, ApiError> {
                let path = path.canonicalize().unwrap_or(path);
                Ok(ModelFile { header: ModelHeader::read(&path, runner)?, path })
            };
            Ok((read(path)?, draft.map(read).transpose()?))
        })
        .await?;
        let plan = self.make_room(&model, draft.as_ref()).await?;
        let header = model.header;
        let started = Instant::now();
        let name = loading.name.clone();
        let engine = Engine::start(name.clone(), plan.spec.clone(), self.config.engine.watchdog);
        match tokio::time::timeout(LOAD_PATIENCE, engine.ready()).await {
            Ok(Ok(_)) => {}
            Ok(Err(reason)) => {
                return Err(ApiError::unprocessable(format!(
                    "The model `{name}` could not be loaded: {reason}"
                ))
                .with_code("model_load_failed"));
            }
            Err(_) => {
                engine.stop().await;
                return Err(ApiError::unprocessable(format!(
                    "The model `{name}` was not loaded within {} minutes.",
                    LOAD_PATIENCE.as_secs() / 60
                ))
                .with_code("model_load_failed"));
            }
        }
        tracing::info!(model = name, seconds = started.elapsed().as_secs_f32(), "model loaded");
        let created = seconds_since_1970();
        let make = move || Ok(Arc::new(Model::new(name, header, plan, engine, created)));
        let model = blocking(make).await?;
        if model.chat.as_ref().is_ok_and(|template| !template.caps().ends_turns) {
            tracing::warn!(
                model = model.name,
                "the chat template puts nothing behind an answer: the model may not know where to stop"
            );
        }
        let mut state = self.lock();
        model.touch(self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        state.command_line.remove(&model.name);
        state.models.insert(model.name.clone(), model.clone());
        Ok(model)
    }

    /// Plans for a new model and unloads idle models, the least recently used first, until it fits.
    async fn make_room(
        self: &Arc<Self>,
        model: &ModelFile,
        draft: Option<&ModelFile>,
    ) -> Result<MemoryPlan, ApiError> {
        let refused =
            |DoesNotFit(reason)| ApiError::unprocessable(reason).with_code("insufficient_memory");
        let config = &self.config.engine;
        let evictable: u64 = self.idle_models().iter().map(|model| model.plan.total()).sum();
        let best = self.room().saturating_add(evictable);
        let plan = MemoryPlan::make(model, draft, config, best).map_err(refused)?;
        check_draft(&plan, &model.header, draft)?;
        loop {
            let plan = MemoryPlan::make(model, draft, config, self.room());
            let full = self.lock().models.len() >= config.max_loaded_models as usize;
            let refusal = match plan {
                Ok(plan) if !full => return Ok(plan),
                Ok(_) => ApiError::unprocessable(format!(
                    "{} models are loaded and busy, the most that --max-loaded-models allows: \
                     unload one first.",
                    config.max_loaded_models
                ))
                .with_code("too_many_models"),
                Err(reason) => refused(reason),
            };
            let Some(oldest) = self.idle_models().into_iter().min_by_key(|m| m.last_used()) else {
                return Err(refusal);
            };
            let name = oldest.name.clone();
            // A model that was published in the meantime stays, and another one is chosen.
            if self.remove(oldest).await.is_ok() {
                tracing::info!(model = name, "unloaded to make room");
            }
        }
    }

    /// Loaded models that no request uses and no published name stands for.
    fn idle_models(&self) -> Vec<Arc<Model>> {
        // One reference is held by the map.
        let state = self.lock();
        let may_leave = |model: &&Arc<Model>| model.idle(1) && state.serves(&model.name).is_none();
        state.models.values().filter(may_leave).cloned().collect()
    }

    /// Number of bytes available for one more model.
    fn room(&self) -> u64 {
        let state = self.lock();
        let loaded = || state.models.values().chain(state.leaving.values()).map(|m| &m.plan);
        // The system reports mapped weights as available memory, but the loaded models need them.
        let mapped: u64 = loaded().map(|plan| plan.mapped_weights).sum();
        let machine = available().saturating_sub(mapped);
        let taken: u64 = loaded().map(MemoryPlan::total).sum();
        let budget = self.config.engine.memory_budget.map(|budget| budget.saturating_sub(taken));
        budget.map_or(machine, |budget| budget.min(machine))
    }

    /// Unloads a model and its adapters: new requests get a 404 at once, running ones finish within
    /// the grace time. Returns once the engine's process has ended.
    ///
    /// # Errors
    /// 404 if there is no model of that name, 409 while it is being loaded or if a published name
    /// stands for it.
    pub async fn unload_model(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let model = {
            let state = self.lock();
            if state.loading.contains(name) {
                return Err(conflict(format!("The model `{name}` is still loading.")));
            }
            state.models.get(name).cloned().ok_or_else(|| ApiError::model_not_found(name))?
        };
        let registry = self.clone();
        let task = tokio::spawn(async move { registry.remove(model).await });
        task.await.map_err(ApiError::internal)?
    }

    /// # Errors
    /// 409 if a published name stands for the model.
    async fn remove(&self, model: Arc<Model>) -> Result<(), ApiError> {
        let name = model.name.as_str();
        let adapters: Vec<_> = {
            let mut state = self.lock();
            // Checked under the lock under which the model leaves: a publication may have begun.
            state.check_unpublished(name)?;
            match state.models.remove(name) {
                // Another task removed the model, and another model of the same name may be loaded.
                Some(other) if !Arc::ptr_eq(&other, &model) => {
                    state.models.insert(name.to_owned(), other);
                    return Ok(());
                }
                None => return Ok(()),
                Some(_) => {}
            }
            state.leaving.insert(name.to_owned(), model.clone());
            let of_model: Vec<_> = state
                .adapters
                .values()
                .filter(|adapter| adapter.base() == name)
                .map(|adapter| adapter.name.clone())
                .collect();
            of_model.iter().filter_map(|adapter| state.adapters.remove(adapter)).collect()
        };
        drop(adapters);
        let deadline = Instant::now() + self.config.listen.grace_time;
        // Two references are held by `leaving` and by this function.
        while !model.idle(2) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        model.stop().await;
        self.lock().leaving.remove(name);
        tracing::info!(model = name, "model unloaded");
        Ok(())
    }
}

/// Reservation of the name of a model that is being loaded; dropping it frees the name.
struct Loading {
    registry: Arc<Registry>,
    name: String,
}

impl Loading {
    fn reserve(registry: &Arc<Registry>, name: &str) -> Result<Self, ApiError> {
        let mut state = registry.lock();
        let taken = if state.models.contains_key(name) {
            "is loaded"
        } else if state.loading.contains(name) {
            "is being loaded"
        } else if state.leaving.contains_key(name) {
            "is being unloaded"
        } else if state.adapters.contains_key(name) {
            "is the name of an adapter"
        } else if state.is_published(name) {
            return Err(conflict(format!(
                "`{name}` is a published name: load the model under another name, or remove the \
                 published name with `DELETE /admin/published/{name}`."
            ))
            .with_param("name"));
        } else {
            state.loading.insert(name.to_owned());
            return Ok(Self { registry: registry.clone(), name: name.to_owned() });
        };
        Err(conflict(format!("`{name}` {taken} already.")).with_param("name"))
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.registry.lock().loading.remove(&self.name);
    }
}

/// Checks that the draft model can draft for the model, and that the model can verify drafts.
fn check_draft(
    plan: &MemoryPlan,
    header: &ModelHeader,
    draft: Option<&ModelFile>,
) -> Result<(), ApiError> {
    let Some(draft) = draft.filter(|_| plan.spec.runner != RunnerKind::Mock) else { return Ok(()) };
    let refuse = |why: String| {
        Err(ApiError::unprocessable(format!(
            "The draft model cannot be used: {why}. Take another --draft-model, or leave it out."
        ))
        .with_code("draft_model_unusable"))
    };
    let reason = |uncovered: &Option<String>| match uncovered {
        Some(reason) => format!(" ({reason})"),
        None => String::new(),
    };
    if plan.spec.runner == RunnerKind::LlamaCpp {
        let why = reason(&header.uncovered);
        return refuse(format!("llama.cpp runs the model, whose rows cannot be checked{why}"));
    }
    match draft.header.uncovered {
        Some(_) => {
            let why = reason(&draft.header.uncovered);
            refuse(format!("the native runner does not cover it{why}"))
        }
        None => Ok(()),
    }
}

pub(super) fn store_error(error: StoreError) -> ApiError {
    ApiError::internal(error)
}
