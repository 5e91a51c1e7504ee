//! Decides how many drafted tokens a step computes.
//!
//! A drafted row is worth computing while it raises the tokens per second of the decoding
//! sequences: while `chance / row > tokens / step`. `chance` is the sequence's own estimate that
//! the drafted token is accepted; `row` and `step` are measured seconds. With one sequence on a
//! machine limited by memory bandwidth, even unlikely drafts pay off; in a full batch a row costs
//! as much as it could gain, and nothing is drafted.
//!
//! Tokens that a grammar forces or that are copied by prompt lookup cost nothing to propose. A
//! draft model takes one pass per token, whose time is added to the row's seconds; it runs after
//! the other proposers, for sequences where it promises more.
//!
//! Drafts use only what is left over: of the step's token budget after every sequence has its rows,
//! and of the pages after every sequence has those it needs. Their pages are released after the
//! step, so no sequence is ever preempted for a draft.

use super::{Scheduler, SchedulerOutput};
use crate::engine::cost::Pace;
use crate::engine::grammar::TriggeredGrammar;
use crate::engine::kv::KvCacheManager;
use crate::engine::sequence::{SeqKey, Sequence};
use crate::engine::speculate::DraftModel;
use crate::ipc::Speculate;

/// After a step without drafts, a draft must be worth this many times the cost of its rows.
const RELUCTANCE: f32 = 1.25;

impl Scheduler {
    /// Gives rows to drafts, as far as the step has rows left.
    pub(crate) fn draft(
        &mut self,
        plan: &mut SchedulerOutput,
        kv: &mut KvCacheManager,
        model: Option<&mut DraftModel>,
    ) {
        if self.limits.speculate == Speculate::Off || plan.decoding == 0 {
            return;
        }
        self.propose(plan);
        let mut pace = self.cost.decoding(plan.decoding);
        if let Some(model) = model.filter(|_| plan.spare > 0) {
            pace.seconds += self.consult(model, plan, kv, pace);
        }
        let chances = self.chances(plan);
        if chances.is_empty() {
            return;
        }
        let count = match self.limits.speculate {
            Speculate::Auto => self.worth_computing(pace, &chances),
            Speculate::Always | Speculate::Off => chances.len(),
        };
        for &(_, at) in &chances[..count.min(plan.spare)] {
            plan.work[at].drafted += 1;
        }
        for work in plan.work.iter_mut().filter(|work| work.drafted > 0) {
            let sequence = &mut self.running[work.index];
            work.drafted = with_room(sequence, work.drafted, kv);
            self.drafts += u64::from(work.drafted > 0);
            self.drafted_tokens += work.drafted as u64;
            self.draft_model_tokens += sequence.modelled(work.drafted) as u64;
        }
    }

    /// Lets every decoding sequence propose the tokens that cost nothing: forced and copied ones.
    fn propose(&mut self, plan: &SchedulerOutput) {
        for work in &plan.work {
            let sequence = &mut self.running[work.index];
            let (decoding, most) = (sequence.is_decoding(), sequence.draft_limit());
            if let Some(speculation) = sequence.speculation.as_mut().filter(|_| decoding) {
                let forced = sequence.grammar.as_mut().map(TriggeredGrammar::forced);
                speculation.propose(&sequence.tokens, &forced.unwrap_or_default(), most);
            }
        }
    }

    /// Lets the draft model propose tokens if that raises the pace further. Returns the seconds
    /// that its passes take.
    fn consult(
        &mut self,
        model: &mut DraftModel,
        plan: &SchedulerOutput,
        kv: &KvCacheManager,
        mut pace: Pace,
    ) -> f32 {
        for (chance, _) in self.chances(plan) {
            if pace.gains(chance, pace.row) {
                pace.add(chance, pace.row);
            }
        }
        let mut planned = vec![false; self.running.len()];
        plan.work.iter().for_each(|work| planned[work.index] = true);
        let room = kv.free_pages() + kv.cached_pages() > 0;
        let draftees = self.running.iter_mut().zip(planned).filter_map(|(sequence, planned)| {
            let pages = sequence.pages.as_ref().filter(|_| planned && sequence.is_decoding())?;
            let fits = pages.capacity().saturating_sub(sequence.tokens.len());
            sequence.draftee(if room { plan.spare } else { plan.spare.min(fits) })
        });
        let draftees = draftees.collect();
        let pace = (self.limits.speculate == Speculate::Auto).then_some(pace);
        model.draft(draftees, pace, plan.spare)
    }

    /// For each drafted token, the probability that it is accepted and the index of its sequence in
    /// the plan; most probable first.
    fn chances(&self, plan: &SchedulerOutput) -> Vec<(f32, usize)> {
        let mut chances = Vec::new();
        for (at, work) in plan.work.iter().enumerate() {
            let sequence = &self.running[work.index];
            if let Some(speculation) =
                sequence.speculation.as_ref().filter(|_| sequence.is_decoding())
            {
                chances.extend(speculation.chances().map(|chance| (chance, at)));
            }
        }
        // The sort is stable: a draft's tokens keep their order.
        chances.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        chances
    }

    /// Number of rows, most probable first, that raise the tokens per second of a step.
    fn worth_computing(&mut self, mut pace: Pace, chances: &[(f32, usize)]) -> usize {
        let reluctance = if self.drafting { 1.0 } else { RELUCTANCE };
        let gains = |&&(chance, _): &&(f32, usize)| {
            let gains = pace.gains(chance, pace.row * reluctance);
            pace.add(chance, pace.row);
            gains
        };
        let count = chances.iter().take_while(gains).count();
        self.drafting = count > 0;
        count
    }

    /// Whether the newest of the `given` tokens of this step equals the drafted one. If so, the
    /// logits of the following row are valid and its page can be shared.
    pub(crate) fn accepts(&mut self, key: SeqKey, given: usize, kv: &mut KvCacheManager) -> bool {
        let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.key == key) else {
            return false;
        };
        let speculation = sequence.speculation.as_ref();
        if speculation.is_none_or(|speculation| speculation.confirmed() < given) {
            return false;
        }
        sequence.computed += 1;
        let pages = sequence.pages.as_mut().expect("running sequences have pages");
        kv.commit(pages, &sequence.tokens[..sequence.computed]);
        self.shares.charge(sequence.facts.fair_key, 0, 1);
        self.accepted_tokens += 1;
        self.draft_model_accepted +=
            (sequence.modelled(given) - sequence.modelled(given - 1)) as u64;
        true
    }

    /// Discards the rows of a sequence's draft that were rejected.
    pub(crate) fn roll_back(&mut self, key: SeqKey, kv: &mut KvCacheManager) {
        let Some(sequence) = self.running.iter_mut().find(|s| s.key == key) else { return };
        if let Some(pages) = &mut sequence.pages {
            kv.roll_back(pages, sequence.computed);
        }
    }
}

/// Number of drafted tokens that have pages. Cached pages may be evicted for a draft: its sequence
/// would need those pages a few tokens later anyway.
fn with_room(sequence: &mut Sequence, drafted: usize, kv: &mut KvCacheManager) -> usize {
    let length = sequence.tokens.len();
    let Some(pages) = &mut sequence.pages else { return 0 };
    if pages.capacity() < length + drafted {
        kv.grow(pages, length + drafted);
    }
    drafted.min(pages.capacity().saturating_sub(length))
}
