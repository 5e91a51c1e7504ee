//! How many tokens are drafted.
//!
//! A drafted row is worth computing while it raises the tokens per second that the decoding
//! sequences get: while `chance / row > tokens / step`, the chance being the sequence's own estimate
//! that the row's token stands, and the seconds measured. One stream on a machine that waits for its
//! memory can afford long shots; in a full batch a row costs as much as it could gain, and nothing
//! is drafted.
//!
//! Drafts take what is left: of the step's tokens when everyone has had their rows, and of the pages
//! when everyone has what they need. After the step they give their pages back, so nobody is ever
//! put back for one.

use super::{Plan, Scheduler};
use crate::engine::grammar::TriggeredGrammar;
use crate::engine::kv::KvCache;
use crate::engine::sequence::{SeqKey, Sequence};
use crate::ipc::Speculate;

/// After a step without, a draft must be so many times worth its rows.
const RELUCTANCE: f32 = 1.25;

impl Scheduler {
    /// Gives rows to drafts, at most `budget`.
    pub(super) fn draft(&mut self, plan: &mut Plan, kv: &mut KvCache, budget: usize) {
        if self.limits.speculate == Speculate::Off || plan.decoding == 0 {
            return;
        }
        let mut chances = self.propose(plan);
        if chances.is_empty() {
            return;
        }
        // Stable: a draft's tokens stay in their order.
        chances.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        let count = match self.limits.speculate {
            Speculate::Auto => self.worth_computing(plan.decoding, &chances),
            Speculate::Always | Speculate::Off => chances.len(),
        };
        for &(_, at) in &chances[..count.min(budget)] {
            plan.work[at].drafted += 1;
        }
        for work in plan.work.iter_mut().filter(|work| work.drafted > 0) {
            work.drafted = with_room(&mut self.running[work.index], work.drafted, kv);
            self.drafts += u64::from(work.drafted > 0);
            self.drafted_tokens += work.drafted as u64;
        }
    }

    /// Lets everyone who decodes draft. For each drafted token the chance that it stands, and its
    /// place in the plan.
    fn propose(&mut self, plan: &Plan) -> Vec<(f32, usize)> {
        let mut chances = Vec::new();
        for (at, work) in plan.work.iter().enumerate() {
            let sequence = &mut self.running[work.index];
            let (decoding, most) = (sequence.is_decoding(), sequence.draft_limit());
            if let Some(speculation) = sequence.speculation.as_mut().filter(|_| decoding) {
                let forced = sequence.grammar.as_mut().map(TriggeredGrammar::forced);
                speculation.propose(&sequence.tokens, &forced.unwrap_or_default(), most);
                chances.extend(speculation.chances().map(|chance| (chance, at)));
            }
        }
        chances
    }

    /// How many of the rows, likeliest first, raise the tokens per second of a step.
    fn worth_computing(&mut self, decoding: usize, chances: &[(f32, usize)]) -> usize {
        let (mut seconds, row) = self.cost.decoding(decoding);
        let mut tokens = decoding as f32;
        let reluctance = if self.drafting { 1.0 } else { RELUCTANCE };
        let gains = |&&(chance, _): &&(f32, usize)| {
            let gains = chance * seconds > row * tokens * reluctance;
            seconds += row;
            tokens += chance;
            gains
        };
        let count = chances.iter().take_while(gains).count();
        self.drafting = count > 0;
        count
    }

    /// A sequence has been given so many tokens in this step. Whether the newest is as drafted, so
    /// that the row after it stands, and others may share it.
    pub fn stands(&mut self, key: SeqKey, given: usize, kv: &mut KvCache) -> bool {
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
        true
    }

    /// Takes back the rows of a sequence's draft that did not stand.
    pub fn roll_back(&mut self, key: SeqKey, kv: &mut KvCache) {
        let Some(sequence) = self.running.iter_mut().find(|s| s.key == key) else { return };
        if let Some(pages) = &mut sequence.pages {
            kv.roll_back(pages, sequence.computed);
        }
    }
}

/// How much of a draft there are pages for. Cached pages may go for it: its sequence would take
/// them a few tokens later.
fn with_room(sequence: &mut Sequence, drafted: usize, kv: &mut KvCache) -> usize {
    let length = sequence.tokens.len();
    let Some(pages) = &mut sequence.pages else { return 0 };
    if pages.capacity() < length + drafted {
        kv.grow(pages, length + drafted);
    }
    drafted.min(pages.capacity().saturating_sub(length))
}
