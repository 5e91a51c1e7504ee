//! A draft model's state for one sequence, and the acceptance statistics of its drafts.

use crate::engine::kv::SequencePages;
use crate::ipc::Token;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Weight of the newest token, for the sequence's statistics and for those of all sequences.
const ALPHA: f32 = 0.125;
const ALPHA_OF_ALL: f32 = 0.02;
/// Without drafts there are no observations. Each step without a draft moves the estimate this
/// fraction towards 1, until another draft is tried.
const FORGET: f32 = 0.001;
/// Initial acceptance rate of the next token.
const NEXT: f32 = 0.7;
/// Classes of drafted tokens: lower bound of the probability in the draft model, and the acceptance
/// rate initially assumed.
const CLASSES: [(f32, f32); 5] = [(0.0, 0.15), (0.25, 0.4), (0.5, 0.65), (0.8, 0.87), (0.95, 0.97)];

/// Acceptance rates of a draft model's tokens: decaying means.
#[derive(Debug, Clone, Copy)]
pub(super) struct AcceptanceRate {
    /// Rate of the next token, before its probability is known.
    next: f32,
    by_confidence: [f32; CLASSES.len()],
}

impl Default for AcceptanceRate {
    fn default() -> Self {
        Self { next: NEXT, by_confidence: CLASSES.map(|(_, rate)| rate) }
    }
}

impl AcceptanceRate {
    /// Probability that the next token of the draft model will be accepted.
    pub(super) fn next(&self) -> f32 {
        self.next
    }

    /// Acceptance probability of a token that has probability `confidence` in the draft model.
    pub(super) fn rate(&self, confidence: f32) -> f32 {
        self.by_confidence[class(confidence)]
    }

    fn observe(&mut self, confidence: f32, stood: bool, alpha: f32) {
        let stood = f32::from(u8::from(stood));
        let rate = &mut self.by_confidence[class(confidence)];
        *rate += alpha * (stood - *rate);
        self.next += alpha * (stood - self.next);
    }

    /// Records a step without a draft.
    pub(super) fn forget(&mut self) {
        self.next += FORGET * (1.0 - self.next);
    }
}

fn class(confidence: f32) -> usize {
    CLASSES.iter().rposition(|&(least, _)| confidence >= least).unwrap_or(0)
}

/// Pages of removed sequences. The draft model's cache frees them at its next use.
pub(super) type Left = Rc<RefCell<Vec<SequencePages>>>;

/// A sequence's state in a draft model. Dropping it releases its pages.
#[derive(Debug)]
pub(super) struct DraftState {
    /// `None` until the draft model prefills the sequence, and after the pages have been released.
    pub(super) pages: Option<SequencePages>,
    left: Left,
    /// Tokens of the sequence that the draft model has computed.
    pub(super) computed: usize,
    /// Drafted tokens that the draft model has computed after them.
    pub(super) prefetch_next: Vec<Token>,
    pub(super) trust: AcceptanceRate,
    everyone: Rc<Cell<AcceptanceRate>>,
}

impl DraftState {
    pub(super) fn new(left: &Left, everyone: &Rc<Cell<AcceptanceRate>>) -> Self {
        Self {
            pages: None,
            left: left.clone(),
            computed: 0,
            prefetch_next: Vec::new(),
            trust: everyone.get(),
            everyone: everyone.clone(),
        }
    }

    /// Records whether a drafted token was accepted.
    pub(super) fn observe(&mut self, confidence: f32, stood: bool) {
        self.trust.observe(confidence, stood, ALPHA);
        let mut all = self.everyone.get();
        all.observe(confidence, stood, ALPHA_OF_ALL);
        self.everyone.set(all);
    }

    /// Releases the pages.
    pub(super) fn leave(&mut self) {
        self.left.borrow_mut().extend(self.pages.take());
        self.computed = 0;
        self.prefetch_next.clear();
    }
}

impl Drop for DraftState {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_follows_what_is_seen_and_comes_back() {
        let everyone = Rc::new(Cell::new(AcceptanceRate::default()));
        let mut seat = DraftState::new(&Left::default(), &everyone);
        for turn in 0..200 {
            seat.observe(0.97, true);
            seat.observe(0.3, turn % 4 == 0);
        }
        assert!(seat.trust.rate(0.99) > 0.98 && seat.trust.rate(0.26) < 0.5);
        assert!((0.4..0.8).contains(&seat.trust.next()), "{}", seat.trust.next());
        assert_eq!(seat.trust.rate(0.6), CLASSES[2].1);
        (0..200).for_each(|_| seat.observe(0.97, false));
        assert!(seat.trust.next() < 0.01);
        // A new sequence starts with the statistics of all sequences.
        assert!(DraftState::new(&Left::default(), &everyone).trust.next() < 0.1);
        (0..1000).for_each(|_| seat.trust.forget());
        assert!(seat.trust.next() > 0.5);
    }
}
