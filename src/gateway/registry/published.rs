//! Published names: a name that clients use, and the model or adapter that serves it, which the
//! operator exchanges without a failed request. The database holds them, so a restart serves the
//! same.

use super::load::store_error;
use super::{Registry, State, blocking, check_name, conflict, seconds_since_1970};
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

impl State {
    /// The model or adapter that a name stands for: itself, unless it is published.
    pub(super) fn target(&self, name: &str, key: Option<&str>) -> String {
        self.published.get(name).map_or(name, |published| published.chosen(key)).to_owned()
    }

    /// The published name that a model serves, itself or as the base of an adapter.
    pub(super) fn serves(&self, model: &str) -> Option<&str> {
        let base = |target: &str| {
            self.adapters.get(target).map_or(target.to_owned(), |adapter| adapter.base().to_owned())
        };
        let uses = |published: &&Published| {
            published.serving().any(|target| target == model || base(target) == model)
        };
        self.published.values().find(uses).map(|published| &*published.name)
    }
}

impl Registry {
    /// All published names.
    pub fn published(&self) -> Vec<Published> {
        self.lock().published.values().cloned().collect()
    }

    /// Loads the models of all published names that are not loaded. One that cannot be loaded is
    /// logged, and its name answers with the reason.
    pub async fn load_published(self: &Arc<Self>) {
        for published in self.published() {
            for model in published.serving() {
                if let Err(error) = self.serve_target(model).await {
                    let (name, why) = (&published.name, &error.message);
                    tracing::error!(name, model, "a published model cannot be loaded: {why}");
                }
            }
        }
    }

    /// Has `name` stand for `model`, which is loaded first. With `share`, only this share of the
    /// requests goes to it. The model that served the name before is kept for
    /// [`Registry::rollback`].
    ///
    /// # Errors
    /// 404 for an unknown model, 409 if `name` is that of a model or adapter, 400 for a share of a
    /// name that was never published, and as [`Registry::load_path`].
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
            if registry.lock().published.contains_key(&model) {
                let message = format!("`{model}` is a published name; name the model itself.");
                return Err(ApiError::invalid("model", message));
            }
            let before = registry.lock().published.get(&name).cloned();
            let next = next(before, name, model.clone(), share)?;
            registry.serve_target(&model).await?;
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
                registry.serve_target(&previous).await?;
                published.previous = Some(std::mem::replace(&mut published.model, previous));
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
        let _turn = self.one_publication_at_a_time.lock().await;
        let (store, removed) = (self.store().clone(), name.to_owned());
        match blocking(move || store.remove_published(&removed).map_err(store_error)).await? {
            true => drop(self.lock().published.remove(name)),
            false => return Err(not_published(name)),
        }
        Ok(())
    }

    /// Checks that no published name stands for a model or adapter, which is about to be removed.
    ///
    /// # Errors
    /// 409.
    pub fn check_unpublished(&self, model: &str) -> Result<(), ApiError> {
        match self.lock().serves(model) {
            None => Ok(()),
            Some(published) => Err(conflict(format!(
                "`{model}` serves the published name `{published}`: publish another model under that \
                 name first."
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
        let state = self.lock();
        let loaded = state.models.contains_key(name)
            || state.adapters.contains_key(name)
            || state.loading.contains(name);
        match stored || loaded {
            false => Ok(()),
            true => Err(conflict(format!(
                "`{name}` is the name of a model or adapter; publish under a name of its own, which \
                 clients use."
            ))
            .with_param("name")),
        }
    }

    /// Loads a model, or the base of an adapter, if it does not accept requests yet.
    async fn serve_target(self: &Arc<Self>, model: &str) -> Result<(), ApiError> {
        match self.find(model).await {
            Err(error) if error.code.as_deref() == Some("model_not_found") => {}
            found => return found.map(drop),
        }
        let (store, wanted) = (self.store().clone(), model.to_owned());
        let adapter = blocking(move || store.adapter(&wanted).map_err(store_error)).await?;
        match adapter {
            Some(adapter) => {
                if self.lock().models.contains_key(&adapter.base_model) {
                    let message = format!("The adapter `{model}` was unloaded; load it first.");
                    return Err(conflict(message).with_param("model"));
                }
                self.load_model(&adapter.base_model, None).await?;
                self.find(model).await.map(drop)
            }
            None => self.load_model(model, None).await.map(drop),
        }
    }
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
        (Some(before), _) if before.model == model => {
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
        let kept = to(Some(shared), "a", None).unwrap();
        assert_eq!((&*kept.model, kept.previous, kept.candidate), ("a", None, None));
    }
}
