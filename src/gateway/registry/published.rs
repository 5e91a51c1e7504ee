//! Published names: a name that clients use, and the model or adapter that serves it, which the
//! operator exchanges without a failed request. The database holds them, so a restart serves the
//! same.

use super::load::store_error;
use super::{AdapterVersion, Registry, State, blocking, check_name, conflict, seconds_since_1970};
use crate::gateway::error::ApiError;
use crate::gateway::store::{Candidate, Published};
use sha2::{Digest, Sha256};
use std::sync::Arc;

impl Published {
    /// The model that serves a request. Requests with the same key always get the same one.
    fn chosen(&self, key: Option<&str>) -> &str {
        let Some(Candidate { model, share }) = &self.candidate else { return &self.model };
        let point = key.map_or_else(rand::random::<f64>, |key| point(&self.name, key));
        if point < *share { model } else { &self.model }
    }
}

/// A number from 0 to 1 that name and key give.
fn point(name: &str, key: &str) -> f64 {
    let mut hash = Sha256::new();
    hash.update((name.len() as u64).to_le_bytes());
    hash.update(name);
    hash.update(key);
    let digest = hash.finalize();
    let bytes = digest.iter().take(6).fold(0u64, |number, &byte| number << 8 | u64::from(byte));
    bytes as f64 / (1u64 << 48) as f64
}

/// A publication in progress. Its models and adapters are neither unloaded nor evicted.
#[derive(Debug)]
pub(super) struct Publication {
    /// The published name.
    name: String,
    /// The model or adapter that will serve it, and the base of an adapter.
    needs: Vec<String>,
}

/// Guard of [`State::publication`].
struct Hold(Arc<Registry>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.lock().publication = None;
    }
}

impl State {
    /// The model or adapter that serves a request for `name`: itself, unless it is published. A
    /// candidate that is not loaded gets no requests.
    pub(super) fn target(&self, name: &str, key: Option<&str>) -> String {
        let Some(published) = self.published.get(name) else { return name.to_owned() };
        let chosen = Some(published.chosen(key)).filter(|chosen| self.is_loaded(chosen));
        chosen.unwrap_or(&published.model).to_owned()
    }

    /// As [`State::target`], but never the candidate of a share.
    pub(super) fn main_target(&self, name: &str) -> String {
        self.published.get(name).map_or(name, |published| &published.model).to_owned()
    }

    /// Whether a name is published, or is being published for the first time.
    pub(super) fn is_published(&self, name: &str) -> bool {
        self.published.contains_key(name)
            || self.publication.as_ref().is_some_and(|publication| publication.name == name)
    }

    fn is_loaded(&self, name: &str) -> bool {
        let base = self.adapters.get(name).map_or(name, |adapter| adapter.base());
        self.models.contains_key(base)
    }

    /// The published name that a model serves, or will serve once a publication in progress is
    /// done, itself or as the base of an adapter.
    pub(super) fn serves(&self, model: &str) -> Option<&str> {
        let base = |target: &str| self.adapters.get(target).map(|adapter| adapter.base());
        let uses = |published: &&Published| {
            published.serving().any(|target| target == model || base(target) == Some(model))
        };
        let published = self.published.values().find(uses).map(|published| &*published.name);
        let held = |held: &&Publication| held.needs.iter().any(|needed| needed == model);
        published.or_else(|| self.publication.as_ref().filter(held).map(|held| &*held.name))
    }

    /// Checks that no published name stands for a model or adapter, which is about to be unloaded.
    ///
    /// # Errors
    /// 409.
    pub(super) fn check_unpublished(&self, model: &str) -> Result<(), ApiError> {
        match self.serves(model) {
            None => Ok(()),
            Some(published) => Err(conflict(format!(
                "`{model}` serves the published name `{published}`: publish another model under that \
                 name first."
            ))),
        }
    }
}

impl Registry {
    /// Whether `name` is published, or is being published for the first time.
    pub fn is_published(&self, name: &str) -> bool {
        self.lock().is_published(name)
    }

    /// The model or adapter that `name` stands for, never the candidate of a share: itself, unless
    /// it is published.
    pub fn main_target(&self, name: &str) -> String {
        self.lock().main_target(name)
    }

    /// All published names.
    pub fn published(&self) -> Vec<Published> {
        self.lock().published.values().cloned().collect()
    }

    /// Loads the models of all published names that are not loaded. One that cannot be loaded is
    /// logged, and its name answers with the reason.
    pub async fn load_published(self: &Arc<Self>) {
        let _turn = self.one_publication_at_a_time.lock().await;
        for published in self.published() {
            for model in published.serving() {
                if let Err(error) = self.serve_target(model).await {
                    let (name, why) = (&published.name, error.message);
                    tracing::error!(name, model, "a published model cannot be loaded: {why}");
                    self.lock().load_failures.insert(model.to_owned(), why);
                }
            }
        }
    }

    /// Has `name` stand for `model`, a name or reference, which is loaded first. With `share`, only
    /// this share of the requests goes to it. The model that served the name before is kept for
    /// [`Registry::rollback`].
    ///
    /// # Errors
    /// 404 for an unknown model, 409 if `name` is that of a model or adapter or if a restarted
    /// server could not load `model`, 400 for a share of a name that was never published or that
    /// `model` serves already, and as [`Registry::load_path`].
    pub async fn publish(
        self: &Arc<Self>,
        name: &str,
        model: &str,
        share: Option<f64>,
    ) -> Result<Published, ApiError> {
        check_name("name", name)?;
        check_name("model", model)?;
        let (registry, name, model) = (self.clone(), name.to_owned(), model.to_owned());
        // Runs in its own task, so that a client that disconnects does not leave half of it.
        let task = tokio::spawn(async move {
            let _turn = registry.one_publication_at_a_time.lock().await;
            registry.check_published_name(&name)?;
            if registry.is_published(&model) {
                let message = format!("`{model}` is a published name; name the model itself.");
                return Err(ApiError::invalid("model", message));
            }
            // The name under which the model is loaded, which differs from a reference.
            let target = registry.target_name(&model).await?;
            let before = registry.lock().published.get(&name).cloned();
            let next = next(before, name, target.clone(), share)?;
            let _hold = registry.hold(&next.name, &target).await?;
            registry.serve_target(&target).await?;
            registry.check_reloadable(&target).await?;
            registry.keep_checkpoint(&target).await?;
            registry.put(next).await
        });
        task.await.map_err(ApiError::internal)?
    }

    /// Ends the share of a candidate; without one, has the name stand for the model that served it
    /// before.
    ///
    /// # Errors
    /// 404 if the name is not published, 409 if there was no model before, and as
    /// [`Registry::load_path`].
    pub async fn rollback(self: &Arc<Self>, name: &str) -> Result<Published, ApiError> {
        let (registry, name) = (self.clone(), name.to_owned());
        let task = tokio::spawn(async move {
            let _turn = registry.one_publication_at_a_time.lock().await;
            let before = registry.lock().published.get(&name).cloned();
            let mut published = before.ok_or_else(|| not_published(&name))?;
            if published.candidate.take().is_none() {
                let Some(previous) = published.previous.take() else {
                    return Err(conflict(format!("No other model has served `{name}` before.")));
                };
                let _hold = registry.hold(&name, &previous).await?;
                registry.serve_target(&previous).await?;
                published.previous = Some(std::mem::replace(&mut published.model, previous));
                return registry.put(published).await;
            }
            registry.put(published).await
        });
        task.await.map_err(ApiError::internal)?
    }

    /// Removes a published name. Its models stay loaded.
    ///
    /// # Errors
    /// 404 if the name is not published.
    pub async fn unpublish(self: &Arc<Self>, name: &str) -> Result<(), ApiError> {
        let (registry, name) = (self.clone(), name.to_owned());
        // Runs in its own task, as in `publish`.
        let task = tokio::spawn(async move {
            let _turn = registry.one_publication_at_a_time.lock().await;
            let (store, removed) = (registry.store().clone(), name.clone());
            match blocking(move || store.remove_published(&removed).map_err(store_error)).await? {
                true => drop(registry.lock().published.remove(&name)),
                false => return Err(not_published(&name)),
            }
            Ok(())
        });
        task.await.map_err(ApiError::internal)?
    }

    /// Checks that no published name stands for a model or adapter.
    ///
    /// # Errors
    /// 409.
    pub fn check_unpublished(&self, model: &str) -> Result<(), ApiError> {
        self.lock().check_unpublished(model)
    }

    /// Waits for a publication in progress. No other begins until the guard is dropped.
    pub async fn pause_publications(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.one_publication_at_a_time.lock().await
    }

    /// Checks that no published name needs a model or adapter, which is about to be deleted: neither
    /// now nor for a rollback, neither itself nor as the base of an adapter.
    ///
    /// # Errors
    /// 409, or errors of the database.
    pub fn check_deletable(&self, model: &str) -> Result<(), ApiError> {
        self.lock().check_unpublished(model)?;
        let adapters = self.store().adapters().map_err(store_error)?;
        let based = |target: &str| {
            adapters.iter().any(|adapter| adapter.name == target && adapter.base_model == model)
        };
        let uses = |published: &Published| {
            published.needed().any(|target| target == model || based(target))
        };
        match self.published().into_iter().find(uses) {
            None => Ok(()),
            Some(Published { name, .. }) => Err(conflict(format!(
                "The published name `{name}` needs `{model}`, at least for a rollback: publish \
                 another model under that name, or remove the name, first."
            ))),
        }
    }

    async fn put(&self, mut published: Published) -> Result<Published, ApiError> {
        published.changed_at = seconds_since_1970() as i64;
        let (store, row) = (self.store().clone(), published.clone());
        blocking(move || store.put_published(&row).map_err(store_error)).await?;
        self.lock().published.insert(published.name.clone(), published.clone());
        let Published { name, model, .. } = &published;
        tracing::info!(name, model, "published");
        Ok(published)
    }

    fn check_published_name(&self, name: &str) -> Result<(), ApiError> {
        let stored = self.store().model(name).map_err(store_error)?.is_some()
            || self.store().adapter(name).map_err(store_error)?.is_some();
        let taken = |what: &str| {
            Err(conflict(format!(
                "`{name}` is the name of {what}; publish under a name of its own, which clients use."
            ))
            .with_param("name"))
        };
        let state = self.lock();
        if stored
            || state.models.contains_key(name)
            || state.adapters.contains_key(name)
            || state.loading.contains(name)
        {
            return taken("a model or adapter");
        }
        drop(state);
        match self.store().job_making(name).map_err(store_error)? {
            Some(job) => taken(&format!("the model that the job `{}` will make", job.id)),
            None => Ok(()),
        }
    }

    /// The name under which a model or adapter is loaded, or would be: its name in the store, where
    /// `reference` may be the reference with which it was pulled.
    async fn target_name(&self, reference: &str) -> Result<String, ApiError> {
        if self.lock().is_loaded(reference) {
            return Ok(reference.to_owned());
        }
        let (store, wanted) = (self.store().clone(), reference.to_owned());
        blocking(move || {
            if store.adapter(&wanted).map_err(store_error)?.is_some() {
                return Ok(wanted);
            }
            Ok(store.model(&wanted).map_err(store_error)?.map_or(wanted, |model| model.name))
        })
        .await
    }

    /// Has a model or adapter and its base stay loaded until the guard is dropped. The caller holds
    /// the turn to publish.
    async fn hold(self: &Arc<Self>, name: &str, target: &str) -> Result<Hold, ApiError> {
        let (store, wanted) = (self.store().clone(), target.to_owned());
        let stored = blocking(move || store.adapter(&wanted).map_err(store_error)).await?;
        let mut state = self.lock();
        let loaded = state.adapters.get(target).map(|adapter| adapter.base().to_owned());
        let base = loaded.or(stored.map(|adapter| adapter.base_model));
        let needs = std::iter::once(target.to_owned()).chain(base).collect();
        state.publication = Some(Publication { name: name.to_owned(), needs });
        drop(state);
        Ok(Hold(self.clone()))
    }

    /// Loads a model, or the base of an adapter, if it does not accept requests yet. `target` is the
    /// name under which it is loaded.
    async fn serve_target(self: &Arc<Self>, target: &str) -> Result<(), ApiError> {
        match self.find(target).await {
            Err(error) if error.code.as_deref() == Some("model_not_found") => {
                self.load_target(target).await?;
            }
            found => drop(found?),
        }
        self.lock().load_failures.remove(target);
        Ok(())
    }

    async fn load_target(self: &Arc<Self>, target: &str) -> Result<(), ApiError> {
        let (store, wanted) = (self.store().clone(), target.to_owned());
        let adapter = blocking(move || store.adapter(&wanted).map_err(store_error)).await?;
        match adapter {
            Some(adapter) => {
                if self.lock().models.contains_key(&adapter.base_model) {
                    let message = format!("The adapter `{target}` was unloaded; load it first.");
                    return Err(conflict(message).with_param("model"));
                }
                self.load_model(&adapter.base_model, None).await?;
                self.find(target).await.map(drop)
            }
            None => self.load_model(target, None).await.map(drop),
        }
    }

    /// Checks that a restarted server would load the same model or adapter by its name.
    async fn check_reloadable(&self, target: &str) -> Result<(), ApiError> {
        let (model, adapter) = {
            let state = self.lock();
            let adapter = state.adapters.get(target).cloned();
            let base = adapter.as_ref().map_or(target, |adapter| adapter.base());
            let model = state.models.get(base).cloned();
            let model = model.ok_or_else(|| ApiError::model_not_found(target))?;
            let listed = |name: &str| state.command_line.contains(name);
            let model = Some(model).filter(|model| !listed(&model.name));
            (model, adapter.filter(|adapter| !listed(&adapter.name)))
        };
        if let Some(adapter) = adapter {
            self.check_adapter_reloadable(&adapter).await?;
        }
        let Some(model) = model else { return Ok(()) };
        let (store, loaded) = (self.store().clone(), model.clone());
        let same = blocking(move || {
            let stored = store.model(&loaded.name).map_err(store_error)?;
            Ok(stored.is_some_and(|stored| {
                let path = store.folder().join(&stored.file);
                stored.name == loaded.name && path.canonicalize().unwrap_or(path) == loaded.path
            }))
        });
        match same.await? {
            true => Ok(()),
            false => Err(not_reloadable(&format!("model `{}`", model.name))),
        }
    }

    async fn check_adapter_reloadable(&self, adapter: &AdapterVersion) -> Result<(), ApiError> {
        let (store, name) = (self.store().clone(), adapter.name.clone());
        let stored = blocking(move || store.adapter(&name).map_err(store_error)).await?;
        let path = match &stored {
            Some(stored) if stored.is_kept_checkpoint() => return Ok(()),
            Some(stored) if stored.base_model == adapter.base() => {
                self.adapter_path(&stored.name).await.ok()
            }
            _ => None,
        };
        // The files of an upload were moved into the data folder after they were loaded.
        let same = |path| adapter.source.canonicalize().map_or(true, |source| source == path);
        match path.is_some_and(same) {
            true => Ok(()),
            false => Err(not_reloadable(&format!("adapter `{}`", adapter.name))),
        }
    }

    /// Keeps the file of a checkpoint's adapter, which its job deletes when it has newer ones.
    async fn keep_checkpoint(&self, target: &str) -> Result<(), ApiError> {
        let (store, name) = (self.store().clone(), target.to_owned());
        blocking(move || store.keep_checkpoint(&name).map_err(store_error)?.map_err(ApiError::disk))
            .await
    }
}

/// 409 for a model or adapter that the data folder does not hold under its name.
fn not_reloadable(what: &str) -> ApiError {
    conflict(format!(
        "A restarted server could not load the {what}, because the data folder has another one or \
         none of that name: load it from the data folder under its own name there, and publish that \
         name."
    ))
    .with_param("model")
}

/// A published name after `model` was published under it.
fn next(
    before: Option<Published>,
    name: String,
    model: String,
    share: Option<f64>,
) -> Result<Published, ApiError> {
    let changed_at = 0;
    match (before, share) {
        (None, None) => Ok(Published { name, model, previous: None, candidate: None, changed_at }),
        (None, Some(_)) => {
            let message = format!("`{name}` is not published, so no model has the other share.");
            Err(ApiError::invalid("share", message))
        }
        (Some(before), Some(_)) if before.model == model => {
            let message = format!(
                "`{model}` serves `{name}` already: name another model for the share, or leave out \
                 share to end the share of a candidate."
            );
            Err(ApiError::invalid("share", message))
        }
        (Some(before), None) if before.model == model => {
            // The model that serves the name already: a candidate has failed.
            Ok(Published { candidate: None, ..before })
        }
        (Some(before), Some(share)) => {
            Ok(Published { candidate: Some(Candidate { model, share }), ..before })
        }
        (Some(before), None) => {
            let previous = Some(before.model.clone());
            Ok(Published { model, previous, candidate: None, ..before })
        }
    }
}

fn not_published(name: &str) -> ApiError {
    let name: String = name.chars().take(100).collect();
    ApiError::not_found(format!("`{name}` is not published.")).with_code("name_not_published")
}

#[cfg(test)]
mod tests {
    use super::super::tests::registry;
    use super::*;

    fn published(share: Option<f64>) -> Published {
        Published {
            name: "assistant".into(),
            model: "a".into(),
            previous: Some("z".into()),
            candidate: share.map(|share| Candidate { model: "b".into(), share }),
            changed_at: 0,
        }
    }

    #[test]
    fn a_share_of_the_keys_gets_the_candidate_and_each_always_the_same() {
        let with = |share| {
            let published = published(Some(share));
            let keys: Vec<_> = (0..4_000).map(|key| format!("user-{key}")).collect();
            let chosen = |key: &String| published.chosen(Some(key)) == "b";
            keys.iter().map(chosen).collect::<Vec<_>>()
        };
        let (few, more) = (with(0.05), with(0.3));
        let count = |chosen: &[bool]| chosen.iter().filter(|chosen| **chosen).count();
        assert!((150..250).contains(&count(&few)), "{}", count(&few));
        assert!((1_080..1_320).contains(&count(&more)), "{}", count(&more));
        assert_eq!(few, with(0.05));
        // Who has the candidate keeps it when the share grows.
        assert!(few.iter().zip(&more).all(|(few, more)| !few || *more));
        assert_eq!(published(None).chosen(Some("user-1")), "a");
        let drawn = (0..1_000).filter(|_| published(Some(0.5)).chosen(None) == "b").count();
        assert!((350..650).contains(&drawn), "{drawn}");
    }

    #[test]
    fn publishing_keeps_what_was_there_before() {
        let to = |before, model: &str, share| next(before, "assistant".into(), model.into(), share);
        let first = to(None, "a", None).unwrap();
        assert_eq!((&*first.model, &first.previous), ("a", &None));
        assert_eq!(to(None, "a", Some(0.1)).unwrap_err().param.as_deref(), Some("share"));
        let shared = to(Some(first), "b", Some(0.1)).unwrap();
        assert_eq!((&*shared.model, shared.candidate.is_some()), ("a", true));
        assert_eq!(shared.serving().collect::<Vec<_>>(), ["a", "b"]);
        let whole = to(Some(shared.clone()), "b", None).unwrap();
        assert_eq!((&*whole.model, whole.previous.as_deref()), ("b", Some("a")));
        assert!(whole.candidate.is_none());
        let again = to(Some(shared.clone()), "a", Some(0.2)).unwrap_err();
        assert_eq!((again.status.as_u16(), again.param.as_deref()), (400, Some("share")));
        let kept = to(Some(shared), "a", None).unwrap();
        assert_eq!((&*kept.model, kept.previous, kept.candidate), ("a", None, None));
    }

    fn insert(registry: &Registry, published: Published) {
        registry.store().put_published(&published).unwrap();
        registry.lock().published.insert(published.name.clone(), published);
    }

    #[tokio::test]
    async fn a_name_whose_model_is_not_loaded_answers_with_the_reason() {
        let (registry, _folder) = registry();
        insert(&registry, published(Some(0.5)));
        assert_eq!(registry.main_target("assistant"), "a");
        assert_eq!(registry.main_target("b"), "b");
        // The candidate is not loaded, so the main model has its share.
        assert!((0..50).all(|_| registry.lock().target("assistant", None) == "a"));
        let error = registry.find("assistant").await.unwrap_err();
        assert_eq!(error.status, 503);
        assert!(error.message.ends_with("`a`, which is not loaded."), "{error}");
        registry.load_published().await;
        let error = registry.find("assistant").await.unwrap_err();
        assert!(error.message.contains("has no model `a`"), "{error}");
    }

    #[tokio::test]
    async fn what_a_publication_needs_is_not_unloaded() {
        let (registry, _folder) = registry();
        let hold = registry.hold("assistant", "a").await.unwrap();
        assert_eq!(registry.lock().serves("a"), Some("assistant"));
        // No model takes the name in the meantime.
        let error = registry.load_path("assistant", "none.gguf".into(), None).await.unwrap_err();
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (409, Some("name")));
        assert_eq!(registry.unload_adapter("a").unwrap_err().status, 409);
        drop(hold);
        assert_eq!(registry.unload_adapter("a").unwrap_err().status, 404);
        insert(&registry, published(None));
        assert_eq!(registry.unload_adapter("a").unwrap_err().status, 409);
        assert_eq!(registry.unload_adapter("z").unwrap_err().status, 404);
        registry.unpublish("assistant").await.unwrap();
        assert_eq!(registry.unpublish("assistant").await.unwrap_err().status, 404);
        assert!(registry.store().published().unwrap().is_empty());
    }

    #[tokio::test]
    async fn models_that_a_rollback_needs_are_not_deleted() {
        let (registry, _folder) = registry();
        let adapter = crate::gateway::store::StoredAdapter {
            name: "z".into(),
            base_model: "base".into(),
            file: "adapters/z.gguf".into(),
            format: "gguf".into(),
            sha256: String::new(),
            bytes: 1,
            scale: 1.0,
            created_at: 1,
        };
        registry.store().put_adapter(&adapter).unwrap();
        insert(&registry, published(Some(0.5)));
        for needed in ["a", "b", "z", "base"] {
            assert_eq!(registry.check_deletable(needed).unwrap_err().status, 409, "{needed}");
        }
        assert!(registry.check_deletable("other").is_ok());
    }

    #[tokio::test]
    async fn a_reference_is_published_as_the_name_of_its_model() {
        let (registry, _folder) = registry();
        let model = crate::gateway::store::StoredModel {
            name: "model".into(),
            file: "models/model.gguf".into(),
            sha256: String::new(),
            bytes: 1,
            source: "hf:org/repo/model.gguf".into(),
            created_at: 1,
        };
        registry.store().put_model(&model).unwrap();
        assert_eq!(registry.target_name("hf:org/repo/model.gguf").await.unwrap(), "model");
        assert_eq!(registry.target_name("model").await.unwrap(), "model");
        assert_eq!(registry.target_name("unknown").await.unwrap(), "unknown");
        assert_eq!(registry.check_published_name("model").unwrap_err().status, 409);
        assert!(registry.check_published_name("assistant").is_ok());
    }
}
