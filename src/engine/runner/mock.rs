//! A runner without a model: a byte vocabulary, and logits that are a hash of the sequence so far.
//!
//! It stores every slot's tokens, so a wrong fork, truncation or position changes its output or
//! fails its step: errors in the scheduler or the cache do not go unnoticed.

use super::{
    AdapterHandle, AdapterLoader, Batch, ModelRunner, PAGE_TOKENS, Ran, RunnerError, SeqSlot, Wants,
};
use crate::ipc::{AdapterId, LoadSpec, ModelInfo, Speculate, Token};
use crate::tokenizer::{Tokenizer, Vocab};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// 256 bytes, then BOS and EOS.
const VOCAB: usize = 258;
const BOS: Token = 256;
const EOS: Token = 257;
/// If a prompt begins with this token, the mock's logits depend on the last two tokens only, so
/// that it soon repeats itself.
const FORGETS: Token = b'~' as Token;

pub struct Mock {
    info: ModelInfo,
    tokenizer: Arc<ByteTokenizer>,
    slots: Vec<Vec<Token>>,
    capacity: usize,
    adapters: HashMap<AdapterId, ()>,
    logits: HashMap<usize, Vec<f32>>,
    step_time: Duration,
    /// State of the input that is being pooled.
    pooling: Vec<f32>,
}

impl Mock {
    pub fn load(spec: &LoadSpec) -> Self {
        let slots = 256;
        Self {
            info: ModelInfo {
                description: "mock".into(),
                architecture: "mock".into(),
                vocab_size: VOCAB as u32,
                parameters: 0,
                context_length: spec.context_length,
                embedding_size: 8,
                can_generate: true,
                can_embed: true,
                pooled_length: spec.context_length,
                can_infill: false,
                shares_prefixes: true,
                mixes_adapters: false,
                speculates: spec.speculate != Speculate::Off,
                kv_pages: spec.kv_tokens / PAGE_TOKENS as u32,
                page_tokens: PAGE_TOKENS as u32,
                max_sequences: spec.max_sequences,
                special_tokens: Vec::new(),
                load_seconds: 0.0,
                step_seconds: spec.mock_step_us as f32 / 1e6,
            },
            tokenizer: Arc::new(ByteTokenizer::new()),
            slots: vec![Vec::new(); slots],
            capacity: spec.kv_tokens as usize,
            adapters: HashMap::new(),
            logits: HashMap::new(),
            step_time: Duration::from_micros(spec.mock_step_us),
            pooling: Vec::new(),
        }
    }

    /// Sets the duration of all further steps.
    #[cfg(test)]
    pub fn take(&mut self, time: Duration) {
        self.step_time = time;
        self.info.step_seconds = time.as_secs_f32();
    }

    /// The token that greedy decoding samples after `tokens`: the oracle of the tests.
    pub fn next_greedy(tokens: &[Token], adapter: Option<AdapterId>) -> Token {
        let logits = logits_of(tokens, adapter);
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        best.unwrap_or(0) as Token
    }
}

/// The logits after `tokens`: mostly letters win, sometimes EOS.
fn logits_of(tokens: &[Token], adapter: Option<AdapterId>) -> Vec<f32> {
    let forgets = tokens.iter().find(|&&token| token != BOS) == Some(&FORGETS);
    let tokens = if forgets { &tokens[tokens.len().saturating_sub(2)..] } else { tokens };
    let mut state = adapter.map_or(0, |id| id.0.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    for &token in tokens {
        state = mix(state ^ u64::from(token));
    }
    let value = |token: usize| {
        let noise = (mix(state ^ (token as u64) << 32) >> 40) as f32 / (1 << 24) as f32;
        let text = (0x61..0x7b).contains(&token) || token == 0x20;
        if text { 4.0 + noise } else { noise }
    };
    let mut logits: Vec<f32> = (0..VOCAB).map(value).collect();
    logits[BOS as usize] = f32::NEG_INFINITY;
    // EOS wins with probability 1/32.
    logits[EOS as usize] = if state.is_multiple_of(32) { 9.0 } else { -9.0 };
    logits
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = value.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value ^ (value >> 27)
}

impl ModelRunner for Mock {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn tokenizer(&self) -> Arc<dyn Tokenizer> {
        self.tokenizer.clone()
    }

    fn adapter_loader(&self) -> Box<dyn AdapterLoader> {
        Box::new(MockLoader)
    }

    fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    fn slots_hold_pages(&self) -> bool {
        true
    }

    fn run(
        &mut self,
        batch: &Batch,
        interrupt: &mut dyn FnMut() -> bool,
    ) -> Result<Ran, RunnerError> {
        let end = Instant::now() + self.step_time;
        loop {
            if interrupt() {
                return Ok(Ran::Interrupted);
            }
            match end.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => {
                    std::thread::sleep(left.min(Duration::from_millis(1)));
                }
                _ => break,
            }
        }
        if let Some(adapter) = batch.adapter
            && !self.adapters.contains_key(&adapter)
        {
            return Err(RunnerError(format!("adapter {} is not installed", adapter.0)));
        }
        self.logits.clear();
        for sequence in &batch.sequences {
            let slot = &mut self.slots[sequence.slot.0 as usize];
            if slot.len() != sequence.position {
                return Err(RunnerError(format!(
                    "slot {} holds {} tokens, the batch says {}",
                    sequence.slot.0,
                    slot.len(),
                    sequence.position
                )));
            }
            for row in sequence.rows.clone() {
                slot.push(batch.tokens[row]);
                let wanted = match sequence.wants {
                    Wants::Nothing => false,
                    Wants::LastLogits => row + 1 == sequence.rows.end,
                    Wants::AllLogits => true,
                };
                if wanted {
                    self.logits.insert(row, logits_of(slot, batch.adapter));
                }
            }
        }
        // Shared cells are counted once per holder: an upper bound of llama.cpp's usage.
        let longest = self.slots.iter().map(Vec::len).max().unwrap_or(0);
        if longest > self.capacity {
            return Err(RunnerError("a sequence is longer than the cache".into()));
        }
        Ok(Ran::Complete)
    }

    fn logits(&mut self, row: usize) -> Result<&mut [f32], RunnerError> {
        let logits = self.logits.get_mut(&row).map(Vec::as_mut_slice);
        logits.ok_or_else(|| RunnerError(format!("row {row} has no logits")))
    }

    fn fork(&mut self, from: SeqSlot, to: SeqSlot, tokens: usize) {
        let shared = self.slots[from.0 as usize][..tokens].to_vec();
        let target = &mut self.slots[to.0 as usize];
        assert!(target.is_empty(), "a fork's target is empty");
        *target = shared;
    }

    fn truncate(&mut self, slot: SeqSlot, tokens: usize) {
        self.slots[slot.0 as usize].truncate(tokens);
    }

    fn release(&mut self, slot: SeqSlot) {
        self.slots[slot.0 as usize].clear();
    }

    fn install_adapter(&mut self, adapter: AdapterId, _handle: AdapterHandle) {
        self.adapters.insert(adapter, ());
    }

    fn remove_adapter(&mut self, adapter: AdapterId) {
        self.adapters.remove(&adapter);
    }

    fn load_draft(&self, spec: &LoadSpec) -> Result<Box<dyn ModelRunner>, RunnerError> {
        Ok(Box::new(Self::load(spec)))
    }

    fn pool(
        &mut self,
        input: &[Token],
        rows: Range<usize>,
        _adapter: Option<AdapterId>,
    ) -> Result<Option<Vec<f32>>, RunnerError> {
        std::thread::sleep(self.step_time);
        if rows.start == 0 {
            self.pooling = vec![0.0; 8];
        }
        for &token in &input[rows.clone()] {
            self.pooling[token as usize % 8] += 1.0;
        }
        Ok((rows.end == input.len()).then(|| self.pooling.clone()))
    }
}

struct MockLoader;

impl AdapterLoader for MockLoader {
    fn prepare(&self, _path: &Path, _scale: f32) -> Result<AdapterHandle, RunnerError> {
        Ok(AdapterHandle::Mock)
    }
}

struct ByteTokenizer {
    vocab: Vocab,
}

impl ByteTokenizer {
    fn new() -> Self {
        let bytes = (0..=255u8).map(|byte| (vec![byte], false, false));
        let marks = [(b"<bos>".to_vec(), true, false), (b"<eos>".to_vec(), true, true)];
        let mut vocab = Vocab::new(bytes.chain(marks));
        vocab.bos = Some(BOS);
        vocab.eos = Some(EOS);
        Self { vocab }
    }
}

impl Tokenizer for ByteTokenizer {
    fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    fn encode(&self, text: &str, add_special: bool, _parse_special: bool) -> Vec<Token> {
        let bos = add_special.then_some(BOS);
        bos.into_iter().chain(text.bytes().map(Token::from)).collect()
    }
}
