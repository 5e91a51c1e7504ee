//! Model runners: they compute a batch of rows with a model.
//!
//! A runner has no notion of requests: it gets rows of sequence slots, computes them, and returns
//! logits for the rows that want them.

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

/// Most rows of [`Wants::AllLogits`] in one step: each row holds one logit per vocabulary token.
pub const MAX_PROMPT_LOGITS: usize = 64;

/// A sequence in the runner's cache. At most `ModelInfo::max_sequences` run; more may be resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqSlot(pub u32);

/// The reason why a step or a load failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct RunnerError(pub String);

/// The rows of one step. The sequences follow one another; the rows of a sequence have consecutive
/// positions.
#[derive(Debug, Default)]
pub struct Batch {
    /// (rows) token ids.
    pub tokens: Vec<Token>,
    pub sequences: Vec<BatchSequence>,
    /// The adapter of all sequences, for a runner that does not mix adapters.
    pub adapter: Option<AdapterId>,
}

/// The rows of one sequence in a batch.
#[derive(Debug)]
pub struct BatchSequence {
    pub slot: SeqSlot,
    /// The sequence's rows, as a range of `Batch::tokens`.
    pub rows: Range<usize>,
    /// Position of the first row: the number of tokens of this slot that are already computed.
    pub position: usize,
    pub wants: Wants,
    /// Page table, for a runner with real pages; covers position + rows.
    pub pages: Vec<u32>,
    /// `None` for the base model. Sequences with the same adapter are adjacent.
    pub adapter: Option<AdapterId>,
}

/// The rows of a sequence whose logits are needed.
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

/// Reads adapter files on a thread beside the step loop.
pub trait AdapterLoader: Send {
    fn prepare(&self, path: &Path, scale: f32) -> Result<AdapterHandle, RunnerError>;
}

/// An adapter whose file has been read outside the step loop.
pub enum AdapterHandle {
    Native(native::Adapter),
    LlamaCpp(llama_cpp::Adapter),
    Mock,
}

/// The result of an interruptible step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ran {
    Complete,
    /// The step was abandoned; the cache is unchanged.
    Interrupted,
}

/// Runs batches. Implementations: our own kernels, llama.cpp, and a mock for tests.
pub trait ModelRunner {
    fn info(&self) -> &ModelInfo;
    fn tokenizer(&self) -> Arc<dyn Tokenizer>;
    fn adapter_loader(&self) -> Box<dyn AdapterLoader>;
    /// Number of sequence slots, running and resident together.
    fn slots(&self) -> u32;
    /// Whether page contents are stored in slots instead of under page ids (see `engine/kv`).
    fn slots_hold_pages(&self) -> bool;
    /// Computes all rows. `interrupt` is called a few dozen times during the step; if it returns
    /// true, the step is abandoned. On an error the cache is unchanged.
    fn run(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError>;
    /// Runs a batch without interruption (see [`run`](Self::run)).
    fn step(&mut self, batch: &Batch) -> Result<(), RunnerError> {
        self.run(batch, &mut || false).map(drop)
    }
    /// (vocabulary) logits after a row of the last batch that wanted them. The caller may modify
    /// them.
    fn logits(&mut self, row: usize) -> Result<&mut [f32], RunnerError>;
    /// Copies the first `tokens` tokens of `from` to `to`, which is empty.
    fn fork(&mut self, from: SeqSlot, to: SeqSlot, tokens: usize);
    /// Discards all but the first `tokens` tokens of a slot.
    fn truncate(&mut self, slot: SeqSlot, tokens: usize);
    fn release(&mut self, slot: SeqSlot);
    /// Copies the contents of one page to another; only for a runner whose slots hold no pages.
    fn copy_page(&mut self, _from: u32, _to: u32) {}
    fn install_adapter(&mut self, adapter: AdapterId, handle: AdapterHandle);
    fn remove_adapter(&mut self, adapter: AdapterId);
    /// Loads a draft model for this model, on the same threads.
    ///
    /// # Errors
    /// If the file cannot be loaded, or if this runner cannot verify drafts.
    fn load_draft(&self, _spec: &LoadSpec) -> Result<Box<dyn ModelRunner>, RunnerError> {
        Err(RunnerError("only the native runner can check what a draft model drafts".into()))
    }
    /// Whether [`pool`](Self::pool) accepts an input in chunks. False for models whose tokens
    /// attend to later tokens, or that pool over all rows.
    fn pools_in_chunks(&self) -> bool {
        true
    }
    /// Computes the rows `rows` of an input that is to be embedded or scored. Inputs are computed
    /// one after another, the rows of each in order; other steps may run in between. With the last
    /// row it returns the pooled row, shape (width), after the output norm. For a causal model this
    /// is the last token's row.
    fn pool(
        &mut self,
        input: &[Token],
        rows: Range<usize>,
        adapter: Option<AdapterId>,
    ) -> Result<Option<Vec<f32>>, RunnerError>;
    /// Pools a whole input at once (see [`pool`](Self::pool)).
    fn pooled(
        &mut self,
        input: &[Token],
        adapter: Option<AdapterId>,
    ) -> Result<Vec<f32>, RunnerError> {
        let row = self.pool(input, 0..input.len(), adapter)?;
        row.ok_or_else(|| RunnerError("a whole input has no pooled row".into()))
    }
}

/// Loads the draft model for a loaded target model, if the specification names one.
///
/// # Errors
/// If the draft model cannot be loaded, or if its vocabulary differs.
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

/// Loads the model and decodes one token, so that failures appear before any request waits.
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
