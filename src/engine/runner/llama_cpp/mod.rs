//! The llama.cpp runner: any GGUF that llama.cpp can load.
//!
//! Built on `llama-cpp-sys-2` directly, because `llama-cpp-2` offers no adapters at run time (its
//! adapter type leaks), no bounded sequence ids (its batch does not check them) and no logits
//! without a copy (its logits accessor panics).
//!
//! A slot is a llama.cpp sequence id, of which there are 256. Cache layout: by default one unified
//! buffer, in which a shared prefix costs only metadata and rows of all kinds share one graph.
//! Alternatively one buffer per slot (streams): decoding rows never scan other slots' cells, but a
//! shared prefix is copied, and every slot takes the memory of a whole context.

#![allow(unsafe_code)]

mod adapter;
mod context;
mod model;
#[cfg(test)]
mod watch;

pub use adapter::Adapter;
#[cfg(test)]
pub use watch::Watched;

use super::{
    AdapterHandle, AdapterLoader, Batch, ModelRunner, PAGE_TOKENS, Ran, RunnerError, SeqSlot,
};
use crate::ipc::{AdapterId, KvLayout, LoadSpec, MAX_POOLED_TOKENS, ModelInfo, Token};
use crate::llama_log;
use crate::tokenizer::Tokenizer;
use adapter::Loader;
use context::{Context, ContextKind};
use model::Model;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// llama.cpp's own limit (LLAMA_MAX_SEQ).
const MAX_SEQUENCE_IDS: u32 = 256;

pub struct LlamaCpp {
    // Declared before the model, so that they are dropped before it.
    context: Option<Context>,
    embedding: Option<Context>,
    adapters: HashMap<AdapterId, Adapter>,
    model: Arc<Model>,
    spec: LoadSpec,
    slots: u32,
    info: ModelInfo,
}

impl LlamaCpp {
    /// Loads the file and decodes one token.
    pub fn load(spec: &LoadSpec) -> Result<Self, RunnerError> {
        Self::load_with(spec, false)
    }

    /// Loads the file as [`LlamaCpp::load`] does, with keys and values in F32: the reference that
    /// other runners are measured against.
    pub fn load_exact(spec: &LoadSpec) -> Result<Self, RunnerError> {
        Self::load_with(spec, true)
    }

    fn load_with(spec: &LoadSpec, exact: bool) -> Result<Self, RunnerError> {
        let started = Instant::now();
        llama_log::install();
        let model = Arc::new(Model::load(spec)?);
        if model.is_encoder_decoder() {
            return Err(RunnerError(format!(
                "{} is an encoder-decoder model, which is not supported; choose a decoder-only \
                 model to chat or an encoder-only one to embed",
                model.description()
            )));
        }
        let generates = model.has_decoder() && model.is_causal();
        // Recurrent state is large and cannot be truncated: no resident sequences.
        let residents = if model.shares_prefixes() { spec.max_sequences + 32 } else { 0 };
        let slots = match spec.kv_layout {
            KvLayout::Unified => spec.max_sequences.saturating_add(residents),
            KvLayout::Streams => spec.kv_tokens / spec.context_length.max(1),
        };
        let slots = slots.clamp(1, MAX_SEQUENCE_IDS);
        let context = match generates {
            true => Some(Context::new(&model, spec, ContextKind::Generate { slots, exact })?),
            false => None,
        };
        let mut runner = Self {
            info: info(&model, spec, slots, generates),
            context,
            embedding: None,
            adapters: HashMap::new(),
            model,
            spec: spec.clone(),
            slots,
        };
        runner.warm_up()?;
        runner.info.load_seconds = started.elapsed().as_secs_f32();
        Ok(runner)
    }

    /// Decodes (or embeds) one token twice: once to find out whether it works, once to time it.
    fn warm_up(&mut self) -> Result<(), RunnerError> {
        let token = self.model.vocab().bos.unwrap_or(0);
        if self.context.is_none() {
            self.pooled(&[token], None)?;
            return Ok(());
        }
        let batch = Batch {
            tokens: vec![token],
            sequences: vec![super::BatchSequence {
                slot: SeqSlot(0),
                rows: 0..1,
                position: 0,
                wants: super::Wants::LastLogits,
                pages: Vec::new(),
                adapter: None,
            }],
            adapter: None,
        };
        for _ in 0..2 {
            let started = Instant::now();
            self.step(&batch)?;
            self.logits(0)?;
            self.info.step_seconds = started.elapsed().as_secs_f32();
            self.release(SeqSlot(0));
        }
        Ok(())
    }

    fn generator(&mut self) -> Result<&mut Context, RunnerError> {
        self.context.as_mut().ok_or_else(no_generator)
    }
}

fn no_generator() -> RunnerError {
    RunnerError("this model cannot generate text".into())
}

/// Loads the vocabulary of a model, without its weights.
pub fn tokenizer(model: &Path) -> Result<Arc<dyn Tokenizer>, RunnerError> {
    llama_log::install();
    Ok(Arc::new(Model::load_vocabulary(model)?))
}

fn info(model: &Model, spec: &LoadSpec, slots: u32, generates: bool) -> ModelInfo {
    let context_length = spec.context_length.min(spec.kv_tokens.max(1));
    ModelInfo {
        description: model.description(),
        architecture: model.metadata("general.architecture").unwrap_or_default(),
        vocab_size: model.vocab().len() as u32,
        parameters: model.parameters(),
        context_length,
        embedding_size: model.embedding_size(),
        can_generate: generates,
        can_embed: model.can_embed(),
        pooled_length: context_length.min(MAX_POOLED_TOKENS),
        can_infill: model.vocab().infill.is_some(),
        shares_prefixes: model.shares_prefixes(),
        mixes_adapters: false,
        // Its kernels differ by the batch's shape: verified drafts would not match the output
        // without speculation.
        speculates: false,
        kv_pages: spec.kv_tokens / PAGE_TOKENS as u32,
        page_tokens: PAGE_TOKENS as u32,
        max_sequences: spec.max_sequences.min(slots),
        special_tokens: model.vocab().control_tokens(),
        load_seconds: 0.0,
        step_seconds: 0.0,
    }
}

impl ModelRunner for LlamaCpp {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn tokenizer(&self) -> Arc<dyn Tokenizer> {
        self.model.clone()
    }

    fn adapter_loader(&self) -> Box<dyn AdapterLoader> {
        Box::new(Loader::new(self.model.clone()))
    }

    fn slots(&self) -> u32 {
        self.slots
    }

    fn slots_hold_pages(&self) -> bool {
        true
    }

    fn run(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError> {
        let context = self.context.as_mut();
        let context = context.ok_or_else(no_generator)?;
        context.adapt(batch.adapter, &self.adapters)?;
        if self.info.shares_prefixes {
            context.decode(batch, interrupt)
        } else {
            // The state of a recurrent model cannot be restored to the start of the step.
            context.decode(batch, &mut || false)
        }
    }

    fn logits(&mut self, row: usize) -> Result<&mut [f32], RunnerError> {
        self.generator()?.logits(row)
    }

    fn fork(&mut self, from: SeqSlot, to: SeqSlot, tokens: usize) {
        if let Some(context) = &mut self.context {
            context.copy_sequence(from, to, tokens);
        }
    }

    fn truncate(&mut self, slot: SeqSlot, tokens: usize) {
        if let Some(context) = &mut self.context {
            context.remove_tokens(slot, tokens);
        }
    }

    fn release(&mut self, slot: SeqSlot) {
        self.truncate(slot, 0);
    }

    fn install_adapter(&mut self, adapter: AdapterId, handle: AdapterHandle) {
        if let AdapterHandle::LlamaCpp(loaded) = handle {
            self.adapters.insert(adapter, loaded);
        }
    }

    fn remove_adapter(&mut self, adapter: AdapterId) {
        let contexts = self.context.iter_mut().chain(&mut self.embedding);
        contexts.for_each(|context| context.leave_adapter(adapter));
        self.adapters.remove(&adapter);
    }

    fn pools_in_chunks(&self) -> bool {
        self.model.pools_in_chunks()
    }

    fn pool(
        &mut self,
        input: &[Token],
        rows: Range<usize>,
        adapter: Option<AdapterId>,
    ) -> Result<Option<Vec<f32>>, RunnerError> {
        if !self.info.can_embed {
            return Err(RunnerError("this model cannot embed text".into()));
        }
        if self.embedding.is_none() {
            self.embedding = Some(Context::new(&self.model, &self.spec, ContextKind::Embed)?);
        }
        let context = self.embedding.as_mut().expect("made above");
        context.adapt(adapter, &self.adapters)?;
        context.pool(input, rows, self.info.embedding_size as usize)
    }
}
