//! From logits to tokens to events: the second half of a step.

use super::grammar;
use super::runner::RunnerError;
use super::sampler::logprobs;
use super::sequence::{RequestFacts, SeqKey, Sequence};
use super::step::StepLoop;
use super::text::Progressed;
use crate::ipc::{EngineError, FinishReason, RequestId, Token, TokenLogprob};
use crate::tokenizer::Vocab;
use serde_bytes::ByteBuf;
use std::ops::Range;

impl StepLoop {
    /// Samples the next token of a sequence from the logits of the first of `rows`. The other rows
    /// are those of drafted tokens: sampling continues with each of them while the sampled token
    /// equals the drafted one.
    pub(super) fn sample(&mut self, key: SeqKey, rows: Range<usize>) {
        let drafted = rows.len() > 1;
        for (given, row) in rows.enumerate() {
            if given > 0 && !self.scheduler.accepts(key, given, &mut self.kv) {
                break;
            }
            self.sample_row(key, row);
        }
        if drafted {
            self.scheduler.roll_back(key, &mut self.kv);
        }
    }

    /// Samples one token of a sequence. At the end of a prompt the request's other choices are
    /// forked and sample from the same logits.
    fn sample_row(&mut self, key: SeqKey, row: usize) {
        let Some(index) = self.scheduler.running.iter().position(|s| s.key == key) else { return };
        let mut keys = vec![key];
        keys.extend(self.split(index));
        self.announce_prompt(key);
        let wants_raw = self.scheduler.running[index].facts.logprobs.is_some();
        let raw = wants_raw || keys.len() > 1;
        if raw && let Err(error) = self.copy_row(row) {
            return self.fail(key.request, EngineError::internal(error.to_string()));
        }
        for (turn, &key) in keys.iter().enumerate() {
            if let Err(error) = self.draw(key, row, raw && turn > 0) {
                return self.fail(key.request, error);
            }
        }
    }

    fn copy_row(&mut self, row: usize) -> Result<(), RunnerError> {
        self.row.clear();
        self.row.extend_from_slice(self.runner.logits(row)?);
        Ok(())
    }

    /// Forks the other choices of a request whose prompt has just been computed.
    fn split(&mut self, index: usize) -> Vec<SeqKey> {
        let siblings = std::mem::take(&mut self.scheduler.running[index].siblings);
        let mut keys = Vec::new();
        for choice in siblings {
            let leader = &self.scheduler.running[index];
            let facts = leader.facts.clone();
            let prompt = leader.tokens[..facts.prompt_len].to_vec();
            let mut sequence = Sequence::new(facts, prompt, choice, Vec::new());
            sequence.paused = leader.paused;
            keys.push(sequence.key);
            let pages = leader.pages.as_ref().expect("running sequences have pages");
            sequence.pages = self.kv.fork(pages, leader.computed);
            if sequence.pages.is_some() {
                sequence.computed = leader.computed;
                self.scheduler.running.push(sequence);
            } else {
                // No pages are left: the choice waits and computes the prompt again.
                self.scheduler.waiting.push(sequence);
            }
        }
        keys
    }

    /// Sends the prompt to the client if the request asks for `echo`.
    fn announce_prompt(&mut self, key: SeqKey) {
        let Some(sequence) = self.scheduler.sequence_mut(key) else { return };
        if !sequence.facts.echo || sequence.output_len() > 0 || key.choice > 0 {
            return;
        }
        let vocab = self.tokenizer.vocab();
        let bytes: Vec<u8> =
            sequence.tokens.iter().flat_map(|&token| vocab.piece(token)).copied().collect();
        let logprobs = std::mem::take(&mut sequence.prompt_logprobs);
        self.output.prompt(key.request, String::from_utf8_lossy(&bytes).into_owned(), logprobs);
    }

    fn draw(&mut self, key: SeqKey, row: usize, restore: bool) -> Result<(), EngineError> {
        let Some(sequence) = self.scheduler.sequence_mut(key) else { return Ok(()) };
        if let Some(error) = sequence.failed.take() {
            return Err(error);
        }
        if sequence.facts.max_tokens == 0 {
            self.finish(key, FinishReason::Length);
            return Ok(());
        }
        let logits =
            self.runner.logits(row).map_err(|error| EngineError::internal(error.to_string()))?;
        if restore {
            logits.copy_from_slice(&self.row);
        }
        let mask = match &mut sequence.grammar {
            Some(grammar) => {
                // The mask is ready, except for rows of drafted tokens.
                grammar::ready(grammar)?;
                grammar.mask()?
            }
            None => None,
        };
        let position = sequence.tokens.len() as u64;
        let token = sequence
            .sampler
            .sample(logits, mask, position, &mut self.scratch)
            .map_err(|error| EngineError::internal(error.to_string()))?;
        let row = match sequence.facts.rollout {
            Some(temperature) if temperature > 0.0 && temperature != 1.0 => {
                self.tempered.clear();
                self.tempered.extend(self.row.iter().map(|logit| logit / temperature));
                &self.tempered
            }
            _ => &self.row,
        };
        let logprob = sequence.facts.logprobs.map(|k| {
            let (chosen, top) = logprobs(row, token, k as usize, &mut self.scratch);
            describe(self.tokenizer.vocab(), token, Some(chosen), top)
        });
        self.accept(key, token, logprob)
    }

    /// Appends a token to its sequence and emits the text that it completes.
    fn accept(
        &mut self,
        key: SeqKey,
        token: Token,
        logprob: Option<TokenLogprob>,
    ) -> Result<(), EngineError> {
        let Some(sequence) = self.scheduler.sequence_mut(key) else { return Ok(()) };
        let vocab = self.tokenizer.vocab();
        let facts = sequence.facts.clone();
        sequence.tokens.push(token);
        sequence.sampler.accept(token);
        if let Some(speculation) = &mut sequence.speculation {
            speculation.observe(token);
        }
        if ends(vocab, &facts, token) {
            if facts.rollout.is_some() {
                sequence.held_logprobs.extend(logprob);
            }
            self.end_text(key, FinishReason::Stop);
            return Ok(());
        }
        if let Some(grammar) = &mut sequence.grammar {
            grammar.observe(token, vocab.piece(token))?;
        }
        sequence.held_logprobs.extend(logprob);
        let text = match sequence.text.push(vocab.output_piece(token, facts.render_special)) {
            Progressed::Text(text) => text,
            Progressed::Stopped { text, stop } => {
                let logprobs = release_logprobs(sequence, vocab);
                self.output.delta(key, text, logprobs);
                self.finish(key, FinishReason::StopString(stop));
                return Ok(());
            }
        };
        let logprobs = release_logprobs(sequence, vocab);
        self.output.delta(key, text, logprobs);
        if sequence.output_len() >= facts.max_tokens {
            self.end_text(key, FinishReason::Length);
        } else if sequence.grammar.as_ref().is_some_and(|grammar| grammar.is_finished()) {
            self.end_text(key, FinishReason::Stop);
        }
        Ok(())
    }

    /// Ends the text of an output: text that was held back is emitted.
    fn end_text(&mut self, key: SeqKey, reason: FinishReason) {
        let Some(sequence) = self.scheduler.sequence_mut(key) else { return };
        let (text, reason) = match sequence.text.finish() {
            Progressed::Text(text) => (text, reason),
            Progressed::Stopped { text, stop } => (text, FinishReason::StopString(stop)),
        };
        let logprobs = release_logprobs(sequence, self.tokenizer.vocab());
        if !text.is_empty() || !logprobs.is_empty() {
            self.output.tail(key, text, logprobs);
        }
        self.finish(key, reason);
    }

    /// Finishes a choice; its pages become free or cached.
    pub(super) fn finish(&mut self, key: SeqKey, reason: FinishReason) {
        let Some(sequence) = self.scheduler.take(key) else { return };
        self.output.finish(key, reason, sequence.output_len());
        if let Some(pages) = sequence.pages {
            self.kv.free_sequence(pages);
        }
    }

    /// Fails a request with an error.
    pub(super) fn fail(&mut self, request: RequestId, error: EngineError) {
        if self.drop_sequences(request) {
            self.output.failed(request, error);
        }
    }

    /// Frees all resources of a request. Returns false if it has none.
    pub(super) fn drop_sequences(&mut self, request: RequestId) -> bool {
        let removed = self.scheduler.remove(request);
        let any = !removed.is_empty();
        for sequence in removed {
            if let Some(pages) = sequence.pages {
                self.kv.free_sequence(pages);
            }
        }
        any
    }

    /// Computes logprobs of the prompt's own tokens from a chunk of rows that starts at `position`.
    pub(super) fn score_prompt(&mut self, key: SeqKey, rows: Range<usize>, position: usize) {
        let vocab = self.tokenizer.vocab();
        let Some(sequence) = self.scheduler.sequence_mut(key) else { return };
        let top = sequence.facts.logprobs.unwrap_or(0) as usize;
        if position == 0 {
            sequence.prompt_logprobs.clear();
            sequence.prompt_logprobs.push(describe(vocab, sequence.tokens[0], None, Vec::new()));
        }
        for (row, next) in rows.zip(position + 1..sequence.facts.prompt_len) {
            match self.runner.logits(row) {
                Ok(logits) => {
                    let token = sequence.tokens[next];
                    let (chosen, top) = logprobs(logits, token, top, &mut self.scratch);
                    sequence.prompt_logprobs.push(describe(vocab, token, Some(chosen), top));
                }
                Err(error) => sequence.failed = Some(EngineError::internal(error.to_string())),
            }
        }
    }
}

fn ends(vocab: &Vocab, facts: &RequestFacts, token: Token) -> bool {
    let end_of_text = vocab.ends_generation(token) && !facts.stop.ignore_eos;
    end_of_text || facts.stop.token_ids.contains(&token)
}

fn describe(
    vocab: &Vocab,
    token: Token,
    logprob: Option<f32>,
    top: Vec<(Token, f32)>,
) -> TokenLogprob {
    let bytes = |token| ByteBuf::from(vocab.piece(token));
    TokenLogprob {
        token,
        bytes: bytes(token),
        logprob,
        top: top.into_iter().map(|(token, logprob)| (token, bytes(token), logprob)).collect(),
    }
}

/// Removes and returns the logprobs of tokens whose text has been emitted completely.
fn release_logprobs(sequence: &mut Sequence, vocab: &Vocab) -> Vec<TokenLogprob> {
    let (mut end, mut held) = (sequence.held_logprobs.len(), sequence.text.held_len());
    while held > 0 && end > 0 {
        end -= 1;
        let token = sequence.held_logprobs[end].token;
        held = held.saturating_sub(vocab.output_piece(token, sequence.facts.render_special).len());
    }
    sequence.held_logprobs.drain(..end).collect()
}
