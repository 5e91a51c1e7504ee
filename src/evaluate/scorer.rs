//! Runs a model over tokens, and gives out the logits of some of them.

use crate::engine::runner::{
    self, Batch, BatchSequence, MAX_PROMPT_LOGITS, ModelRunner, PAGE_TOKENS, SeqSlot, Wants,
};
use crate::gguf::{Gguf, ModelFacts};
use crate::ipc::{AdapterId, KvLayout, LoadSpec, RunnerKind, Token};
use crate::job::{EvalError, EvalModel};
use crate::tokenizer::Tokenizer;
use std::ops::Range;
use std::sync::Arc;

/// Tokens of a step that returns no logits, at most.
const STEP: usize = 512;
const ADAPTER: AdapterId = AdapterId(1);

/// Takes the first position of a part, and (rows, vocabulary) its logits.
pub(super) type Each<'a> = dyn FnMut(usize, &[f32]) -> Result<(), EvalError> + 'a;

/// A loaded model.
pub(super) struct Scorer {
    name: String,
    runner: Box<dyn ModelRunner>,
    adapter: Option<AdapterId>,
    pub facts: ModelFacts,
    /// Bytes of its file.
    pub bytes: u64,
    /// Tokens that it reads at once, at most.
    pub context: usize,
    /// Tokens in the cache.
    cached: Vec<Token>,
}

impl Scorer {
    /// Loads a model for inputs of `context` tokens, or as many as it was trained for.
    ///
    /// # Errors
    /// If it cannot be loaded, or generates no text.
    pub(super) fn load(
        model: &EvalModel,
        context: usize,
        llama_cpp: bool,
        threads: u32,
    ) -> Result<Self, EvalError> {
        let EvalModel { name, file, adapter, .. } = model;
        let refuse = |why: &dyn std::fmt::Display| EvalError::Refused(format!("{name}: {why}"));
        let gguf = Gguf::open_header(file).map_err(|error| refuse(&error))?;
        let facts = ModelFacts::read(&gguf).map_err(|error| refuse(&error))?;
        let trained = match facts.n_ctx_train as usize {
            0 => usize::MAX,
            trained => trained,
        };
        let context = context.min(trained);
        let tokens = context.next_multiple_of(PAGE_TOKENS) as u32;
        let kind = if llama_cpp { RunnerKind::LlamaCpp } else { RunnerKind::Native };
        let spec = LoadSpec {
            context_length: tokens,
            kv_tokens: tokens,
            max_sequences: 1,
            batch_tokens: STEP as u32,
            kv_layout: KvLayout::Streams,
            threads,
            ..LoadSpec::plain(file, kind)
        };
        let mut runner = runner::load(&spec).map_err(|error| refuse(&error))?;
        if !runner.info().can_generate {
            return Err(refuse(&"this model cannot generate text, so it predicts no tokens"));
        }
        if let Some(path) = adapter {
            let handle = runner.adapter_loader().prepare(path, 1.0);
            runner.install_adapter(ADAPTER, handle.map_err(|error| refuse(&error))?);
        }
        let adapter = adapter.as_ref().map(|_| ADAPTER);
        let (name, bytes) = (name.clone(), gguf.file_size());
        Ok(Self { name, runner, adapter, facts, bytes, context, cached: Vec::new() })
    }

    pub(super) fn tokenizer(&self) -> Arc<dyn Tokenizer> {
        self.runner.tokenizer()
    }

    /// (rows, vocabulary) the length of a row of logits.
    pub(super) fn vocabulary(&self) -> usize {
        self.runner.info().vocab_size as usize
    }

    /// Reads tokens from the beginning of a sequence, and passes the logits after the positions `wanted` to
    /// `each`: the first position of a part, and (rows, vocabulary) its logits.
    ///
    /// # Errors
    /// If the model fails, or a logit is not finite.
    pub(super) fn read(
        &mut self,
        tokens: &[Token],
        wanted: Range<usize>,
        each: &mut Each<'_>,
    ) -> Result<(), EvalError> {
        let mut at = self.keep(tokens, wanted.start);
        let mut logits = Vec::new();
        while at < wanted.end {
            let silent = at < wanted.start;
            let (most, end) =
                if silent { (STEP, wanted.start) } else { (MAX_PROMPT_LOGITS, wanted.end) };
            let rows = most.min(end - at);
            let wants = if silent { Wants::Nothing } else { Wants::AllLogits };
            let batch = self.batch(&tokens[at..at + rows], at, wants);
            self.runner.step(&batch).map_err(|error| self.refuse(&error))?;
            if !silent {
                logits.clear();
                for row in 0..rows {
                    match self.runner.logits(row) {
                        Ok(found) if found.iter().all(|x| x.is_finite()) => {
                            logits.extend_from_slice(found);
                        }
                        Ok(_) => {
                            return Err(self.refuse(&"it computed a logit that is NaN or infinite"));
                        }
                        Err(error) => return Err(self.refuse(&error)),
                    }
                }
                each(at, &logits)?;
            }
            self.cached.extend_from_slice(&tokens[at..at + rows]);
            at += rows;
        }
        Ok(())
    }

    /// Truncates the cache to what `tokens` begin with, at most `most` tokens. Returns their number.
    fn keep(&mut self, tokens: &[Token], most: usize) -> usize {
        let same = self.cached.iter().zip(tokens).take_while(|(a, b)| a == b).count().min(most);
        // The state of a recurrent model cannot be truncated.
        let same = if self.runner.info().shares_prefixes { same } else { 0 };
        self.runner.truncate(SeqSlot(0), same);
        self.cached.truncate(same);
        same
    }

    fn refuse(&self, why: &dyn std::fmt::Display) -> EvalError {
        EvalError::Refused(format!("{}: {why}", self.name))
    }

    fn batch(&self, tokens: &[Token], position: usize, wants: Wants) -> Batch {
        let pages = (position + tokens.len()).div_ceil(PAGE_TOKENS) as u32;
        let sequence = BatchSequence {
            slot: SeqSlot(0),
            rows: 0..tokens.len(),
            position,
            wants,
            pages: (0..pages).collect(),
            adapter: self.adapter,
        };
        Batch { tokens: tokens.to_vec(), sequences: vec![sequence], adapter: self.adapter }
    }
}
