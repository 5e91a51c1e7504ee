//! What a draft model has of one sequence, and how its drafts for it have fared.

use crate::engine::kv::SequencePages;
use crate::ipc::Token;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Weight of the newest token: for a sequence, and for all together.
const ALPHA: f32 = 0.125;
const ALPHA_OF_ALL: f32 = 0.02;
/// Where nothing is drafted, nothing is learned: with every step the estimate goes so much of the
/// way back to certainty, until it is worth another try.
const FORGET: f32 = 0.001;
/// Until something is known.
const NEXT: f32 = 0.7;
/// Drafted tokens by their probability in the draft model, and how many are assumed to stand.
const CLASSES: [(f32, f32); 5] = [(0.0, 0.15), (0.25, 0.4), (0.5, 0.65), (0.8, 0.87), (0.95, 0.97)];

/// How likely a draft model's tokens are to stand: decaying means.
#[derive(Debug, Clone, Copy)]
pub struct Trust {
    /// The next one, before it is known.
    next: f32,
    by_confidence: [f32; CLASSES.len()],
}

impl Default for Trust {
    fn default() -> Self {
        Self { next: NEXT, by_confidence: CLASSES.map(|(_, rate)| rate) }
    }
}

impl Trust {
    /// Probability that the token that the draft model would come up with next stands.
    pub fn next(&self) -> f32 {
        self.next
    }

    /// Probability that a token stands which has the probability `confidence` in the draft model.
    pub fn rate(&self, confidence: f32) -> f32 {
        self.by_confidence[class(confidence)]
    }

    fn observe(&mut self, confidence: f32, stood: bool, alpha: f32) {
        let stood = f32::from(u8::from(stood));
        let rate = &mut self.by_confidence[class(confidence)];
        *rate += alpha * (stood - *rate);
        self.next += alpha * (stood - self.next);
    }

    /// A step has gone by without a draft.
    pub fn forget(&mut self) {
        self.next += FORGET * (1.0 - self.next);
    }
}

fn class(confidence: f32) -> usize {
    CLASSES.iter().rposition(|&(least, _)| confidence >= least).unwrap_or(0)
}

/// Where the pages of those go who leave: their cache takes them back when it is next at hand.
pub type Left = Rc<RefCell<Vec<SequencePages>>>;

/// A sequence's place in a draft model. Its pages go back when it is dropped.
#[derive(Debug)]
pub struct Seat {
    /// `None` until the draft model reads the sequence, and after it had to make room.
    pub(super) pages: Option<SequencePages>,
    left: Left,
    /// Tokens of the sequence that the draft model has computed.
    pub(super) computed: usize,
    /// Drafted tokens that it has computed after them.
    pub(super) ahead: Vec<Token>,
    pub(super) trust: Trust,
    everyone: Rc<Cell<Trust>>,
}

impl Seat {
    pub(super) fn new(left: &Left, everyone: &Rc<Cell<Trust>>) -> Self {
        Self {
            pages: None,
            left: left.clone(),
            computed: 0,
            ahead: Vec::new(),
            trust: everyone.get(),
            everyone: everyone.clone(),
        }
    }

    /// A drafted token has been found to stand, or not.
    pub(super) fn observe(&mut self, confidence: f32, stood: bool) {
        self.trust.observe(confidence, stood, ALPHA);
        let mut all = self.everyone.get();
        all.observe(confidence, stood, ALPHA_OF_ALL);
        self.everyone.set(all);
    }

    /// Gives its pages back.
    pub(super) fn leave(&mut self) {
        self.left.borrow_mut().extend(self.pages.take());
        self.computed = 0;
        self.ahead.clear();
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_follows_what_is_seen_and_comes_back() {
        let everyone = Rc::new(Cell::new(Trust::default()));
        let mut seat = Seat::new(&Left::default(), &everyone);
        for turn in 0..200 {
            seat.observe(0.97, true);
            seat.observe(0.3, turn % 4 == 0);
        }
        assert!(seat.trust.rate(0.99) > 0.98 && seat.trust.rate(0.26) < 0.5);
        assert!((0.4..0.8).contains(&seat.trust.next()), "{}", seat.trust.next());
        assert_eq!(seat.trust.rate(0.6), CLASSES[2].1);
        (0..200).for_each(|_| seat.observe(0.97, false));
        assert!(seat.trust.next() < 0.01);
        // A new sequence begins with what the others have seen.
        assert!(Seat::new(&Left::default(), &everyone).trust.next() < 0.1);
        (0..1000).for_each(|_| seat.trust.forget());
        assert!(seat.trust.next() > 0.5);
    }
}
