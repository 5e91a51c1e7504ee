//! Decides which waiting sequence is admitted next.
//!
//! Waiting requests are admitted by priority, then fairly between keys. Among the requests of one
//! key, those with the longest cached prefix come first, except that requests which have waited
//! long come before all others.

use super::{Scheduler, SchedulerOutput};
use crate::engine::kv::{KvCacheManager, PrefixMatch};
use crate::engine::runner::PAGE_TOKENS;
use crate::engine::sequence::{SeqKey, Sequence};
use std::cmp::Reverse;
use std::time::Duration;

/// A request at least this old comes before requests of its key with a longer cached prefix, and no
/// longer waits for a lower-priority request that is computing its prefix.
const OLD: Duration = Duration::from_secs(2);
/// A request at least this old waits for no other request's prefix.
const VERY_OLD: Duration = Duration::from_secs(60);
/// Requests whose cached prefix is looked up in one step.
const CANDIDATES: usize = 32;

impl Scheduler {
    /// Moves waiting sequences into the cache while there are slots and pages.
    pub(super) fn admit(&mut self, kv: &mut KvCacheManager, plan: &mut SchedulerOutput) {
        if self.waiting.is_empty() || (self.free_slots() == 0 && !self.any_stalled()) {
            return;
        }
        for key in self.candidates(kv) {
            let Some(at) = self.waiting.iter().position(|s| s.key == key) else { continue };
            // A running sequence is computing this prefix, possibly one admitted in this very loop.
            if prefix_match(&self.waiting[at], kv).pending > 0 && self.may_wait(&self.waiting[at]) {
                continue;
            }
            // A sequence that waits for a slow client is preempted: the wait has no known end.
            while !self.fits(&self.waiting[at], kv) {
                if !self.any_stalled() {
                    return;
                }
                self.preempt(self.victim(), kv);
            }
            let sequence = &self.waiting[at];
            let (reuse, facts) = (!sequence.wants_prompt_logits(), &sequence.facts);
            let Some(admission) = kv.admit(facts.cache_key, &sequence.tokens, reuse) else {
                return;
            };
            let mut sequence = self.waiting.remove(at);
            self.prefix_queries += sequence.tokens.len() as u64;
            self.prefix_hits += admission.cached as u64;
            plan.admitted.push((sequence.key.request, admission.cached));
            sequence.computed = admission.cached;
            sequence.pages = Some(admission.pages);
            self.running.push(sequence);
        }
    }

    /// Whether to wait for a prefix that is being computed. Computing a long prefix takes longer
    /// than `OLD`, and computing it a second time would take as long; but a prefill of lower
    /// priority may be starved itself.
    fn may_wait(&self, sequence: &Sequence) -> bool {
        let facts = &sequence.facts;
        let progresses = |other: &Sequence| {
            other.todo() > 1
                && other.facts.cache_key == facts.cache_key
                && other.facts.priority >= facts.priority
        };
        !is_old(sequence)
            || (facts.arrived.elapsed() < VERY_OLD && self.running.iter().any(progresses))
    }

    fn any_stalled(&self) -> bool {
        self.running.iter().any(Sequence::is_stalled)
    }

    fn free_slots(&self) -> usize {
        let taken: usize = self.running.iter().map(Sequence::slots).sum();
        self.limits.max_sequences.saturating_sub(taken)
    }

    /// Whether a sequence can be admitted while every running sequence can still grow by one page:
    /// an admission is not worth a preemption.
    fn fits(&self, sequence: &Sequence, kv: &KvCacheManager) -> bool {
        let shared = prefix_match(sequence, kv).held;
        let needed = (sequence.tokens.len() - shared).div_ceil(PAGE_TOKENS);
        let room = kv.total_pages() - kv.held_pages();
        let alone = self.running.is_empty();
        sequence.slots() <= self.free_slots() && (alone || needed + self.running.len() <= room)
    }

    /// Waiting sequences in the order of admission.
    fn candidates(&self, kv: &KvCacheManager) -> Vec<SeqKey> {
        let mut waiting: Vec<_> = self.waiting.iter().filter(|s| !s.is_stalled()).collect();
        waiting.sort_by_key(|sequence| (sequence.facts.arrived, sequence.key));
        self.take_fair_turns(&mut waiting);
        waiting.truncate(CANDIDATES);
        waiting.sort_by_cached_key(|sequence| {
            let old = is_old(sequence);
            let cached = if old { 0 } else { prefix_match(sequence, kv).cached };
            (!old, Reverse(cached), sequence.facts.arrived, sequence.key)
        });
        self.take_fair_turns(&mut waiting);
        waiting.into_iter().map(|sequence| sequence.key).collect()
    }

    /// Sorts by priority, then interleaves the keys fairly; requests of one key keep their order.
    fn take_fair_turns(&self, waiting: &mut Vec<&Sequence>) {
        waiting.sort_by_key(|sequence| Reverse(sequence.facts.priority));
        let requests = waiting.iter().map(|s| (s.facts.fair_key, s.tokens.len()));
        let places = self.shares.places(requests);
        let mut placed: Vec<_> = places.into_iter().zip(waiting.drain(..)).collect();
        placed.sort_by_key(|&(place, sequence)| (Reverse(sequence.facts.priority), place));
        waiting.extend(placed.into_iter().map(|(_, sequence)| sequence));
    }
}

fn is_old(sequence: &Sequence) -> bool {
    sequence.facts.arrived.elapsed() > OLD
}

/// The prefix match of a sequence in the cache.
fn prefix_match(sequence: &Sequence, kv: &KvCacheManager) -> PrefixMatch {
    if sequence.wants_prompt_logits() {
        return PrefixMatch::default();
    }
    kv.prefix_match(sequence.facts.cache_key, &sequence.tokens)
}
