//! Names beyond the loaded models: adapters of the store are loaded on demand, and jobs can train
//! models of the data folder.

use super::adapters::adapter_file;
use super::load::store_error;
use super::{AdapterSpec, ModelCard, Registry, Served, State, blocking, check_name};
use crate::gateway::error::ApiError;
use crate::gateway::metrics::Metrics;
use crate::gateway::store::{StoredAdapter, StoredModel};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A model or adapter with its files.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    /// The name as requested.
    pub name: String,
    /// The model, or the base of the adapter.
    pub model: String,
    pub path: PathBuf,
    /// SHA-256 of the file, if known.
    pub sha256: Option<String>,
    /// The Hugging Face folder from which the model was converted.
    pub parent: Option<PathBuf>,
    /// A PEFT folder or a GGUF, if the name is an adapter's.
    pub adapter: Option<PathBuf>,
}

/// Guard that counts requests of a job. See [`Registry::count_of_job`].
#[derive(Debug)]
pub struct OfJob {
    registry: Arc<Registry>,
    requests: usize,
}

impl Drop for OfJob {
    fn drop(&mut self) {
        self.registry.of_jobs.fetch_sub(self.requests, Ordering::Relaxed);
    }
}

impl Registry {
    /// Resolves `name`. An adapter of the store is loaded first if its base model is loaded. Of a
    /// published name, the candidate of a share is never chosen.
    ///
    /// # Errors
    /// As [`Registry::resolve`] and [`Registry::load_adapter`].
    pub async fn find(self: &Arc<Self>, name: &str) -> Result<Served, ApiError> {
        self.find_chosen(name, |state| state.main_target(name)).await
    }

    /// As [`Registry::find`], for a request of a client, which is counted if `name` is published. If
    /// some of the requests of the name go to another model, those with the same `key` go to the same
    /// model.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub async fn find_for(
        self: &Arc<Self>,
        name: &str,
        key: Option<&str>,
        metrics: &Metrics,
    ) -> Result<Served, ApiError> {
        let served = self.find_chosen(name, |state| state.target(name, key)).await?;
        if served.target != served.name {
            metrics.published(&served.name, &served.target);
        }
        Ok(served)
    }

    async fn find_chosen(
        self: &Arc<Self>,
        name: &str,
        choose: impl Fn(&State) -> String,
    ) -> Result<Served, ApiError> {
        let mut target = choose(&self.lock());
        let mut found = self.find_target(&target).await;
        if found.as_ref().is_err_and(is_not_found) {
            // Another model may have been published in the meantime, and this one unloaded.
            let now = choose(&self.lock());
            if now != target {
                target = now;
                found = self.find_target(&target).await;
            }
        }
        match found {
            Ok(served) => Ok(Served { name: name.to_owned(), ..served }),
            Err(error) if target != name && is_not_found(&error) => {
                let why = self.lock().load_failures.get(&target).cloned();
                let why = why.map(|why| format!(" It could not be loaded: {why}"));
                Err(ApiError::unavailable(format!(
                    "`{name}` stands for the model `{target}`, which is not loaded.{}",
                    why.unwrap_or_default()
                )))
            }
            Err(error) => Err(error),
        }
    }

    async fn find_target(self: &Arc<Self>, name: &str) -> Result<Served, ApiError> {
        match self.resolve(name) {
            Err(error) if error.code.as_deref() == Some("model_not_found") => {}
            found => return found,
        }
        let Some(stored) = self.on_demand(name).await? else { return self.resolve(name) };
        let _turn = self.one_adapter_at_a_time.lock().await;
        // Another request may have loaded it in the meantime.
        if let Ok(found) = self.resolve(name) {
            return Ok(found);
        }
        let spec = AdapterSpec {
            name: stored.name.clone(),
            base: Some(stored.base_model),
            path: self.adapter_path(&stored.name).await?,
            scale: stored.scale,
            check: false,
        };
        self.load_adapter(spec).await?;
        self.resolve(name)
    }

    /// The stored adapter that a request for `name` loads.
    async fn on_demand(&self, name: &str) -> Result<Option<StoredAdapter>, ApiError> {
        let (store, wanted) = (self.store.clone(), name.to_owned());
        let stored = blocking(move || store.adapter(&wanted).map_err(store_error)).await?;
        let state = self.lock();
        Ok(stored.filter(|stored| {
            state.models.contains_key(&stored.base_model) && !state.unloaded.contains(name)
        }))
    }

    /// Model cards of adapters that a request would load.
    pub(super) fn on_demand_cards(&self, loaded: &[ModelCard]) -> Vec<ModelCard> {
        let stored = self.store.adapters().unwrap_or_else(|error| {
            tracing::error!("the adapters cannot be listed: {error}");
            Vec::new()
        });
        let state = self.lock();
        let listed = |stored: &StoredAdapter| loaded.iter().any(|card| card.id == stored.name);
        let card = |stored: StoredAdapter| {
            let base = state.models.get(&stored.base_model)?;
            (!listed(&stored) && !state.unloaded.contains(&stored.name)).then(|| ModelCard {
                id: stored.name,
                object: "model",
                created: stored.created_at.unsigned_abs(),
                owned_by: "ingot",
                root: stored.base_model.clone(),
                parent: Some(stored.base_model),
                max_model_len: base.plan.context_length,
            })
        };
        stored.into_iter().filter_map(card).collect()
    }

    /// The files of a model or adapter, loaded or in the data folder; of a published name those of
    /// its model.
    ///
    /// # Errors
    /// 404 if there is no such name, 422 if it has no file.
    pub async fn model_files(self: &Arc<Self>, name: &str) -> Result<ModelFiles, ApiError> {
        check_name("model", name)?;
        let published = self.lock().published.get(name).map(|published| published.model.clone());
        let name = published.as_deref().unwrap_or(name);
        let loaded = {
            let state = self.lock();
            let adapter = state.adapters.get(name);
            let model = state.models.get(adapter.map_or(name, |adapter| adapter.base()));
            model.map(|model| (model.clone(), adapter.map(|adapter| adapter.file().to_owned())))
        };
        let (store, wanted) = (self.store.clone(), name.to_owned());
        if let Some((model, adapter)) = loaded {
            if model.fileless {
                let message = format!("The model `{name}` has no file.");
                return Err(ApiError::unprocessable(message).with_param("model"));
            }
            let of = model.name.clone();
            let stored = blocking(move || store.model(&of).map_err(store_error)).await?;
            let folder = self.store.folder().to_owned();
            let same = stored.filter(|stored| {
                folder.join(&stored.file).canonicalize().is_ok_and(|path| path == model.path)
            });
            return Ok(ModelFiles {
                name: name.to_owned(),
                model: model.name.clone(),
                path: model.path.clone(),
                parent: same.as_ref().and_then(StoredModel::parent),
                sha256: same.map(|stored| stored.sha256),
                adapter,
            });
        }
        let adapter = self.store.adapter(name).map_err(store_error)?;
        let base = adapter.as_ref().map_or(wanted, |adapter| adapter.base_model.clone());
        let loaded = self.lock().models.get(&base).cloned();
        let path = match &adapter {
            Some(adapter) => {
                let path = self.adapter_path(&adapter.name).await?;
                Some(blocking(move || adapter_file(&path)).await?)
            }
            None => None,
        };
        if let Some(model) = loaded {
            let (model, file) = (model.name.clone(), model.path.clone());
            return Ok(ModelFiles {
                name: name.into(),
                model,
                path: file,
                sha256: None,
                parent: None,
                adapter: path,
            });
        }
        let stored = blocking(move || store.model(&base).map_err(store_error)).await?;
        let stored = stored.ok_or_else(|| ApiError::model_not_found(name))?;
        Ok(ModelFiles {
            name: name.to_owned(),
            parent: stored.parent(),
            model: stored.name,
            path: self.store.folder().join(stored.file),
            sha256: Some(stored.sha256),
            adapter: path,
        })
    }

    /// Whether any engine has a request that does not come from a job.
    pub fn is_busy(&self) -> bool {
        let state = self.lock();
        let models = state.models.values().chain(state.leaving.values());
        let all: usize = models.map(|model| model.engine.in_flight()).sum();
        all > self.of_jobs.load(Ordering::Relaxed)
    }

    /// Counts requests of a job until the guard is dropped. [`Registry::is_busy`] excludes them, so
    /// a job is not throttled because of its own requests.
    pub fn count_of_job(self: &Arc<Self>, requests: usize) -> OfJob {
        self.of_jobs.fetch_add(requests, Ordering::Relaxed);
        OfJob { registry: self.clone(), requests }
    }
}

fn is_not_found(error: &ApiError) -> bool {
    error.code.as_deref() == Some("model_not_found")
}
