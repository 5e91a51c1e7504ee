//! Publishes the artifacts of a job, so that requests can name them.

use super::admit::new_id;
use super::{Jobs, now};
use crate::gateway::error::ApiError;
use crate::gateway::registry::AdapterSpec;
use crate::gateway::store::{
    Finished, Products, StoredAdapter, StoredArtifact, StoredFile, StoredJob, StoredModel,
};
use crate::job::{Artifact, ArtifactKind, JobEvent, JobOrder, Level, Outcome};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

impl Jobs {
    /// Reads the outcome, loads the resulting model or adapter, and lists it in the store. If it is
    /// repeated after a crash, the result is the same.
    pub(super) async fn publish(self: &Arc<Self>, job: &StoredJob) {
        let id = job.id.as_str();
        let folder = self.folder(id);
        let (order, outcome) = match (folder.order(), folder.outcome()) {
            (Ok(order), Ok(Some(outcome))) => (order, outcome),
            (Err(error), _) | (_, Err(error)) => {
                return self.fail(id, "io_error", &format!("its folder cannot be read: {error}"));
            }
            (_, Ok(None)) => return self.fail(id, "io_error", "its outcome is missing"),
        };
        let (trained_tokens, made) = match outcome {
            Outcome::Succeeded { trained_tokens, artifacts } => (trained_tokens, artifacts),
            Outcome::Failed { failure, artifacts } => {
                let artifacts: Vec<_> = artifacts.iter().map(stored).collect();
                if let Err(error) = self.store().put_artifacts(id, &artifacts) {
                    tracing::error!(job = id, "its artifacts cannot be listed: {error}");
                }
                return self.failed(id, &failure);
            }
        };
        // Checked before the adapter is loaded, which would replace a loaded adapter of that name.
        let taken = job.makes_model()
            && (self.registry.resolve(order.name()).is_ok()
                || self.store().name_is_taken(order.name(), id).unwrap_or_else(|error| {
                    tracing::error!(job = id, "its name cannot be checked: {error}");
                    false
                }));
        if taken {
            return self.name_taken(id, order.name(), &made);
        }
        let adapter = made.iter().find(|artifact| artifact.kind == ArtifactKind::Adapter);
        let mut live = None;
        if let Some(adapter) = adapter {
            let spec = AdapterSpec {
                name: order.name().to_owned(),
                base: order.base_model().map(str::to_owned),
                path: folder.path().join(&adapter.file),
                scale: 1.0,
                check: true,
            };
            match self.registry.load_adapter(spec).await {
                Ok(version) => live = Some(version),
                // The base model may have been unloaded; the adapter is loaded when it is
                // requested.
                Err(error) if error.status != http::StatusCode::UNPROCESSABLE_ENTITY => {
                    tracing::warn!(job = id, "the adapter is not loaded now: {error}");
                }
                Err(error) => return self.fail(id, "invalid_adapter", &error.message),
            }
        }
        let products = match self.products(job, &order, trained_tokens, &made) {
            Ok(products) => products,
            Err(error) => return self.fail(id, "io_error", &error.to_string()),
        };
        // Logged before the status changes, because clients that follow the events stop at the
        // final status.
        self.say(id, Level::Info, &created(&order));
        match self.store().finish_job(id, &products, now()) {
            Ok(Finished::Done) => {}
            Ok(Finished::NameTaken) => {
                if live.is_some() {
                    let _ = self.registry.unload_adapter(order.name());
                }
                return self.name_taken(id, order.name(), &made);
            }
            Ok(Finished::OtherStatus) => {
                // The job was cancelled at the last moment: nothing is published.
                if live.is_some() {
                    let _ = self.registry.unload_adapter(order.name());
                }
                return self.cancelled(id);
            }
            Err(error) => return tracing::error!(job = id, "its end cannot be written: {error}"),
        }
        self.say(id, Level::Info, "The job has successfully completed.");
        self.tidy(id);
    }

    /// Fails a job whose name belongs to another model by now. Its files stay.
    fn name_taken(&self, id: &str, name: &str, made: &[Artifact]) {
        let artifacts: Vec<_> = made.iter().map(stored).collect();
        if let Err(error) = self.store().put_artifacts(id, &artifacts) {
            tracing::error!(job = id, "its artifacts cannot be listed: {error}");
        }
        let message = format!(
            "`{name}` became the name of another model while the job ran: create the job again with \
             another name. What the job made is among its artifacts."
        );
        self.fail(id, "name_taken", &message);
    }

    fn products(
        &self,
        job: &StoredJob,
        order: &JobOrder,
        trained_tokens: u64,
        made: &[Artifact],
    ) -> std::io::Result<Products> {
        let inside = Path::new("jobs").join(&job.id);
        let find = |kind| made.iter().find(|artifact| artifact.kind == kind);
        let mut results = Vec::new();
        if let Some(found) = find(ArtifactKind::Results) {
            let id = self.result_file(&job.id);
            let from = self.store().folder().join(&inside).join(&found.file);
            std::fs::copy(from, self.store().files_folder().join(&id))?;
            results.push(StoredFile {
                id,
                name: "step_metrics.csv".into(),
                purpose: "fine-tune-results".into(),
                bytes: found.bytes,
                sha256: found.sha256.clone(),
                owner: job.owner.clone(),
                created_at: now(),
            });
        }
        let (adapter, model) = rows(order, made);
        let artifacts = made.iter().map(stored).collect();
        Ok(Products { trained_tokens, artifacts, results, adapter, model })
    }

    /// The id of the file with a job's losses.
    pub fn result_file(&self, id: &str) -> String {
        format!("file-{}", id.trim_start_matches("ftjob-"))
    }

    /// Unloads a job's model or adapter and removes it from the store. `false` if it does not
    /// exist. Running requests finish first, within the grace time.
    ///
    /// # Errors
    /// 409 while the model is being loaded, or errors of the database.
    pub async fn forget(&self, job: &StoredJob, name: &str) -> Result<bool, ApiError> {
        let made = self.store().model(name).map_err(ApiError::internal)?;
        // The name of a job that failed may be that of another model.
        let source = format!("job:{}", job.id);
        let made = made.is_some_and(|model| model.name == name && model.source == source);
        if made {
            match self.registry.unload_model(name).await {
                Err(error) if error.status != http::StatusCode::NOT_FOUND => return Err(error),
                _ => {}
            }
            self.store().remove_model(name).map_err(ApiError::internal)?;
        }
        Ok(self.forget_adapter(name)? || made)
    }

    fn forget_adapter(&self, name: &str) -> Result<bool, ApiError> {
        let stored = self.store().forget_adapter(name).map_err(ApiError::internal)?;
        // It may not be loaded.
        Ok(self.registry.unload_adapter(name).is_ok() || stored)
    }

    /// Unloads the adapters of a job's checkpoints and removes them from the store, but for those
    /// that published names need. Returns the names of these.
    ///
    /// # Errors
    /// Errors of the database, or of reading the job's events.
    pub fn forget_checkpoints(&self, job: &StoredJob) -> Result<BTreeSet<String>, ApiError> {
        let mut kept = BTreeSet::new();
        for entry in self.events(&job.id)? {
            let JobEvent::Checkpoint { step } = entry.event else { continue };
            let name = checkpoint_name(&job.name, step);
            match self.registry.check_deletable(&name) {
                Ok(()) => drop(self.forget_adapter(&name)?),
                Err(error) if error.status == http::StatusCode::CONFLICT => {
                    kept.insert(name);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(kept)
    }

    /// Lists the adapters of the job's current checkpoints as `NAME:ckpt-step-N`, and removes those
    /// of deleted checkpoints, unless published names need them.
    pub(super) fn list_checkpoints(&self, id: &str) {
        let folder = self.folder(id);
        let (Ok(order), Ok(entries)) = (folder.order(), self.events(id)) else { return };
        let base = order.base_model().unwrap_or_default();
        let steps = entries.iter().filter_map(|entry| match entry.event {
            JobEvent::Checkpoint { step } => Some(step),
            _ => None,
        });
        for step in steps {
            let name = checkpoint_name(order.name(), step);
            let file = folder.checkpoint_adapter(step);
            let listed = self.store().adapter(&name);
            let kept = matches!(&listed, Ok(Some(adapter)) if adapter.is_kept_checkpoint());
            let done = match std::fs::metadata(&file) {
                // It was published, and is listed with the file that was kept.
                Ok(_) if kept => Ok(()),
                Ok(found) => self.store().put_adapter(&StoredAdapter {
                    name,
                    base_model: base.to_owned(),
                    file: file.strip_prefix(self.store().folder()).unwrap_or(&file).to_owned(),
                    format: "gguf".into(),
                    sha256: String::new(),
                    bytes: found.len(),
                    scale: 1.0,
                    created_at: now(),
                }),
                Err(_) if self.registry.check_deletable(&name).is_err() => {
                    tracing::info!(job = id, adapter = name, "a published checkpoint is kept");
                    Ok(())
                }
                Err(_) => {
                    // Running requests keep the adapter.
                    let _ = self.registry.unload_adapter(&name);
                    self.store().forget_adapter(&name).map(drop)
                }
            };
            if let Err(error) = done {
                tracing::error!(job = id, "a checkpoint cannot be listed: {error}");
            }
        }
    }
}

/// What is said at the end of a job that succeeded.
fn created(order: &JobOrder) -> String {
    match order {
        // In the words of OpenAI.
        JobOrder::Train(order) => format!("New fine-tuned model created: {}", order.name),
        JobOrder::Quantize(order) => format!("New model created: {}", order.name),
        JobOrder::Evaluate(_) => "The report is written.".to_owned(),
    }
}

/// An artifact as a row of the store.
fn stored(artifact: &Artifact) -> StoredArtifact {
    StoredArtifact {
        id: new_id("artifact-"),
        kind: artifact.kind.name().to_owned(),
        file: artifact.file.clone(),
        bytes: artifact.bytes,
        sha256: artifact.sha256.clone(),
    }
}

/// The adapter and the model among the artifacts, as rows of the store.
pub fn rows(order: &JobOrder, made: &[Artifact]) -> (Option<StoredAdapter>, Option<StoredModel>) {
    let inside = Path::new("jobs").join(order.id());
    let find = |kind| made.iter().find(|artifact| artifact.kind == kind);
    let adapter = find(ArtifactKind::Adapter).map(|found| StoredAdapter {
        name: order.name().to_owned(),
        base_model: order.base_model().unwrap_or_default().to_owned(),
        file: inside.join(&found.file),
        format: "gguf".into(),
        sha256: found.sha256.clone(),
        bytes: found.bytes,
        scale: 1.0,
        created_at: now(),
    });
    let model = find(ArtifactKind::Model).map(|found| StoredModel {
        name: order.name().to_owned(),
        file: inside.join(&found.file),
        sha256: found.sha256.clone(),
        bytes: found.bytes,
        source: format!("job:{}", order.id()),
        created_at: now(),
    });
    (adapter, model)
}

/// The name under which requests use the adapter of a checkpoint.
pub fn checkpoint_name(name: &str, step: u64) -> String {
    format!("{name}:ckpt-step-{step}")
}
