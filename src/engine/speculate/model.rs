//! A draft model: a smaller model with the same vocabulary that predicts the served model's next
//! tokens (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318).
//!
//! Its logits are sampled like the served model's, with the same random numbers for (seed,
//! position), so the two models agree as often as their distributions do, at any temperature. All
//! sequences are drafted for together, one pass per token; a sequence drops out when its next token
//! is not worth its share of a pass and its row in the step.
//!
//! The draft model has its own cache, with prefixes shared as in the served model's. A sequence is
//! prefilled, some tokens per step, once it is expected to run long enough to repay that.

use super::Speculation;
use super::draft_state::{AcceptanceRate, DraftState, Left};
use crate::engine::cost::{CostModel, Pace};
use crate::engine::kv::{CacheKey, KvCacheManager};
use crate::engine::runner::{Batch, BatchSequence, ModelRunner, RunnerError, Wants};
use crate::engine::sampler::{Sampler, Scratch, logprobs};
use crate::ipc::Token;
use crate::tokenizer::Tokenizer;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most rows that a sequence needs if it was drafted for in the previous step: its new token, and
/// the last token of a fully accepted draft.
const FRESH: usize = 2;
/// After a step without a draft model pass, a pass must be worth this many times its cost.
const RELUCTANCE: f32 = 1.25;

pub(crate) struct DraftModel {
    runner: Box<dyn ModelRunner>,
    tokenizer: Arc<dyn Tokenizer>,
    kv: KvCacheManager,
    cost: CostModel,
    everyone: Rc<Cell<AcceptanceRate>>,
    left: Left,
    /// Size of the served model's vocabulary.
    vocab: usize,
    /// Drafting was worthwhile in the last step.
    drafting: bool,
    /// A pass has failed; the draft model is not used any more.
    failed: bool,
    batch: Batch,
    scratch: Scratch,
    row: Vec<f32>,
}

/// A decoding sequence that may be drafted for.
pub(crate) struct DraftRequest<'a> {
    pub tokens: &'a [Token],
    /// The tenant that may share its prefix.
    pub tenant: u64,
    pub sampler: &'a Sampler,
    /// Its proposal for this step has already been made.
    pub speculation: &'a mut Speculation,
    /// Most tokens of its draft.
    pub most: usize,
    /// Expected number of tokens still to be generated.
    pub horizon: usize,
    pub ignores_eos: bool,
}

/// A sequence in a draft model pass.
struct Turn<'a> {
    of: DraftRequest<'a>,
    /// A copy of the sequence's sampler that has accepted the draft.
    sampler: Option<Sampler>,
    /// Rows needed before a token can be sampled, and rows computed in this pass.
    behind: usize,
    rows: usize,
    /// Probability that its draft so far is accepted.
    chance: f32,
    /// Expected number of tokens gained by drafting another one.
    worth: f32,
}

impl DraftModel {
    /// `vocab` is the number of tokens of the served model.
    pub(crate) fn new(runner: Box<dyn ModelRunner>, vocab: usize) -> Self {
        let info = runner.info();
        let mut cost = CostModel::new(Duration::ZERO, usize::MAX, Duration::ZERO);
        cost.observe(1, 0, 0, Duration::from_secs_f32(info.step_seconds.max(0.0)));
        Self {
            kv: KvCacheManager::new(
                info.kv_pages,
                runner.slots(),
                runner.slots_hold_pages(),
                info.shares_prefixes,
            ),
            tokenizer: runner.tokenizer(),
            cost,
            everyone: Rc::default(),
            left: Left::default(),
            vocab,
            drafting: false,
            failed: false,
            batch: Batch::default(),
            scratch: Scratch::default(),
            row: Vec::new(),
            runner,
        }
    }

    /// Drafts at most `spare` tokens while that raises the step's tokens per second, or up to the
    /// limits if there is no `pace`. Prefills at most `spare` tokens of sequences that are new to
    /// the draft model. Returns the seconds that the passes took.
    pub(crate) fn draft(
        &mut self,
        draftees: Vec<DraftRequest>,
        mut pace: Option<Pace>,
        spare: usize,
    ) -> f32 {
        self.take_back();
        let (mut seconds, mut left) = (0.0, spare);
        let mut turns = match self.failed {
            false => self.begin(draftees, pace, spare),
            true => Vec::new(),
        };
        self.drafting = !turns.is_empty();
        while !turns.is_empty() {
            if let Err(error) = self.pass(&mut turns) {
                tracing::error!("the draft model failed, and is not asked again: {error}");
                self.failed = true;
                break;
            }
            let took = self.cost.decoding(turns.len());
            seconds += if turns.is_empty() { 0.0 } else { took.seconds };
            left = left.saturating_sub(turns.len());
            for turn in &mut turns {
                let trust = turn.seat().trust;
                if let Some(pace) = &mut pace {
                    pace.add(turn.chance, took.seconds / took.tokens + pace.row);
                }
                (turn.worth, turn.behind, turn.rows) = (turn.chance * trust.next(), 1, 1);
            }
            turns.retain(|turn| turn.of.speculation.begun().len() < turn.of.most);
            self.keep_worthy(&mut turns, pace, 1.0);
            turns.truncate(left);
        }
        seconds
    }

    /// Frees the pages of sequences that have finished.
    fn take_back(&mut self) {
        for pages in self.left.borrow_mut().drain(..) {
            self.kv.free_sequence(pages);
        }
    }

    /// The sequences of the first pass.
    fn begin<'a>(
        &mut self,
        draftees: Vec<DraftRequest<'a>>,
        pace: Option<Pace>,
        spare: usize,
    ) -> Vec<Turn<'a>> {
        let mut turns: Vec<_> = draftees.into_iter().filter_map(|of| self.turn(of)).collect();
        self.keep_worthy(&mut turns, pace, if self.drafting { 1.0 } else { RELUCTANCE });
        if turns.is_empty() {
            let mut all = self.everyone.get();
            all.forget();
            self.everyone.set(all);
        }
        turns.iter_mut().for_each(|turn| turn.behind = self.behind(&mut turn.of));
        turns.sort_by_key(|turn| turn.behind);
        turns.truncate(spare);
        let (together, mut readable) = (turns.len(), spare);
        turns.retain_mut(|turn| {
            turn.rows = turn.behind;
            if turn.behind > FRESH {
                turn.rows = turn.behind.min(readable);
                let pays = pace.is_none_or(|pace| self.pays_to_read(turn, pace, together));
                if !pays || turn.rows == 0 {
                    return false;
                }
                readable -= turn.rows;
            }
            self.seat(&mut turn.of)
        });
        if turns.iter().all(|turn| turn.behind <= FRESH) {
            self.keep_worthy(&mut turns, pace, 1.0);
        }
        turns
    }

    /// `None` if a likelier draft is already known, or nothing may be drafted.
    fn turn<'a>(&self, of: DraftRequest<'a>) -> Option<Turn<'a>> {
        let begun = of.speculation.begun().len();
        let chance = of.speculation.chances().take(begun).last().unwrap_or(1.0);
        let (left, everyone) = (&self.left, &self.everyone);
        let seat = of.speculation.seat.get_or_insert_with(|| DraftState::new(left, everyone));
        seat.trust.forget();
        let worth = chance * (seat.trust.next() - of.speculation.copied_chance());
        let may = worth > 0.0 && begun < of.most;
        may.then(|| Turn { of, sampler: None, behind: 0, rows: 0, chance, worth })
    }

    /// Rows that a sequence needs before a token can be sampled for it.
    fn behind(&mut self, of: &mut DraftRequest) -> usize {
        let key = share(of);
        let all = of.tokens.len() + of.speculation.begun().len();
        let seat = of.speculation.seat.as_mut().expect("it has a turn");
        let known = match seat.pages {
            Some(_) => self.settle(seat, of.tokens),
            None => self.kv.prefix_match(key, of.tokens).cached,
        };
        all - known
    }

    /// Checks which of the drafted tokens in the cache were sampled and rolls the others back.
    /// Returns the number of valid tokens, which excludes the last one, because its logits are
    /// needed.
    fn settle(&mut self, seat: &mut DraftState, tokens: &[Token]) -> usize {
        let Some(pages) = &mut seat.pages else { return 0 };
        let (computed, last) = (seat.computed + seat.prefetch_next.len(), tokens.len() - 1);
        let came = seat.prefetch_next.iter().zip(&tokens[seat.computed..]);
        let came = came.take_while(|(drafted, token)| drafted == token).count();
        seat.computed = (seat.computed + came).min(last);
        seat.prefetch_next.clear();
        self.kv.commit(pages, &tokens[..seat.computed]);
        if seat.computed < computed {
            self.kv.roll_back(pages, seat.computed);
        }
        seat.computed
    }

    /// Keeps the sequences whose next token raises the tokens per second; keeps none if that does
    /// not repay the pass.
    fn keep_worthy(&self, turns: &mut Vec<Turn>, pace: Option<Pace>, reluctance: f32) {
        let Some(pace) = pace else { return };
        turns.sort_by(|a, b| b.worth.total_cmp(&a.worth));
        let row = self.cost.decoding(1).row + pace.row;
        turns.truncate(turns.partition_point(|turn| pace.gains(turn.worth, row)));
        let tokens: f32 = turns.iter().map(|turn| turn.worth).sum();
        let seconds = self.cost.decoding(turns.len()).seconds + pace.row * turns.len() as f32;
        if !pace.gains(tokens, seconds * reluctance) {
            turns.clear();
        }
    }

    /// Whether a sequence is expected to repay the time of its prefill, when `turns` sequences are
    /// drafted for together.
    fn pays_to_read(&self, turn: &Turn, pace: Pace, turns: usize) -> bool {
        let pass = self.cost.decoding(turns).seconds / turns as f32;
        let saved = turn.worth * pace.seconds / pace.tokens - pass - pace.row;
        let steps = turn.of.horizon as f32 / (1.0 + turn.worth);
        saved * steps > turn.behind as f32 * self.cost.prefill()
    }

    /// Allocates pages for the tokens to be prefilled. Returns false if there are not enough, or if
    /// the draft model does not know a token.
    fn seat(&mut self, of: &mut DraftRequest) -> bool {
        let (key, known) = (share(of), self.runner.info().vocab_size);
        if of.speculation.begun().iter().any(|&token| token >= known) {
            return false;
        }
        let seat = of.speculation.seat.as_mut().expect("it has a turn");
        if of.tokens[seat.computed..].iter().any(|&token| token >= known) {
            return false;
        }
        if seat.pages.is_none()
            && let Some(admission) = self.kv.admit(key, of.tokens, true)
        {
            seat.computed = admission.cached;
            seat.pages = Some(admission.pages);
        }
        seat.pages.is_some()
    }

    /// Computes the rows of all sequences, and samples a token for those without missing rows; only
    /// these remain in `turns`.
    fn pass(&mut self, turns: &mut Vec<Turn>) -> Result<(), RunnerError> {
        let started = Instant::now();
        self.batch.clear();
        turns.retain_mut(|turn| self.fill(turn));
        self.kv.apply_changes(&mut *self.runner);
        if turns.is_empty() {
            return Ok(());
        }
        self.runner.step(&self.batch)?;
        let ends: Vec<_> = self.batch.sequences.iter().map(|sequence| sequence.rows.end).collect();
        let (mut fresh, mut read, mut at) = (0, 0, 0);
        turns.retain_mut(|turn| {
            *(if turn.behind > FRESH { &mut read } else { &mut fresh }) += turn.rows;
            self.commit(turn);
            at += 1;
            turn.rows == turn.behind && self.draw(turn, ends[at - 1] - 1)
        });
        self.cost.observe(fresh, 0, read, started.elapsed());
        Ok(())
    }

    /// Adds a sequence's rows to the batch. Returns false if there are no pages for them.
    fn fill(&mut self, turn: &mut Turn) -> bool {
        let (behind, rows) = (turn.behind, turn.rows);
        assert!(rows > 0, "the last token is never known already");
        let DraftRequest { tokens, speculation, .. } = &mut turn.of;
        let end = tokens.len() + speculation.begun().len() - behind + rows;
        let begun = speculation.begun().to_vec();
        let seat = speculation.seat.as_mut().expect("it has a turn");
        let Some(pages) = &mut seat.pages else { return false };
        if !self.kv.grow(pages, end) {
            // The pages that this sequence holds may suffice for another one.
            seat.leave();
            self.take_back();
            return false;
        }
        let start = self.batch.tokens.len();
        let all = tokens.iter().chain(&begun).copied();
        self.batch.tokens.extend(all.skip(end - rows).take(rows));
        self.batch.sequences.push(BatchSequence {
            slot: pages.slot,
            rows: start..start + rows,
            position: end - rows,
            wants: if rows == behind { Wants::LastLogits } else { Wants::Nothing },
            pages: pages.page_ids().collect(),
            adapter: None,
        });
        true
    }

    /// Records that a sequence's rows have been computed.
    fn commit(&mut self, turn: &mut Turn) {
        let DraftRequest { tokens, speculation, .. } = &mut turn.of;
        let end = tokens.len() + speculation.begun().len() - turn.behind + turn.rows;
        let prefetch_next = speculation.begun()[..end.saturating_sub(tokens.len())].to_vec();
        let seat = speculation.seat.as_mut().expect("it has a turn");
        seat.computed = end - prefetch_next.len();
        seat.prefetch_next = prefetch_next;
        if let Some(pages) = &mut seat.pages {
            self.kv.commit(pages, &tokens[..seat.computed]);
        }
    }

    /// Samples as the served model would at this position from the draft model's logits. Returns
    /// false if the draft ends here.
    fn draw(&mut self, turn: &mut Turn, row: usize) -> bool {
        let Ok(logits) = self.runner.logits(row) else { return false };
        let known = logits.len().min(self.vocab);
        let logits = &mut logits[..known];
        self.row.clear();
        self.row.extend_from_slice(logits);
        let position = (turn.of.tokens.len() + turn.of.speculation.begun().len()) as u64;
        let sampler = turn
            .sampler
            .get_or_insert_with(|| prefetch_next(turn.of.sampler, turn.of.speculation.begun()));
        let drawn = sampler.sample(logits, None, position, &mut self.scratch);
        // No token can follow an end-of-generation token.
        let vocab = self.tokenizer.vocab();
        let goes_on = |token: &Token| turn.of.ignores_eos || !vocab.ends_generation(*token);
        let Some(token) = drawn.ok().filter(goes_on) else { return false };
        let confidence = logprobs(&self.row, token, 0, &mut self.scratch).0.exp();
        sampler.accept(token);
        turn.of.speculation.push(token, confidence);
        turn.chance *= turn.seat().trust.rate(confidence);
        true
    }
}

impl Turn<'_> {
    fn seat(&self) -> &DraftState {
        self.of.speculation.seat.as_ref().expect("it has a turn")
    }
}

/// The cache key of a sequence. It has no adapter: adapters change the served model, not the draft
/// model.
fn share(of: &DraftRequest) -> CacheKey {
    CacheKey { adapter: [0; 32], tenant: of.tenant }
}

/// A copy of `sampler` that has accepted `tokens`.
fn prefetch_next(sampler: &Sampler, tokens: &[Token]) -> Sampler {
    let mut sampler = sampler.clone();
    tokens.iter().for_each(|&token| sampler.accept(token));
    sampler
}

#[cfg(test)]
impl DraftModel {
    /// Pages held by sequences, after the pages of finished sequences have been freed.
    pub(crate) fn held_pages(&mut self) -> usize {
        self.take_back();
        self.kv.held_pages()
    }

    /// Free pages after every cached page has been evicted.
    pub(crate) fn free_pages(&mut self) -> usize {
        while self.kv.evict_one() {}
        self.kv.free_pages()
    }
}
