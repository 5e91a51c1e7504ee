//! A loaded model.

use super::ModelStatus;
use crate::gateway::header::ModelHeader;
use crate::gateway::memory::MemoryPlan;
use crate::gateway::supervisor::{Engine, EngineState};
use crate::gguf::ModelFacts;
use crate::ipc::EngineError;
use crate::template::{ChatTemplate, ControlTokens, TemplateError};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

/// A model that requests may name.
pub struct Model {
    pub name: String,
    pub engine: Arc<Engine>,
    pub facts: Arc<ModelFacts>,
    /// The file's own template, compiled, or ChatML if the file has none. If the template does not
    /// compile, chat requests get a 400; text completions still work.
    pub chat: Result<ChatTemplate, TemplateError>,
    /// Control tokens of the vocabulary, which is the same in every engine of the model.
    control_tokens: OnceLock<ControlTokens>,
    pub plan: MemoryPlan,
    /// Load time in seconds since 1970.
    pub created: u64,
    pub(super) path: PathBuf,
    /// Whether this is the mock runner's model without a file.
    pub(super) fileless: bool,
    /// Number of the last use, from a counter of the registry.
    last_used: AtomicU64,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Model {
    pub(super) fn new(
        name: String,
        header: ModelHeader,
        plan: MemoryPlan,
        engine: Arc<Engine>,
        created: u64,
    ) -> Self {
        Self {
            name,
            engine,
            chat: ChatTemplate::of(&header.facts.tokenizer),
            control_tokens: OnceLock::new(),
            facts: Arc::new(header.facts),
            path: plan.spec.model.clone(),
            plan,
            created,
            fileless: header.fileless,
            last_used: AtomicU64::new(0),
        }
    }

    /// Texts of the vocabulary's control tokens.
    ///
    /// # Errors
    /// If no engine has loaded the model yet.
    pub fn control_tokens(&self) -> Result<&ControlTokens, EngineError> {
        if let Some(known) = self.control_tokens.get() {
            return Ok(known);
        }
        let info = self.engine.info()?;
        let texts = info.special_tokens.iter().map(|(text, _)| text.as_str());
        Ok(self.control_tokens.get_or_init(|| ControlTokens::new(texts)))
    }

    pub(super) fn touch(&self, now: u64) {
        self.last_used.store(now, Ordering::Relaxed);
    }

    pub(super) fn last_used(&self) -> u64 {
        self.last_used.load(Ordering::Relaxed)
    }

    /// Whether no request holds the model. `holders` is the number of other references to it.
    pub(super) fn idle(self: &Arc<Self>, holders: usize) -> bool {
        let progress = self.engine.progress();
        Arc::strong_count(self) <= holders && progress.running + progress.waiting == 0
    }

    /// Stops the engine and waits until its process has ended, so that its memory is free.
    pub(super) async fn stop(&self) {
        let pid = self.engine.pid();
        // A failed engine has no supervisor left to report that it stopped.
        if !matches!(self.engine.state(), EngineState::Failed { .. }) {
            self.engine.stop().await;
        }
        let Some(pid) = pid else { return };
        for _ in 0..100 {
            if !Path::new(&format!("/proc/{pid}/statm")).exists() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    pub(super) fn status(&self, leaving: bool, adapters: Vec<String>) -> ModelStatus {
        let progress = self.engine.progress();
        let (state, reason) = match self.engine.state() {
            _ if leaving => ("unloading", None),
            EngineState::Ready(_) => ("ready", None),
            EngineState::Loading => ("loading", None),
            EngineState::Restarting { reason } => ("restarting", Some(reason)),
            EngineState::Failed { reason } => ("failed", Some(reason)),
            EngineState::Stopped => ("unloading", None),
        };
        ModelStatus {
            name: self.name.clone(),
            state,
            reason,
            architecture: self.facts.architecture.clone(),
            quantization: self.facts.quantization.clone(),
            parameters: self.facts.parameters,
            running: progress.running,
            waiting: progress.waiting,
            restarts: self.engine.restarts(),
            adapters,
            memory_total: self.plan.total(),
            memory: self.plan.clone(),
        }
    }
}
