//! The native runner: our own kernels over real pages, for the architectures of
//! [`weights`].
//!
//! A row's numbers do not depend on the other rows of the batch, on how a prompt was cut into
//! chunks, or on what was found in the cache: the same request gives bit-identical results.

mod adapter;
mod forward;
mod rounding;
#[cfg(test)]
mod tests;
mod weights;

pub use adapter::Adapter;
pub use weights::Unsupported;

use super::{
    AdapterHandle, AdapterLoader, Batch, BatchSequence, ModelRunner, PAGE_TOKENS, Ran, RunnerError,
    SeqSlot, Wants, llama_cpp,
};
use crate::gguf::{Gguf, KvType};
use crate::ipc::{
    AdapterId, KvCacheType, LoadSpec, MAX_POOLED_TOKENS, ModelInfo, Speculate, Token,
};
use crate::kernels::ops::Span;
use crate::kernels::{KvCache, Pool};
use crate::tokenizer::{Tokenizer, native::NativeTokenizer};
use forward::{Forward, Rows};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use weights::Weights;

/// Number of pages by which the cache of pooled inputs grows.
const POOLING_PAGES: usize = 1024 / PAGE_TOKENS;

pub struct Native {
    /// Shared with the draft model, which computes on the same threads.
    pool: Rc<RefCell<Pool>>,
    weights: Weights,
    cache: KvCache,
    /// Pages for one pooled input at a time, always in f16, and their number.
    pooling_cache: Option<(KvCache, usize)>,
    forward: Forward,
    adapters: HashMap<AdapterId, Adapter>,
    tokenizer: Arc<dyn Tokenizer>,
    info: ModelInfo,
    /// Rows of the last batch that wanted logits, in order.
    wanted: Vec<usize>,
}

impl Native {
    /// Loads the file and computes one token.
    ///
    /// # Errors
    /// [`Unsupported`] if the native runner cannot run the file; llama.cpp may be able to.
    pub fn load(spec: &LoadSpec) -> Result<Self, Unsupported> {
        let pool = Pool::new(spec.threads.max(1) as usize);
        let pool = pool.map_err(|error| Unsupported::Other(error.to_string()))?;
        Self::load_on(Rc::new(RefCell::new(pool)), spec)
    }

    fn load_on(pool: Rc<RefCell<Pool>>, spec: &LoadSpec) -> Result<Self, Unsupported> {
        let started = Instant::now();
        if spec.gpu_layers > 0 {
            return Err(Unsupported::Other("it computes on the CPU (--gpu-layers)".into()));
        }
        let other = |error: &dyn std::fmt::Display| Unsupported::Other(error.to_string());
        let context = spec.context_length.min(spec.kv_tokens.max(1)) as usize;
        let (file, activations) = (Gguf::open(&spec.model)?, spec.activations);
        let weights = Weights::load(file, context, activations, &mut pool.borrow_mut())?;
        let tokenizer = tokenizer(&weights.file, &spec.model).map_err(|error| other(&error))?;
        if tokenizer.vocab().len() > weights.shape.vocab {
            return Err(Unsupported::Other("it has more tokens than embeddings".into()));
        }
        let shape = &weights.shape;
        let pages = spec.kv_tokens as usize / PAGE_TOKENS;
        let ty = match spec.kv_type {
            KvCacheType::F16 => KvType::F16,
            KvCacheType::Q8_0 => KvType::Q8_0,
        };
        let cache = KvCache::new(ty, shape.layers, pages, shape.kv_heads, shape.head_dim);
        let mut runner = Self {
            info: info(spec, &weights, &*tokenizer),
            cache,
            pooling_cache: None,
            forward: Forward::default(),
            adapters: HashMap::new(),
            tokenizer,
            wanted: Vec::new(),
            weights,
            pool,
        };
        runner.warm_up().map_err(|error| other(&error))?;
        runner.info.load_seconds = started.elapsed().as_secs_f32();
        Ok(runner)
    }

    /// Computes one token twice: once to find out whether it works, once to time it.
    fn warm_up(&mut self) -> Result<(), RunnerError> {
        let token = self.tokenizer.vocab().bos.unwrap_or(0);
        let sequence = BatchSequence {
            slot: SeqSlot(0),
            rows: 0..1,
            position: 0,
            wants: Wants::LastLogits,
            pages: vec![0],
            adapter: None,
        };
        let batch = Batch { tokens: vec![token], sequences: vec![sequence], adapter: None };
        for _ in 0..2 {
            let started = Instant::now();
            self.step(&batch)?;
            self.info.step_seconds = started.elapsed().as_secs_f32();
        }
        Ok(())
    }
}

/// Loads the native tokenizer, or llama.cpp's if the native one does not support the vocabulary.
fn tokenizer(file: &Gguf, path: &Path) -> Result<Arc<dyn Tokenizer>, RunnerError> {
    match NativeTokenizer::from_gguf(file) {
        Ok(tokenizer) => Ok(Arc::new(tokenizer)),
        Err(reason) => {
            tracing::info!("llama.cpp tokenizes for this model: {reason}");
            llama_cpp::tokenizer(path)
        }
    }
}

fn info(spec: &LoadSpec, weights: &Weights, tokenizer: &dyn Tokenizer) -> ModelInfo {
    let vocab = tokenizer.vocab();
    let millions = weights.parameters as f64 / 1e6;
    ModelInfo {
        description: format!("{} {millions:.0}M", weights.shape.architecture),
        architecture: weights.shape.architecture.clone(),
        vocab_size: vocab.len() as u32,
        parameters: weights.parameters,
        context_length: spec.context_length.min(spec.kv_tokens.max(1)),
        embedding_size: weights.shape.width as u32,
        can_generate: true,
        can_embed: true,
        pooled_length: spec.context_length.min(MAX_POOLED_TOKENS),
        can_infill: vocab.infill.is_some(),
        shares_prefixes: true,
        mixes_adapters: true,
        speculates: spec.speculate != Speculate::Off,
        kv_pages: spec.kv_tokens / PAGE_TOKENS as u32,
        page_tokens: PAGE_TOKENS as u32,
        max_sequences: spec.max_sequences,
        special_tokens: vocab.control_tokens(),
        load_seconds: 0.0,
        step_seconds: 0.0,
    }
}

impl ModelRunner for Native {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn tokenizer(&self) -> Arc<dyn Tokenizer> {
        self.tokenizer.clone()
    }

    fn adapter_loader(&self) -> Box<dyn AdapterLoader> {
        Box::new(adapter::Loader::new(&self.weights.shape))
    }

    fn slots(&self) -> u32 {
        self.info.max_sequences
    }

    fn slots_hold_pages(&self) -> bool {
        false
    }

    fn run(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError> {
        self.wanted.clear();
        let mut spans = Vec::with_capacity(batch.sequences.len());
        let mut adapted: Vec<(Range<usize>, &Adapter)> = Vec::new();
        for sequence in &batch.sequences {
            let rows = sequence.rows.clone();
            match sequence.wants {
                Wants::Nothing => {}
                Wants::LastLogits => self.wanted.push(rows.end - 1),
                Wants::AllLogits => self.wanted.extend(rows.clone()),
            }
            if let Some(id) = sequence.adapter {
                let adapter = installed(&self.adapters, id)?;
                match adapted.last_mut() {
                    Some((range, last))
                        if range.end == rows.start && std::ptr::eq(*last, adapter) =>
                    {
                        range.end = rows.end;
                    }
                    _ => adapted.push((rows.clone(), adapter)),
                }
            }
            let pages = sequence.pages.clone();
            spans.push(Span { rows, position: sequence.position, pages });
        }
        let (tokens, wanted) = (&batch.tokens[..], &self.wanted[..]);
        let rows = Rows { tokens, spans: &spans, wanted, adapted: &adapted };
        let (forward, pool) = (&mut self.forward, &mut self.pool.borrow_mut());
        // Rows written into pages count only once the step is complete.
        forward.run(&self.weights, &mut self.cache, pool, &rows, interrupt).map_err(RunnerError)
    }

    fn logits(&mut self, row: usize) -> Result<&mut [f32], RunnerError> {
        let index = self.wanted.binary_search(&row);
        let index = index.map_err(|_| RunnerError(format!("row {row} has no logits")))?;
        let logits = self.forward.logits(index, self.weights.shape.vocab);
        // The head may have more rows than the vocabulary has tokens.
        Ok(&mut logits[..self.info.vocab_size as usize])
    }

    /// A sequence consists of its pages: no state is kept per slot.
    fn fork(&mut self, _from: SeqSlot, _to: SeqSlot, _tokens: usize) {}

    fn truncate(&mut self, _slot: SeqSlot, _tokens: usize) {}

    fn release(&mut self, _slot: SeqSlot) {}

    fn copy_page(&mut self, from: u32, to: u32) {
        self.cache.copy_page(from, to);
    }

    fn install_adapter(&mut self, adapter: AdapterId, handle: AdapterHandle) {
        if let AdapterHandle::Native(loaded) = handle {
            self.adapters.insert(adapter, loaded);
        }
    }

    fn remove_adapter(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter);
    }

    fn load_draft(&self, spec: &LoadSpec) -> Result<Box<dyn ModelRunner>, RunnerError> {
        let loaded = Self::load_on(self.pool.clone(), spec);
        Ok(Box::new(loaded.map_err(|error| RunnerError(error.to_string()))?))
    }

    fn pool(
        &mut self,
        input: &[Token],
        rows: Range<usize>,
        adapter: Option<AdapterId>,
    ) -> Result<Option<Vec<f32>>, RunnerError> {
        let part = input.get(rows.clone()).filter(|part| !part.is_empty());
        let part = part.ok_or_else(|| RunnerError("there is nothing to pool".into()))?;
        let adapter = adapter.map(|id| installed(&self.adapters, id)).transpose()?;
        let wanted_pages = input.len().div_ceil(PAGE_TOKENS).next_multiple_of(POOLING_PAGES);
        // Growing the cache loses its contents, so only the first chunk of an input may grow it.
        if rows.start == 0 && self.pooling_cache.as_ref().is_none_or(|(_, had)| *had < wanted_pages)
        {
            let shape = &self.weights.shape;
            let (layers, heads, width) = (shape.layers, shape.kv_heads, shape.head_dim);
            let cache = KvCache::new(KvType::F16, layers, wanted_pages, heads, width);
            self.pooling_cache = Some((cache, wanted_pages));
        }
        let Some((cache, pages)) = &mut self.pooling_cache else {
            return Err(RunnerError("an input is pooled from its middle on".into()));
        };
        self.wanted.clear();
        let pages: Vec<u32> = (0..*pages as u32).collect();
        let span = Span { rows: 0..part.len(), position: rows.start, pages };
        let adapted: Vec<_> = adapter.iter().map(|&adapter| (0..part.len(), adapter)).collect();
        let wanted = &[part.len() - 1];
        let batch = Rows { tokens: part, spans: &[span], wanted, adapted: &adapted };
        let (forward, pool) = (&mut self.forward, &mut self.pool.borrow_mut());
        let ran = forward.run(&self.weights, cache, pool, &batch, &mut || false);
        ran.map_err(RunnerError)?;
        Ok((rows.end == input.len()).then(|| self.forward.hidden(0).to_vec()))
    }
}

fn installed(
    adapters: &HashMap<AdapterId, Adapter>,
    id: AdapterId,
) -> Result<&Adapter, RunnerError> {
    adapters.get(&id).ok_or_else(|| RunnerError(format!("adapter {} is not installed", id.0)))
}
