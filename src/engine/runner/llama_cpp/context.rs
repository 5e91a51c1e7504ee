//! A llama.cpp context: cache, compute buffers and the input batch.

use super::super::{Batch, BatchSequence, MAX_PROMPT_LOGITS, Ran, RunnerError, SeqSlot, Wants};
use super::adapter::Adapter;
use super::model::Model;
use crate::ipc::{AdapterId, KvCacheType, KvLayout, LoadSpec, MAX_POOLED_TOKENS, Token};
use llama_cpp_sys_2 as sys;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

pub(super) enum ContextKind {
    /// `exact`: keys and values in F32, whatever the specification says.
    Generate {
        slots: u32,
        exact: bool,
    },
    Embed,
}

pub(super) struct Context {
    raw: NonNull<sys::llama_context>,
    slots: u32,
    unified: bool,
    vocab_size: usize,
    rows: Rows,
    /// Location of the logits of each row of the last batch.
    logits: Vec<Logits>,
    /// (rows saved, vocabulary) logits of all parts of the batch but the last.
    saved: Vec<f32>,
    /// The adapter of all rows.
    adapter: Option<AdapterId>,
    /// Keeps the weights alive.
    _model: Arc<Model>,
}

#[derive(Clone, Copy, PartialEq)]
enum Logits {
    Unwanted,
    /// In llama.cpp's buffer, at the row's index in the last `llama_decode` call.
    InContext(i32),
    /// In `Context::saved`, from this index on.
    Saved(usize),
}

/// A part of a batch in llama.cpp's layout, reused from step to step.
#[derive(Default)]
struct Rows {
    tokens: Vec<sys::llama_token>,
    positions: Vec<sys::llama_pos>,
    counts: Vec<i32>,
    ids: Vec<sys::llama_seq_id>,
    id_pointers: Vec<*mut sys::llama_seq_id>,
    wanted: Vec<i8>,
    /// Indices into the batch.
    rows: Vec<usize>,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: created by `llama_init_from_model`, freed once; the model is still alive.
        unsafe { sys::llama_free(self.raw.as_ptr()) }
    }
}

impl Context {
    pub(super) fn new(
        model: &Arc<Model>,
        spec: &LoadSpec,
        kind: ContextKind,
    ) -> Result<Self, RunnerError> {
        Self::with_callback(model, spec, kind, (None, std::ptr::null_mut()))
    }

    /// Creates a context with a callback (and its argument) that receives tensors as they are
    /// computed.
    pub(super) fn with_callback(
        model: &Arc<Model>,
        spec: &LoadSpec,
        kind: ContextKind,
        callback: (sys::ggml_backend_sched_eval_callback, *mut c_void),
    ) -> Result<Self, RunnerError> {
        // SAFETY: the function takes no arguments and returns plain data.
        let mut params = unsafe { sys::llama_context_default_params() };
        let threads = i32::try_from(spec.threads.max(1)).unwrap_or(1);
        params.n_threads = threads;
        params.n_threads_batch = threads;
        params.no_perf = true;
        (params.cb_eval, params.cb_eval_user_data) = callback;
        params.kv_unified = true;
        // Sliding-window layers keep all tokens: a shared prefix needs those outside the window.
        params.swa_full = true;
        let cache_type = match spec.kv_type {
            KvCacheType::F16 => sys::GGML_TYPE_F16,
            KvCacheType::Q8_0 => sys::GGML_TYPE_Q8_0,
        };
        params.flash_attn_type = if spec.flash_attention {
            sys::LLAMA_FLASH_ATTN_TYPE_ENABLED
        } else {
            sys::LLAMA_FLASH_ATTN_TYPE_DISABLED
        };
        let slots = match kind {
            ContextKind::Generate { slots, exact } => {
                // Divided among the slots if each slot has its own buffer.
                params.n_ctx = spec.kv_tokens;
                params.kv_unified = spec.kv_layout == KvLayout::Unified;
                params.n_batch = spec.batch_tokens;
                params.n_ubatch = spec.batch_tokens;
                params.n_seq_max = slots;
                // The compute buffer holds this many rows of logits.
                params.n_outputs_max = slots + MAX_PROMPT_LOGITS as u32;
                params.n_outputs_max_per_seq = 0;
                let cache_type = if exact { sys::GGML_TYPE_F32 } else { cache_type };
                params.type_k = cache_type;
                params.type_v = cache_type;
                slots
            }
            ContextKind::Embed => {
                // llama.cpp rounds a short context up, beyond the number of rows of a position
                // table.
                let length = spec.context_length.min(MAX_POOLED_TOKENS);
                let rows = match model.pools_in_chunks() {
                    true => length.min(spec.batch_tokens),
                    false => length,
                };
                params.n_ctx = length;
                params.n_batch = rows;
                params.n_ubatch = rows;
                params.n_seq_max = 1;
                params.embeddings = true;
                params.pooling_type = pooling(model);
                params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_AUTO;
                1
            }
        };
        // SAFETY: the model is live and outlives the context (`_model`).
        let raw = unsafe { sys::llama_init_from_model(model.as_ptr(), params) };
        let raw = NonNull::new(raw).ok_or_else(|| {
            RunnerError(
                "llama.cpp could not make a context for the model; see its log above".into(),
            )
        })?;
        let unified = params.kv_unified;
        Ok(Self {
            raw,
            slots,
            unified,
            vocab_size: model.vocab().len(),
            rows: Rows::default(),
            logits: Vec::new(),
            saved: Vec::new(),
            adapter: None,
            _model: model.clone(),
        })
    }

    /// Computes the batch, unless `interrupt` returns true. On an error the caller drops all
    /// sequences in the batch.
    pub(super) fn decode(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError> {
        let ran = self.decode_parts(batch, interrupt);
        if let Ok(Ran::Interrupted) = ran {
            for sequence in &batch.sequences {
                self.remove_tokens(sequence.slot, sequence.position);
            }
        }
        ran
    }

    fn decode_parts(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError> {
        self.saved.clear();
        self.logits.clear();
        self.logits.resize(batch.tokens.len(), Logits::Unwanted);
        // llama.cpp computes all streams of a call over as many cells as the longest stream has: a
        // long prompt would make every decoding row as expensive as its own rows. Decode the two
        // kinds separately.
        let chunk = |sequence: &BatchSequence| sequence.rows.len() > 1;
        let chunks = batch.sequences.iter().filter(|sequence| chunk(sequence)).count();
        if self.unified || chunks == 0 || chunks == batch.sequences.len() {
            return self.decode_part(batch, |_| true, interrupt);
        }
        if self.decode_part(batch, chunk, interrupt)? == Ran::Interrupted {
            return Ok(Ran::Interrupted);
        }
        self.save_logits()?;
        self.decode_part(batch, |sequence| !chunk(sequence), interrupt)
    }

    fn decode_part(
        &mut self,
        batch: &Batch,
        part: impl Fn(&BatchSequence) -> bool,
        mut interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError> {
        self.rows.fill(batch, part, self.slots)?;
        let raw = self.rows.as_batch();
        let argument: *mut c_void = (&raw mut interrupt).cast();
        // SAFETY: all arrays have `n_tokens` elements and live in `self.rows`; every sequence id
        // was checked to be below `n_seq_max`. `interrupt` outlives the call of `llama_decode`,
        // after which the callback is removed; llama.cpp calls it on the calling thread.
        let code = unsafe {
            sys::llama_set_abort_callback(self.raw.as_ptr(), Some(interrupted), argument);
            let code = sys::llama_decode(self.raw.as_ptr(), raw);
            sys::llama_set_abort_callback(self.raw.as_ptr(), None, std::ptr::null_mut());
            code
        };
        match code {
            0 => {}
            2 => return Ok(Ran::Interrupted),
            1 => return Err(RunnerError("the KV cache has no room for the batch".into())),
            code => {
                return Err(RunnerError(format!(
                    "llama.cpp failed to decode a batch (code {code})"
                )));
            }
        }
        let wanted = self.rows.wanted.iter().zip(&self.rows.rows).enumerate();
        for (index, (_, &row)) in wanted.filter(|(_, (wanted, _))| **wanted == 1) {
            self.logits[row] = Logits::InContext(index as i32);
        }
        Ok(Ran::Complete)
    }

    /// Copies the logits that the next `llama_decode` call would overwrite.
    fn save_logits(&mut self) -> Result<(), RunnerError> {
        for row in 0..self.logits.len() {
            if let Logits::InContext(index) = self.logits[row] {
                let at = self.saved.len();
                let mut saved = std::mem::take(&mut self.saved);
                saved.extend_from_slice(self.logits_in_context(index)?);
                self.saved = saved;
                self.logits[row] = Logits::Saved(at);
            }
        }
        Ok(())
    }

    /// (vocabulary) logits after row `row` of the last batch.
    pub(super) fn logits(&mut self, row: usize) -> Result<&mut [f32], RunnerError> {
        match self.logits.get(row) {
            Some(&Logits::InContext(index)) => self.logits_in_context(index),
            Some(&Logits::Saved(at)) => Ok(&mut self.saved[at..at + self.vocab_size]),
            _ => Err(RunnerError(format!("row {row} has no logits"))),
        }
    }

    fn logits_in_context(&mut self, index: i32) -> Result<&mut [f32], RunnerError> {
        // SAFETY: the row was part of the last call and requested logits; llama.cpp returns null if
        // it has none.
        let raw = unsafe { sys::llama_get_logits_ith(self.raw.as_ptr(), index) };
        let raw = NonNull::new(raw)
            .ok_or_else(|| RunnerError(format!("llama.cpp has no logits for row {index}")))?;
        // SAFETY: a row of logits is one float per vocabulary token, in a buffer that stays valid
        // until the next decode, which needs `&mut self`.
        Ok(unsafe { std::slice::from_raw_parts_mut(raw.as_ptr(), self.vocab_size) })
    }

    pub(super) fn copy_sequence(&mut self, from: SeqSlot, to: SeqSlot, tokens: usize) {
        assert!(from.0 < self.slots && to.0 < self.slots, "slots are below the limit");
        // Between streams llama.cpp only copies whole sequences: the tail is removed afterwards.
        let end = if self.unified { tokens as i32 } else { -1 };
        // SAFETY: both ids are below `n_seq_max`; a null memory is accepted.
        unsafe {
            let memory = sys::llama_get_memory(self.raw.as_ptr());
            sys::llama_memory_seq_cp(memory, from.0 as i32, to.0 as i32, -1, end);
        }
        if !self.unified {
            self.remove_tokens(to, tokens);
        }
    }

    /// Discards all but the first `keep` tokens of a sequence.
    pub(super) fn remove_tokens(&mut self, slot: SeqSlot, keep: usize) {
        assert!(slot.0 < self.slots, "slots are below the limit");
        let from = if keep == 0 { -1 } else { keep as i32 };
        // SAFETY: the id is below `n_seq_max`; a null memory is accepted.
        unsafe {
            let memory = sys::llama_get_memory(self.raw.as_ptr());
            sys::llama_memory_seq_rm(memory, slot.0 as i32, from, -1);
        }
    }

    /// Applies an adapter to all rows of later batches. llama.cpp then rebuilds its graph, so a
    /// change is expensive. The runner keeps adapters alive while a context uses them.
    pub(super) fn adapt(
        &mut self,
        id: Option<AdapterId>,
        adapters: &HashMap<AdapterId, Adapter>,
    ) -> Result<(), RunnerError> {
        if id == self.adapter {
            return Ok(());
        }
        let find = |id| {
            let found = adapters.get(&id);
            found.ok_or_else(|| RunnerError(format!("adapter {} is not installed", id.0)))
        };
        self.use_adapter(id.map(find).transpose()?)?;
        self.adapter = id;
        Ok(())
    }

    /// Stops using an adapter that is about to be freed.
    pub(super) fn leave_adapter(&mut self, id: AdapterId) {
        if self.adapter == Some(id) && self.use_adapter(None).is_ok() {
            self.adapter = None;
        }
    }

    fn use_adapter(&mut self, adapter: Option<&Adapter>) -> Result<(), RunnerError> {
        let mut pointers: Vec<_> = adapter.iter().map(|adapter| adapter.raw.as_ptr()).collect();
        let mut scales: Vec<_> = adapter.iter().map(|adapter| adapter.scale).collect();
        // SAFETY: both arrays have as many elements as stated; the runner keeps adapters alive
        // while the context uses them.
        let code = unsafe {
            sys::llama_set_adapters_lora(
                self.raw.as_ptr(),
                pointers.as_mut_ptr(),
                pointers.len(),
                scales.as_mut_ptr(),
            )
        };
        if code == 0 {
            return Ok(());
        }
        Err(RunnerError(format!("llama.cpp refused the adapter (code {code})")))
    }

    /// Computes rows of an input to be pooled; with the last row, returns the pooled vector of
    /// `size` elements.
    pub(super) fn pool(
        &mut self,
        input: &[Token],
        rows: Range<usize>,
        size: usize,
    ) -> Result<Option<Vec<f32>>, RunnerError> {
        let batch = Batch {
            tokens: input[rows.clone()].to_vec(),
            sequences: vec![BatchSequence {
                slot: SeqSlot(0),
                rows: 0..rows.len(),
                position: rows.start,
                wants: Wants::AllLogits,
                pages: Vec::new(),
                adapter: None,
            }],
            adapter: None,
        };
        if rows.start == 0 {
            self.remove_tokens(SeqSlot(0), 0);
        }
        self.decode(&batch, &mut || false)?;
        if rows.end < input.len() {
            return Ok(None);
        }
        // SAFETY: the context was created with embeddings and pooling; llama.cpp returns null if it
        // has no embedding for the sequence.
        let raw = unsafe { sys::llama_get_embeddings_seq(self.raw.as_ptr(), 0) };
        let raw = NonNull::new(raw)
            .ok_or_else(|| RunnerError("llama.cpp returned no embedding".into()))?;
        // SAFETY: a pooled embedding has `llama_model_n_embd_out` elements, which is `size`.
        Ok(Some(unsafe { std::slice::from_raw_parts(raw.as_ptr(), size) }.to_vec()))
    }
}

/// Abort callback, which llama.cpp calls before each node of a graph. `argument` is the `&mut dyn
/// FnMut() -> bool` of [`Context::decode_part`].
unsafe extern "C" fn interrupted(argument: *mut c_void) -> bool {
    // SAFETY: the closure lives as long as the `llama_decode` call, and nothing else uses it
    // meanwhile.
    let interrupt = unsafe { &mut *argument.cast::<&mut dyn FnMut() -> bool>() };
    interrupt()
}

/// The pooling type that the file names. Without one, a causal model is pooled by its last token,
/// as in vLLM, any other model by the mean.
pub(super) fn pooling(model: &Model) -> sys::llama_pooling_type {
    match model.pooling() {
        Some(named) if named > sys::LLAMA_POOLING_TYPE_NONE => named,
        _ if model.is_causal() => sys::LLAMA_POOLING_TYPE_LAST,
        _ => sys::LLAMA_POOLING_TYPE_MEAN,
    }
}

impl Rows {
    fn fill(
        &mut self,
        batch: &Batch,
        part: impl Fn(&BatchSequence) -> bool,
        slots: u32,
    ) -> Result<(), RunnerError> {
        self.tokens.clear();
        self.positions.clear();
        self.ids.clear();
        self.wanted.clear();
        self.rows.clear();
        for sequence in batch.sequences.iter().filter(|sequence| part(sequence)) {
            if sequence.slot.0 >= slots {
                return Err(RunnerError(format!("slot {} is out of range", sequence.slot.0)));
            }
            for (offset, row) in sequence.rows.clone().enumerate() {
                let wanted = match sequence.wants {
                    Wants::Nothing => false,
                    Wants::LastLogits => row + 1 == sequence.rows.end,
                    Wants::AllLogits => true,
                };
                self.tokens.push(batch.tokens[row] as sys::llama_token);
                self.positions.push((sequence.position + offset) as sys::llama_pos);
                self.ids.push(sequence.slot.0 as sys::llama_seq_id);
                self.wanted.push(i8::from(wanted));
                self.rows.push(row);
            }
        }
        self.counts.clear();
        self.counts.resize(self.tokens.len(), 1);
        self.id_pointers.clear();
        self.id_pointers.extend(self.ids.iter_mut().map(std::ptr::from_mut));
        Ok(())
    }

    fn as_batch(&mut self) -> sys::llama_batch {
        sys::llama_batch {
            n_tokens: self.tokens.len() as i32,
            token: self.tokens.as_mut_ptr(),
            embd: std::ptr::null_mut(),
            pos: self.positions.as_mut_ptr(),
            n_seq_id: self.counts.as_mut_ptr(),
            seq_id: self.id_pointers.as_mut_ptr(),
            logits: self.wanted.as_mut_ptr(),
        }
    }
}
