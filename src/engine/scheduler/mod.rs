//! Decides which sequences get rows in the next step.
//!
//! Decoding sequences come first, then chunks of prefill under a token budget, then drafts that are
//! worth their cost (`drafts`). `queue` decides which waiting sequences enter.
//!
//! When the cache is full, the sequence that ranks lowest is preempted and computed again later. If
//! the runner cannot mix adapters in a batch, the adapters' groups take turns.

mod drafts;
mod fair;
mod queue;
#[cfg(test)]
mod tests;

use super::cost::CostModel;
use super::kv::KvCacheManager;
use super::runner::{MAX_PROMPT_LOGITS, Wants};
use super::sequence::{SeqKey, Sequence};
use super::speculate::Speculation;
use crate::ipc::{AdapterId, RequestId, Speculate};
use fair::FairShares;
use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long one adapter's group uses the runner while other groups wait.
const QUANTUM: Duration = Duration::from_millis(250);

#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub max_sequences: usize,
    pub batch_tokens: usize,
    pub target_step: Duration,
    /// Measured duration of a one-row step at model load.
    pub first_step: Duration,
    pub queue_limit: usize,
    pub mixes_adapters: bool,
    pub speculate: Speculate,
}

/// One sequence's rows in the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ScheduledSequence {
    /// Index into [`Scheduler::running`].
    pub index: usize,
    pub rows: usize,
    pub wants: Wants,
    /// The next token is sampled from the last row's logits.
    pub samples: bool,
    /// Further rows, of the sequence's drafted tokens.
    pub drafted: usize,
}

/// The next step.
#[derive(Debug, Default)]
pub(super) struct SchedulerOutput {
    pub work: Vec<ScheduledSequence>,
    pub adapter: Option<AdapterId>,
    /// Sequences that got their pages for this step, with the number of cached tokens.
    pub admitted: Vec<(RequestId, usize)>,
    pub decoding: usize,
    pub prefill: usize,
    /// Rows of the token budget that are left for drafts.
    pub spare: usize,
}

pub(super) struct Scheduler {
    limits: Limits,
    pub waiting: Vec<Sequence>,
    pub running: Vec<Sequence>,
    shares: FairShares,
    cost: CostModel,
    /// The last drafts were worth their rows.
    drafting: bool,
    /// The group whose turn it is, the start of its turn, and the last turn of each group.
    group: Option<AdapterId>,
    group_since: Instant,
    last_turn: BTreeMap<Option<AdapterId>, u64>,
    turns: u64,
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache, and tokens found.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    /// Drafts computed, tokens in them, and accepted tokens.
    pub drafts: u64,
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
    /// The drafted and accepted tokens that came from the draft model.
    pub draft_model_tokens: u64,
    pub draft_model_accepted: u64,
}

impl Scheduler {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiting: Vec::new(),
            running: Vec::new(),
            shares: FairShares::default(),
            cost: CostModel::new(limits.target_step, limits.batch_tokens, limits.first_step),
            drafting: false,
            group: None,
            group_since: Instant::now(),
            last_turn: BTreeMap::new(),
            turns: 0,
            preemptions: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            drafts: 0,
            drafted_tokens: 0,
            accepted_tokens: 0,
            draft_model_tokens: 0,
            draft_model_accepted: 0,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() >= self.limits.queue_limit
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub(super) fn push(&mut self, sequence: Sequence) {
        let active = self.waiting.iter().chain(&self.running).map(|other| other.facts.fair_key);
        self.shares.arrive(sequence.facts.fair_key, active);
        self.waiting.push(sequence);
    }

    /// The plan of the next step, without drafts; empty if no sequence can run.
    pub(super) fn schedule(&mut self, kv: &mut KvCacheManager) -> SchedulerOutput {
        let mut plan = SchedulerOutput::default();
        self.admit(kv, &mut plan);
        self.grow(kv);
        self.take_turns();
        plan.adapter = self.group;
        let order = self.order();
        let decoding = order.iter().filter(|&&index| self.running[index].is_decoding()).count();
        let mut budget = self.cost.budget(decoding);
        let mut prompt_logits = MAX_PROMPT_LOGITS;
        for index in order {
            let sequence = &self.running[index];
            let all = sequence.wants_prompt_logits();
            let limit = if all { budget.min(prompt_logits) } else { budget };
            let rows = sequence.todo().min(limit);
            if rows == 0 {
                continue;
            }
            budget -= rows;
            let samples = rows == sequence.todo();
            let wants = match (all, samples) {
                (true, _) => {
                    prompt_logits -= rows;
                    Wants::AllLogits
                }
                (false, true) => Wants::LastLogits,
                (false, false) => Wants::Nothing,
            };
            if sequence.is_decoding() {
                plan.decoding += 1;
            } else {
                plan.prefill += rows;
            }
            plan.work.push(ScheduledSequence { index, rows, wants, samples, drafted: 0 });
        }
        plan.spare = budget;
        // Keeps the rows of one adapter together. Also, llama.cpp's streams compute neighbouring
        // slots in one graph, and other slots one after the other.
        plan.work.sort_by_key(|work| {
            let sequence = &self.running[work.index];
            (sequence.facts.adapter, sequence.pages.as_ref().map(|pages| pages.slot))
        });
        plan
    }

    /// Records the duration of a step, and charges the keys of its sequences.
    pub(super) fn observe(&mut self, plan: &SchedulerOutput, took: Duration) {
        let drafted = plan.work.iter().map(|work| work.drafted).sum();
        self.cost.observe(plan.decoding, drafted, plan.prefill, took);
        for work in &plan.work {
            let sequence = &self.running[work.index];
            let output = usize::from(sequence.is_decoding());
            self.shares.charge(sequence.facts.fair_key, work.rows - output, output);
        }
    }

    /// Expected seconds of the step.
    pub(super) fn expected(&self, plan: &SchedulerOutput) -> f32 {
        self.cost.expected(plan.decoding, plan.prefill)
    }

    /// Rows of an input to be embedded or scored that are computed before the next step.
    pub(super) fn pooling_rows(&self) -> usize {
        let decoding = self.running.iter().filter(|s| s.is_runnable() && s.is_decoding()).count();
        self.cost.budget(decoding) - decoding
    }

    /// Expected seconds of `rows` rows of an input to be embedded or scored.
    pub(super) fn expected_pooling(&self, rows: usize) -> f32 {
        self.cost.expected(0, rows)
    }

    /// Records the duration of `rows` rows of an input to be embedded or scored.
    pub(super) fn observe_pooling(&mut self, rows: usize, took: Duration) {
        self.cost.observe(0, 0, rows, took);
    }

    /// Duration of the longest recent step in seconds, decayed.
    pub(super) fn longest_step(&self) -> f32 {
        self.cost.longest()
    }

    /// Removes and returns all sequences of a request. The caller frees their pages.
    pub(super) fn remove(&mut self, request: RequestId) -> Vec<Sequence> {
        let mine = |sequence: &mut Sequence| sequence.key.request == request;
        let mut removed: Vec<_> = self.running.extract_if(.., mine).collect();
        removed.extend(self.waiting.extract_if(.., mine));
        removed
    }

    pub(super) fn sequence_mut(&mut self, key: SeqKey) -> Option<&mut Sequence> {
        self.sequences_mut().find(|sequence| sequence.key == key)
    }

    /// Removes and returns one sequence. The caller frees its pages.
    pub(super) fn take(&mut self, key: SeqKey) -> Option<Sequence> {
        if let Some(at) = self.running.iter().position(|s| s.key == key) {
            return Some(self.running.remove(at));
        }
        let at = self.waiting.iter().position(|s| s.key == key)?;
        Some(self.waiting.remove(at))
    }

    /// All sequences, running and waiting.
    pub(super) fn sequences_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.running.iter_mut().chain(&mut self.waiting)
    }

    /// Number of sequences whose clients read slowly.
    pub(super) fn paused(&self) -> usize {
        self.running.iter().chain(&self.waiting).filter(|sequence| sequence.paused).count()
    }

    pub(super) fn uses_adapter(&self, adapter: AdapterId) -> bool {
        self.running.iter().chain(&self.waiting).any(|s| s.facts.adapter == Some(adapter))
    }

    /// Number of adapters that have requests but not the current turn.
    pub(super) fn adapters_waiting(&self) -> usize {
        let mut others: Vec<_> = self
            .running
            .iter()
            .chain(&self.waiting)
            .map(|sequence| sequence.facts.adapter)
            .filter(|&adapter| adapter.is_some() && adapter != self.group)
            .collect();
        others.sort_unstable();
        others.dedup();
        others.len()
    }

    /// Selects the adapter group whose turn it is.
    fn take_turns(&mut self) {
        if self.limits.mixes_adapters {
            return;
        }
        let mut groups: Vec<_> = self
            .running
            .iter()
            .filter(|sequence| sequence.is_runnable())
            .map(|sequence| sequence.facts.adapter)
            .collect();
        groups.sort_unstable();
        groups.dedup();
        let current_runs = groups.contains(&self.group);
        if groups.is_empty() || (current_runs && groups.len() == 1) {
            return;
        }
        if current_runs && self.group_since.elapsed() < QUANTUM {
            return;
        }
        let last = |group: &Option<AdapterId>| self.last_turn.get(group).copied().unwrap_or(0);
        let others = groups.iter().filter(|&&group| group != self.group || !current_runs);
        let Some(&next) = others.min_by_key(|group| last(group)) else { return };
        self.turns += 1;
        self.last_turn.insert(self.group, self.turns);
        self.last_turn.retain(|group, _| groups.contains(group));
        self.group = next;
        self.group_since = Instant::now();
    }

    /// Makes sure that every decoding sequence has a page for its next token; preempts other
    /// sequences if necessary.
    fn grow(&mut self, kv: &mut KvCacheManager) {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            let (length, stalled) = (sequence.tokens.len(), sequence.is_stalled());
            let grown = match &mut sequence.pages {
                Some(pages) if !stalled && pages.capacity() < length => kv.grow(pages, length),
                _ => true,
            };
            if grown {
                index += 1;
                continue;
            }
            let victim = self.victim();
            self.preempt(victim, kv);
            // Removing the victim shifted the indices after it down by one.
            index -= usize::from(victim < index);
        }
    }

    /// The sequence to preempt: one that waits for its client, otherwise the one with the lowest
    /// priority, then the latest arrival.
    fn victim(&self) -> usize {
        let place = |index: &usize| {
            let sequence = &self.running[*index];
            let facts = &sequence.facts;
            (sequence.is_stalled(), Reverse(facts.priority), facts.arrived, sequence.key)
        };
        (0..self.running.len()).max_by_key(place).expect("someone wanted a page")
    }

    /// Moves a sequence back into the waiting queue. When it is admitted again, only tokens whose
    /// pages were evicted meanwhile are recomputed.
    fn preempt(&mut self, index: usize, kv: &mut KvCacheManager) {
        let mut sequence = self.running.remove(index);
        if let Some(pages) = sequence.pages.take() {
            kv.free_sequence(pages);
        }
        sequence.computed = 0;
        sequence.speculation.iter_mut().for_each(Speculation::make_room);
        self.preemptions += 1;
        self.waiting.push(sequence);
    }

    /// Runnable sequences of the current group: decoding ones first, then by priority and age.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<_> = (0..self.running.len())
            .filter(|&index| {
                let sequence = &self.running[index];
                let turn = self.limits.mixes_adapters || sequence.facts.adapter == self.group;
                turn && sequence.is_runnable()
            })
            .collect();
        order.sort_by_key(|&index| {
            let sequence = &self.running[index];
            let facts = &sequence.facts;
            (!sequence.is_decoding(), Reverse(facts.priority), facts.arrived, sequence.key)
        });
        order
    }
}
