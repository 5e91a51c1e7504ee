//! Memory plan of a model, made from its header before anything is loaded.
//!
//! The plan also sets what the configuration leaves open: context length and KV cache size. A model
//! that does not fit is refused without an attempt to load it; the error states the numbers and
//! what to change.

mod machine;

pub use machine::available;

use crate::config::{ByteSize, DEFAULT_CONTEXT_LENGTH, DEFAULT_SEQUENCES, EngineConfig};
use crate::gateway::header::ModelHeader;
use crate::gguf::KvType;
use crate::ipc::{KvCacheType, KvLayout, LoadSpec, MAX_POOLED_TOKENS, RunnerKind, Speculate};
use crate::isa::{Isa, isa};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// llama.cpp rounds context lengths up to a multiple of this.
const CONTEXT_STEP: u64 = 256;
/// Smallest useful context; a plan that would need a smaller one is refused.
const SMALLEST_CONTEXT: u64 = 512;
/// The default cache holds this many requests of [`TYPICAL_REQUEST`] tokens. It is not larger even
/// if memory would allow it: the buffer is written at load, so all of it is resident.
const TYPICAL_REQUESTS: u64 = 16;
const TYPICAL_REQUEST: u64 = 2_048;
/// Default number of concurrent requests if each has its own stream: two cores do not gain from
/// more.
const DEFAULT_STREAMS: u32 = 8;
/// Code, allocator, thread stacks and queues of an engine.
const PROCESS_BYTES: u64 = 96 << 20;
/// Tokenizer, token trie and candidate arrays, per token of the vocabulary.
const BYTES_PER_VOCABULARY_TOKEN: u64 = 400;

/// Memory needs of a model, in bytes, and the settings of its engine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemoryPlan {
    #[serde(skip)]
    pub spec: LoadSpec,
    /// Weights used in place in the file's mapping: the system may drop and reread their pages.
    pub mapped_weights: u64,
    /// Private copies: repacked for the CPU's instructions, or read without mmap.
    pub private_weights: u64,
    pub kv_cache: u64,
    pub compute_buffers: u64,
    pub overhead: u64,
    /// Cache of an input that is pooled or scored (`/v1/embeddings`, `/v1/score`). It is allocated
    /// with the first such input.
    pub pooled_input: u64,
    /// Weights, cache and buffers of the draft model.
    pub draft_model: u64,
    /// Weights and cache on a GPU, whose memory this plan cannot check.
    pub on_gpu: u64,
    /// Bytes that were free when the plan was made.
    pub available: u64,
    pub context_length: u32,
    pub kv_tokens: u32,
    /// Decisions that deviate from the configuration or from the model's own limits.
    pub notes: Vec<String>,
}

/// Header and path of a model to plan for.
#[derive(Debug, Clone)]
pub struct ModelFile {
    pub header: ModelHeader,
    pub path: PathBuf,
}

/// Reason why a model is not loaded: the numbers, and what to change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DoesNotFit(pub String);

impl MemoryPlan {
    /// Plans for a model and its draft model, with `available` bytes free.
    ///
    /// # Errors
    /// [`DoesNotFit`] if the model cannot run with the configured settings.
    pub fn make(
        model: &ModelFile,
        draft: Option<&ModelFile>,
        config: &EngineConfig,
        available: u64,
    ) -> Result<Self, DoesNotFit> {
        let mut sketch = Sketch::new(&model.header, draft, config, available);
        sketch.choose_context();
        sketch.choose_layout();
        sketch.choose_cache()?;
        let plan = sketch.finish(model.path.clone());
        if plan.total() > available && plan.spec.runner != RunnerKind::Mock {
            return Err(plan.refusal(&model.header));
        }
        Ok(plan)
    }

    /// Total bytes of memory.
    pub fn total(&self) -> u64 {
        self.mapped_weights.saturating_add(self.private())
    }

    /// Bytes that the system cannot take back while the engine runs.
    pub fn private(&self) -> u64 {
        // Headers are untrusted: their numbers may add up to anything.
        let cache = self.kv_cache.saturating_add(self.pooled_input);
        let parts = [self.private_weights, cache, self.compute_buffers, self.overhead];
        parts.into_iter().fold(self.draft_model, u64::saturating_add)
    }

    fn refusal(&self, header: &ModelHeader) -> DoesNotFit {
        let size = ByteSize;
        let mut advice = vec!["a smaller quantization"];
        if self.kv_cache > self.total() / 8 {
            advice.push("a smaller --kv-tokens or --context-length");
            if self.spec.kv_type == KvCacheType::F16 {
                advice.push("--kv-type q8_0");
            }
        }
        if self.compute_buffers > self.total() / 8 {
            advice.push("a smaller --batch-tokens");
        }
        let mut drafts = String::new();
        if self.draft_model > 0 {
            drafts = format!(", {} for the draft model", size(self.draft_model));
            advice.push("no --draft-model");
        }
        DoesNotFit(format!(
            "The model needs {} of memory, but {} is available: {} for weights, {} for a KV cache \
             of {} tokens ({} a token), {} for compute buffers, {} for the process{drafts}. Unload another \
             model, raise --memory-budget if it is set, or use {}.",
            size(self.total()),
            size(self.available),
            size(self.mapped_weights.saturating_add(self.private_weights)),
            size(self.kv_cache),
            self.kv_tokens,
            size(header.facts.kv_bytes_per_token(kv_type(self.spec.kv_type))),
            size(self.compute_buffers),
            size(self.overhead),
            advice.join(", or "),
        ))
    }
}

/// The table that `ingot serve` prints.
impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |what: &str, bytes: u64, note: &str| {
            writeln!(f, "  {what:<16} {:>10}  {note}", ByteSize(bytes).to_string())
        };
        if self.mapped_weights > 0 {
            row("weights, mapped", self.mapped_weights, "from the file")?;
        }
        if self.private_weights > 0 {
            row("weights, copied", self.private_weights, "repacked for this CPU")?;
        }
        let each = format!(
            "{} tokens of {}, {} for one request at most",
            self.kv_tokens,
            match self.spec.kv_type {
                KvCacheType::F16 => "f16",
                KvCacheType::Q8_0 => "q8_0",
            },
            self.context_length
        );
        row("KV cache", self.kv_cache, &each)?;
        let batch = format!("for {} tokens a step, an estimate", self.spec.batch_tokens);
        row("compute buffers", self.compute_buffers, &batch)?;
        if self.pooled_input > 0 {
            let tokens = self.context_length.min(MAX_POOLED_TOKENS);
            let note = format!("cache of one embedded input of {tokens} tokens of f16");
            row("pooled input", self.pooled_input, &note)?;
        }
        row("process", self.overhead, "")?;
        if self.draft_model > 0 {
            row("draft model", self.draft_model, "its weights, cache and buffers")?;
        }
        if self.on_gpu > 0 {
            row("on the GPU", self.on_gpu, "not checked")?;
        }
        row("total", self.total(), &format!("of {} available", ByteSize(self.available)))?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  note: {note}"))
    }
}

/// A memory plan under construction.
struct Sketch<'a> {
    header: &'a ModelHeader,
    draft: Option<&'a ModelFile>,
    config: &'a EngineConfig,
    available: u64,
    layout: KvLayout,
    context: u64,
    sequences: u64,
    kv_tokens: u64,
    notes: Vec<String>,
}

fn kv_type(ty: KvCacheType) -> KvType {
    match ty {
        KvCacheType::F16 => KvType::F16,
        KvCacheType::Q8_0 => KvType::Q8_0,
    }
}

impl<'a> Sketch<'a> {
    fn new(
        header: &'a ModelHeader,
        draft: Option<&'a ModelFile>,
        config: &'a EngineConfig,
        available: u64,
    ) -> Self {
        Self {
            header,
            draft: draft.filter(|_| config.speculate != Speculate::Off),
            config,
            available,
            layout: config.kv_layout.unwrap_or(KvLayout::Unified),
            context: 0,
            sequences: u64::from(config.max_sequences.unwrap_or(DEFAULT_SEQUENCES)),
            kv_tokens: 0,
            notes: Vec::new(),
        }
    }

    /// The configured context, limited to the model's own.
    fn choose_context(&mut self) {
        let asked = self.config.context_length;
        let wanted = u64::from(asked.unwrap_or(DEFAULT_CONTEXT_LENGTH));
        let trained = u64::from(self.header.facts.n_ctx_train);
        self.context = if trained == 0 { wanted } else { wanted.min(trained) };
        if asked.is_some() && self.context < wanted {
            self.notes.push(format!(
                "--context-length {wanted} is more than the model was trained for; it is {trained}"
            ));
        }
    }

    /// The configured layout. Without one: streams, which are faster, if memory allows a whole
    /// context for every request.
    fn choose_layout(&mut self) {
        let sequences = u64::from(self.config.max_sequences.unwrap_or(DEFAULT_STREAMS));
        let config = self.config;
        let open = config.kv_layout.is_none() && config.kv_tokens.is_none();
        let known = config.gpu_layers == 0 && self.runner() == RunnerKind::LlamaCpp;
        if open && known && sequences.saturating_mul(self.context) <= self.fits() / 4 {
            self.layout = KvLayout::Streams;
        }
        if self.layout == KvLayout::Streams {
            self.sequences = sequences;
        }
    }

    /// The native runner if it supports the model and its options, unless another runner is
    /// configured.
    fn runner(&self) -> RunnerKind {
        match (self.config.runner, self.uncovered()) {
            (Some(runner @ (RunnerKind::LlamaCpp | RunnerKind::Mock)), _) => runner,
            (_, Some(_)) => RunnerKind::LlamaCpp,
            (_, None) => RunnerKind::Native,
        }
    }

    fn uncovered(&self) -> Option<String> {
        let config = self.config;
        if isa() == Isa::Scalar {
            Some("the native runner has no fast kernels for this CPU (or for INGOT_ISA)".into())
        } else if config.gpu_layers > 0 {
            Some("the native runner computes on the CPU (--gpu-layers)".into())
        } else if config.kv_layout.is_some() {
            Some("the native runner has no choice of layout (--kv-layout)".into())
        } else {
            self.header.uncovered.clone()
        }
    }

    /// Number of cache tokens that fit into the available memory.
    fn fits(&self) -> u64 {
        self.available.saturating_sub(self.fixed_bytes()) / self.bytes_per_token().max(1)
    }

    /// The configured cache size, or the default one; a default context shrinks until it fits.
    fn choose_cache(&mut self) -> Result<(), DoesNotFit> {
        if let Some(asked) = self.config.kv_tokens {
            self.kv_tokens = u64::from(asked);
            let one = match self.layout {
                KvLayout::Unified => self.kv_tokens,
                KvLayout::Streams => self.kv_tokens / self.sequences,
            };
            if one == 0 {
                return Err(DoesNotFit(format!(
                    "--kv-tokens {asked} leaves no token for each of {} sequences \
                     (--max-sequences) with --kv-layout streams.",
                    self.sequences
                )));
            }
            if one < self.context {
                self.notes.push(format!("the context is {one} tokens, all that --kv-tokens holds"));
                self.context = one;
            }
            return Ok(());
        }
        let fits = self.fits();
        let smallest = SMALLEST_CONTEXT.min(self.context);
        if self.config.context_length.is_none() && fits < self.context && fits >= smallest {
            let shrunk = round_down(fits).max(smallest);
            self.notes.push(format!(
                "the context is {shrunk} tokens instead of {}: more does not fit into memory",
                self.context
            ));
            self.context = shrunk;
        }
        match self.layout {
            KvLayout::Unified => {
                let requests = self.sequences.min(TYPICAL_REQUESTS);
                let wanted = requests * self.context.min(TYPICAL_REQUEST);
                self.kv_tokens = wanted.min(round_down(fits / 2)).max(self.context);
            }
            KvLayout::Streams => {
                self.sequences = (fits / 2 / self.context.max(1)).clamp(1, self.sequences);
                self.kv_tokens = self.sequences * self.context;
            }
        }
        Ok(())
    }

    /// Host bytes that do not depend on the size of the cache.
    fn fixed_bytes(&self) -> u64 {
        self.host(self.header.weights_bytes)
            .saturating_add(self.compute_bytes(0))
            .saturating_add(self.overhead())
            .saturating_add(self.pooled_bytes())
            .saturating_add(self.draft_bytes(0))
    }

    /// Bytes of the draft model with its own cache of `kv_tokens` tokens. Its logits are one row
    /// per sequence.
    fn draft_bytes(&self, kv_tokens: u64) -> u64 {
        let Some(ModelFile { header, .. }) = self.draft else { return 0 };
        let facts = &header.facts;
        let logits = (4 * u64::from(facts.n_vocab)).saturating_mul(self.sequences);
        let activations =
            (4 * (8 + 12) * u64::from(facts.n_embd)).saturating_mul(self.batch_tokens());
        let cache =
            facts.kv_bytes_per_token(kv_type(self.config.kv_type)).saturating_mul(kv_tokens);
        let vocabulary = u64::from(facts.n_vocab) * BYTES_PER_VOCABULARY_TOKEN;
        [header.weights_bytes, logits, activations, cache]
            .into_iter()
            .fold(vocabulary, u64::saturating_add)
    }

    /// Host bytes per token of cache, including its column of the attention mask.
    fn bytes_per_token(&self) -> u64 {
        let of =
            |header: &ModelHeader| header.facts.kv_bytes_per_token(kv_type(self.config.kv_type));
        let drafts = self.draft.map_or(0, |draft| of(&draft.header));
        self.host(of(self.header))
            .saturating_add(self.mask_bytes_per_token())
            .saturating_add(drafts)
    }

    /// Mask bytes per token: for llama.cpp's flash attention an f32 mask and its f16 copy; without
    /// flash attention the scores of a layer. The native runner has neither.
    fn mask_bytes_per_token(&self) -> u64 {
        let row = match self.runner() {
            RunnerKind::Native => 0,
            _ if self.flash_attention() => 6,
            _ => 4 + 8 * u64::from(self.header.facts.n_head),
        };
        self.batch_tokens().saturating_mul(row)
    }

    /// Whether to use flash attention: as configured, otherwise if it is faster. On the CPU the
    /// plain operations are faster as soon as there is some context (by a third at 1,000 tokens),
    /// but they also compute the masked cells of a unified cache, and cannot read a quantized one.
    fn flash_attention(&self) -> bool {
        let config = self.config;
        config.flash_attention.unwrap_or(
            self.layout == KvLayout::Unified
                || config.gpu_layers > 0
                || config.kv_type != KvCacheType::F16,
        )
    }

    /// Cells of the cache that a row of a batch can see.
    fn visible(&self, kv_tokens: u64) -> u64 {
        match self.layout {
            KvLayout::Unified => kv_tokens,
            KvLayout::Streams => kv_tokens.min(self.context),
        }
    }

    /// Bytes of the worst-case graph that llama.cpp reserves: logits for every row (and a second
    /// copy for every sequence whose logits are read), and the widest activations (attention and
    /// feed-forward of one layer; the feed-forward width is assumed to be four times the hidden
    /// size).
    fn compute_bytes(&self, kv_tokens: u64) -> u64 {
        let facts = &self.header.facts;
        let rows = self.batch_tokens();
        let logits = match facts.is_encoder_only {
            true => 0,
            false => (4 * u64::from(facts.n_vocab)).saturating_mul(rows + self.sequences),
        };
        let activations = (4 * (8 + 12) * u64::from(facts.n_embd)).saturating_mul(rows);
        let mask = self.visible(kv_tokens).saturating_mul(self.mask_bytes_per_token());
        logits.saturating_add(activations).saturating_add(mask)
    }

    /// Bytes of the f16 cache for the longest pooled input.
    fn pooled_bytes(&self) -> u64 {
        let tokens = self.context.min(u64::from(MAX_POOLED_TOKENS));
        self.host(self.header.facts.kv_bytes_per_token(KvType::F16).saturating_mul(tokens))
    }

    fn overhead(&self) -> u64 {
        PROCESS_BYTES + u64::from(self.header.facts.n_vocab) * BYTES_PER_VOCABULARY_TOKEN
    }

    /// The part of `bytes` that is not on the GPU.
    fn host(&self, bytes: u64) -> u64 {
        let layers = u64::from(self.header.facts.n_layer) + 1;
        let on_gpu = u64::from(self.config.gpu_layers).min(layers);
        bytes - bytes / layers * on_gpu
    }

    /// Tokens per batch. A model with bidirectional attention needs its whole input in one batch.
    fn batch_tokens(&self) -> u64 {
        let configured = u64::from(self.config.batch_tokens);
        if self.header.facts.causal { configured } else { configured.max(self.context) }
    }

    fn finish(mut self, path: PathBuf) -> MemoryPlan {
        let runner = self.runner();
        if let (RunnerKind::LlamaCpp, Some(reason)) = (runner, self.uncovered())
            && self.config.runner != Some(RunnerKind::LlamaCpp)
        {
            self.notes.push(format!("llama.cpp runs it: {reason}"));
        }
        if let Some(trained) = self.draft.map(|draft| u64::from(draft.header.facts.n_ctx_train))
            && (1..self.context).contains(&trained)
        {
            self.notes.push(format!(
                "the draft model was trained for {trained} tokens: it will be of little use after them"
            ));
        }
        let facts = &self.header.facts;
        let weights = self.host(self.header.weights_bytes);
        let per_token = facts.kv_bytes_per_token(kv_type(self.config.kv_type));
        let cache = self.kv_tokens.saturating_mul(per_token);
        let repacks = self.config.gpu_layers == 0;
        let private_weights = match self.config.mmap {
            // The native runner copies all weights that it reads while it runs.
            _ if runner == RunnerKind::Native => weights,
            true if repacks => self.header.repackable_bytes.min(weights),
            true => 0,
            false => weights,
        };
        MemoryPlan {
            mapped_weights: weights - private_weights,
            private_weights,
            kv_cache: self.host(cache),
            compute_buffers: self.compute_bytes(self.kv_tokens),
            overhead: self.overhead(),
            pooled_input: self.pooled_bytes(),
            draft_model: self.draft_bytes(self.kv_tokens),
            on_gpu: (self.header.weights_bytes - weights).saturating_add(cache - self.host(cache)),
            available: self.available,
            context_length: narrow(self.context),
            kv_tokens: narrow(self.kv_tokens),
            spec: LoadSpec {
                model: path,
                draft: self.draft.map(|draft| draft.path.clone()),
                runner,
                context_length: narrow(self.context),
                kv_tokens: narrow(self.kv_tokens),
                max_sequences: narrow(self.sequences),
                batch_tokens: narrow(self.batch_tokens()),
                kv_type: self.config.kv_type,
                activations: self.config.activations,
                flash_attention: self.flash_attention(),
                kv_layout: self.layout,
                threads: self.config.threads,
                gpu_layers: self.config.gpu_layers,
                mmap: self.config.mmap,
                target_step_ms: self.config.target_step_ms,
                queue_limit: self.config.queue_limit,
                speculate: self.config.speculate,
                mock_step_us: self.config.mock_step_us,
            },
            notes: self.notes,
        }
    }
}

fn round_down(tokens: u64) -> u64 {
    tokens / CONTEXT_STEP * CONTEXT_STEP
}

fn narrow(tokens: u64) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
