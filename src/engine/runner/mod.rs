//! What runs a batch through a model.
//!
//! A runner knows nothing of requests: it is given rows of sequence slots, computes them, and
//! hands out logits for the rows that want them.

pub mod llama_cpp;
pub mod mock;
pub mod native;

use crate::ipc::{AdapterId, LoadSpec, ModelInfo, RunnerKind, Token};
use crate::tokenizer::Tokenizer;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Tokens per page of the cache.
pub const PAGE_TOKENS: usize = 32;

/// Rows of [`Wants::AllLogits`] in one step, at most: each is a whole row of the vocabulary.
pub const MAX_PROMPT_LOGITS: usize = 64;

/// A sequence in the runner's cache; at most `ModelInfo::max_sequences` run, more may be resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqSlot(pub u32);

/// Why a step or a load could not be done.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RunnerError(pub String);

/// Rows of one step. Sequences stand one after another; a sequence's rows are consecutive in
/// position.
#[derive(Debug, Default)]
pub struct Batch {
    /// (rows) token ids.
    pub tokens: Vec<Token>,
    pub sequences: Vec<BatchSequence>,
    /// That of all sequences, for a runner that does not mix adapters.
    pub adapter: Option<AdapterId>,
}

/// One sequence's share of a batch.
#[derive(Debug)]
pub struct BatchSequence {
    pub slot: SeqSlot,
    /// Its rows, as a range of `Batch::tokens`.
    pub rows: Range<usize>,
    /// Position of the first row: tokens of this slot that are computed already.
    pub position: usize,
    pub wants: Wants,
    /// Page table, for a runner with real pages; covers position + rows.
    pub pages: Vec<u32>,
    /// Base model when `None`. Sequences with the same one stand together.
    pub adapter: Option<AdapterId>,
}

/// Which of a sequence's rows are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    Nothing,
    /// Logits after the last row.
    LastLogits,
    /// Logits after every row (echoed prompts with logprobs, drafts).
    AllLogits,
}

impl Batch {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.sequences.clear();
        self.adapter = None;
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }
}

/// Reads adapter files beside the step loop.
pub trait AdapterLoader: Send {
    fn prepare(&self, path: &Path, scale: f32) -> Result<AdapterHandle, RunnerError>;
}

/// An adapter whose file has been read, off the step loop.
pub enum AdapterHandle {
    Native(native::Adapter),
    LlamaCpp(llama_cpp::Adapter),
    Mock,
}

/// How a step ended that could be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ran {
    Complete,
    /// The cache holds what it held before the step.
    Interrupted,
}

/// Runs batches: our own kernels, llama.cpp, and a mock that tests the rest.
pub trait ModelRunner {
    fn info(&self) -> &ModelInfo;
    fn tokenizer(&self) -> Arc<dyn Tokenizer>;
    fn adapter_loader(&self) -> Box<dyn AdapterLoader>;
    /// Sequence slots, running and resident together.
    fn slots(&self) -> u32;
    /// Pages live under slots, not under page ids (see `engine/kv`).
    fn slots_hold_pages(&self) -> bool;
    /// Computes all rows, unless `interrupt`, which is asked a few dozen times in between, answers
    /// true. On an error the cache holds what it held before.
    fn run(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError>;
    /// [`run`](Self::run) to the end.
    fn step(&mut self, batch: &Batch) -> Result<(), RunnerError> {
        self.run(batch, &mut || false).map(drop)
    }
    /// (vocabulary) logits after a row of the last batch that wanted them; the caller may write
    /// into them.
    fn logits(&mut self, row: usize) -> Result<&mut [f32], RunnerError>;
    /// The first `tokens` tokens of `from` become those of `to`, which is empty.
    fn fork(&mut self, from: SeqSlot, to: SeqSlot, tokens: usize);
    /// Forgets all but the first `tokens` tokens.
    fn truncate(&mut self, slot: SeqSlot, tokens: usize);
    fn release(&mut self, slot: SeqSlot);
    /// One page's contents become another's; only for a runner whose slots hold no pages.
    fn copy_page(&mut self, _from: u32, _to: u32) {}
    fn install_adapter(&mut self, adapter: AdapterId, handle: AdapterHandle);
    fn remove_adapter(&mut self, adapter: AdapterId);
    /// Loads a model that drafts for this one, on the same threads.
    ///
    /// # Errors
    /// With the reason: of the file, or that drafts cannot be checked here.
    fn load_draft(&self, _spec: &LoadSpec) -> Result<Box<dyn ModelRunner>, RunnerError> {
        Err(RunnerError("only the native runner can check what a draft model drafts".into()))
    }
    /// Whether [`pool`](Self::pool) may be given an input part by part. False for models whose tokens
    /// attend to later ones, or that pool over all rows.
    fn pools_in_chunks(&self) -> bool {
        true
    }
    /// Computes the rows `rows` of an input that is to be embedded or scored. Inputs are computed one
    /// after the other, the rows of each in order, whatever steps run in between. With its last row
    /// it answers the pooled row (width), from behind the output norm: of a causal model the last
    /// token's.
    fn pool(
        &mut self,
        input: &[Token],
        rows: Range<usize>,
        adapter: Option<AdapterId>,
    ) -> Result<Option<Vec<f32>>, RunnerError>;
    /// [`pool`](Self::pool) of a whole input at once.
    fn pooled(
        &mut self,
        input: &[Token],
        adapter: Option<AdapterId>,
    ) -> Result<Vec<f32>, RunnerError> {
        let row = self.pool(input, 0..input.len(), adapter)?;
        row.ok_or_else(|| RunnerError("a whole input has no pooled row".into()))
    }
}

/// Loads the draft model for a loaded one, where there is to be one.
///
/// # Errors
/// If it cannot be loaded, or does not have the same tokens.
pub fn load_draft(
    target: &dyn ModelRunner,
    spec: &LoadSpec,
) -> Result<Option<Box<dyn ModelRunner>>, RunnerError> {
    let Some(path) = &spec.draft else { return Ok(None) };
    let refuse = |why: String| {
        RunnerError(format!(
            "the draft model cannot be used: {why}. Take another --draft-model, or leave it out"
        ))
    };
    let spec = LoadSpec { model: path.clone(), draft: None, ..spec.clone() };
    let draft = target.load_draft(&spec).map_err(|error| refuse(error.0))?;
    match target.tokenizer().vocab().difference(draft.tokenizer().vocab()) {
        Some(difference) => Err(refuse(format!(
            "its vocabulary is not the model's, {difference}; a smaller model of the same family \
             has the same"
        ))),
        None => {
            let info = draft.info();
            tracing::info!(
                "{} drafts, {:.1} ms a token",
                info.description,
                info.step_seconds * 1e3
            );
            Ok(Some(draft))
        }
    }
}

/// Loads the model and decodes one token, so that whatever breaks does so before anyone waits.
pub fn load(spec: &LoadSpec) -> Result<Box<dyn ModelRunner>, RunnerError> {
    match spec.runner {
        RunnerKind::Native => match native::Native::load(spec) {
            Ok(runner) => Ok(Box::new(runner)),
            Err(reason) => {
                tracing::info!("llama.cpp runs this model: {reason}");
                Ok(Box::new(llama_cpp::LlamaCpp::load(spec)?))
            }
        },
        RunnerKind::LlamaCpp => Ok(Box::new(llama_cpp::LlamaCpp::load(spec)?)),
        RunnerKind::Mock => Ok(Box::new(mock::Mock::load(spec))),
    }
}
