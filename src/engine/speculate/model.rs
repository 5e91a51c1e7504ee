//! A draft model: a smaller model of the same vocabulary, which says what the served one is likely
//! to go on with (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318).
//!
//! Its logits are sampled as the served model's will be, with the same numbers for (seed, position),
//! so that the two agree as often as their distributions do, at any temperature. All sequences that
//! it drafts for go through it together, a pass for each token, and a sequence falls out when the
//! next token is not worth its share of a pass and its row in the step.
//!
//! It has a cache of its own, with prefixes shared as in the served model's. A sequence is read when
//! it has gone on for long enough to be expected to make up for that, some tokens a step.

use super::Speculation;
use super::seat::{Left, Seat, Trust};
use crate::engine::cost::{CostModel, Pace};
use crate::engine::kv::{CacheKey, KvCache};
use crate::engine::runner::{Batch, BatchSequence, ModelRunner, RunnerError, Wants};
use crate::engine::sampler::{Sampler, Scratch, logprobs};
use crate::ipc::Token;
use crate::tokenizer::Tokenizer;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows that a sequence needs at most when it was drafted for in the step before: its new token, and
/// the last of a draft of which all stood.
const FRESH: usize = 2;
/// After a step without, a pass must be so many times worth its time.
const RELUCTANCE: f32 = 1.25;

pub struct DraftModel {
    runner: Box<dyn ModelRunner>,
    tokenizer: Arc<dyn Tokenizer>,
    kv: KvCache,
    cost: CostModel,
    everyone: Rc<Cell<Trust>>,
    left: Left,
    /// Tokens that the served model knows.
    vocab: usize,
    /// The last step was worth drafting for.
    drafting: bool,
    /// It failed once, and is left alone.
    failed: bool,
    batch: Batch,
    scratch: Scratch,
    row: Vec<f32>,
}

/// A sequence that decodes and may be drafted for.
pub struct Draftee<'a> {
    pub tokens: &'a [Token],
    /// Who may share its prefix.
    pub tenant: u64,
    pub sampler: &'a Sampler,
    /// Has proposed for this step.
    pub speculation: &'a mut Speculation,
    /// Tokens that its draft may have.
    pub most: usize,
    /// Tokens that it is expected to go on for.
    pub horizon: usize,
    pub ignores_eos: bool,
}

/// A draftee in a pass.
struct Turn<'a> {
    of: Draftee<'a>,
    /// The sequence's, with its draft taken in.
    sampler: Option<Sampler>,
    /// Rows that it needs to be given a token, and those that it gets in this pass.
    behind: usize,
    rows: usize,
    /// That its draft so far stands.
    chance: f32,
    /// Tokens that another one drafted is expected to give.
    worth: f32,
}

impl DraftModel {
    /// `vocab` is the number of tokens of the model that it drafts for.
    pub fn new(runner: Box<dyn ModelRunner>, vocab: usize) -> Self {
        let info = runner.info();
        let mut cost = CostModel::new(Duration::ZERO, usize::MAX, Duration::ZERO);
        cost.observe(1, 0, 0, Duration::from_secs_f32(info.step_seconds.max(0.0)));
        Self {
            kv: KvCache::new(
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

    /// Drafts, `spare` tokens at most, while it raises the step's tokens per second, or for as long
    /// as may be where no `pace` is given. Reads at most `spare` tokens of sequences that are new to
    /// it. Returns the seconds that the passes took from the step.
    pub fn draft(&mut self, draftees: Vec<Draftee>, mut pace: Option<Pace>, spare: usize) -> f32 {
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

    /// Pages of sequences that are over are free or cached from now on.
    fn take_back(&mut self) {
        for pages in self.left.borrow_mut().drain(..) {
            self.kv.retire(pages);
        }
    }

    /// Who is in the first pass.
    fn begin<'a>(
        &mut self,
        draftees: Vec<Draftee<'a>>,
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

    /// `None` where something likelier is known already, or nothing may be drafted.
    fn turn<'a>(&self, of: Draftee<'a>) -> Option<Turn<'a>> {
        let begun = of.speculation.begun().len();
        let chance = of.speculation.chances().take(begun).last().unwrap_or(1.0);
        let (left, everyone) = (&self.left, &self.everyone);
        let seat = of.speculation.seat.get_or_insert_with(|| Seat::new(left, everyone));
        seat.trust.forget();
        let worth = chance * (seat.trust.next() - of.speculation.copied_chance());
        let may = worth > 0.0 && begun < of.most;
        may.then(|| Turn { of, sampler: None, behind: 0, rows: 0, chance, worth })
    }

    /// Rows that a sequence needs to be given a token.
    fn behind(&mut self, of: &mut Draftee) -> usize {
        let key = share(of);
        let all = of.tokens.len() + of.speculation.begun().len();
        let seat = of.speculation.seat.as_mut().expect("it has a turn");
        let known = match seat.pages {
            Some(_) => self.settle(seat, of.tokens),
            None => self.kv.prospect(key, of.tokens).cached,
        };
        all - known
    }

    /// Sees which of the tokens that it has computed have come. How many it knows: not the last, whose
    /// logits are wanted.
    fn settle(&mut self, seat: &mut Seat, tokens: &[Token]) -> usize {
        let Some(pages) = &mut seat.pages else { return 0 };
        let (computed, last) = (seat.computed + seat.ahead.len(), tokens.len() - 1);
        let came = seat.ahead.iter().zip(&tokens[seat.computed..]);
        let came = came.take_while(|(drafted, token)| drafted == token).count();
        seat.computed = (seat.computed + came).min(last);
        seat.ahead.clear();
        self.kv.commit(pages, &tokens[..seat.computed]);
        if seat.computed < computed {
            self.kv.roll_back(pages, seat.computed);
        }
        seat.computed
    }

    /// Keeps those whose next token raises the tokens per second; nobody if that does not make up
    /// for the pass.
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

    /// Whether a sequence is expected to make up for the time that it takes to read it, when `turns`
    /// are drafted for together.
    fn pays_to_read(&self, turn: &Turn, pace: Pace, turns: usize) -> bool {
        let pass = self.cost.decoding(turns).seconds / turns as f32;
        let saved = turn.worth * pace.seconds / pace.tokens - pass - pace.row;
        let steps = turn.of.horizon as f32 / (1.0 + turn.worth);
        saved * steps > turn.behind as f32 * self.cost.prefill()
    }

    /// Finds pages for what is to be read. False when there are none, or where a token is not known.
    fn seat(&mut self, of: &mut Draftee) -> bool {
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

    /// Computes everyone's rows and draws a token for those who are up to date; they stay.
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

    /// Puts a sequence's rows into the batch. False if there are no pages for them.
    fn fill(&mut self, turn: &mut Turn) -> bool {
        let (behind, rows) = (turn.behind, turn.rows);
        assert!(rows > 0, "the last token is never known already");
        let Draftee { tokens, speculation, .. } = &mut turn.of;
        let end = tokens.len() + speculation.begun().len() - behind + rows;
        let begun = speculation.begun().to_vec();
        let seat = speculation.seat.as_mut().expect("it has a turn");
        let Some(pages) = &mut seat.pages else { return false };
        if !self.kv.grow(pages, end) {
            // What it has may be enough for another.
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

    /// A sequence's rows are computed.
    fn commit(&mut self, turn: &mut Turn) {
        let Draftee { tokens, speculation, .. } = &mut turn.of;
        let end = tokens.len() + speculation.begun().len() - turn.behind + turn.rows;
        let ahead = speculation.begun()[..end.saturating_sub(tokens.len())].to_vec();
        let seat = speculation.seat.as_mut().expect("it has a turn");
        seat.computed = end - ahead.len();
        seat.ahead = ahead;
        if let Some(pages) = &mut seat.pages {
            self.kv.commit(pages, &tokens[..seat.computed]);
        }
    }

    /// Draws what the served model would at this place, if its logits were these. False where that
    /// ends the draft.
    fn draw(&mut self, turn: &mut Turn, row: usize) -> bool {
        let Ok(logits) = self.runner.logits(row) else { return false };
        let known = logits.len().min(self.vocab);
        let logits = &mut logits[..known];
        self.row.clear();
        self.row.extend_from_slice(logits);
        let position = (turn.of.tokens.len() + turn.of.speculation.begun().len()) as u64;
        let sampler =
            turn.sampler.get_or_insert_with(|| ahead(turn.of.sampler, turn.of.speculation.begun()));
        let drawn = sampler.sample(logits, None, position, &mut self.scratch);
        // Nothing can be computed after the end.
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
    fn seat(&self) -> &Seat {
        self.of.speculation.seat.as_ref().expect("it has a turn")
    }
}

/// Adapters change what the served model says, not the draft model.
fn share(of: &Draftee) -> CacheKey {
    CacheKey { adapter: [0; 32], tenant: of.tenant }
}

/// A sampler that has taken in further tokens.
fn ahead(sampler: &Sampler, tokens: &[Token]) -> Sampler {
    let mut sampler = sampler.clone();
    tokens.iter().for_each(|&token| sampler.accept(token));
    sampler
}

#[cfg(test)]
impl DraftModel {
    /// Pages that sequences hold, when those who left have given theirs back.
    pub fn held_pages(&mut self) -> usize {
        self.take_back();
        self.kv.held_pages()
    }

    /// Pages that nobody holds when nothing is cached any more.
    pub fn free_pages(&mut self) -> usize {
        while self.kv.evict_one() {}
        self.kv.free_pages()
    }
}
