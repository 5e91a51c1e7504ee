//! Speculation: tokens are drafted, computed in one step, and checked.
//!
//! A drafted token stands while it equals what is sampled from the row before it. Sampling draws
//! from an RNG keyed by (seed, position) and a row's numbers do not depend on the batch's shape, so
//! the output is the same to the bit with and without; a wrong draft costs time, nothing else.
//! (Leviathan et al., arXiv:2211.17192, accept by a ratio of probabilities instead, which keeps the
//! distribution, not the draw.)
//!
//! Drafts come from a grammar that leaves no choice, from what stood in prompt and output before, and
//! from a [`DraftModel`], where there is one and nothing likelier is known.
//! A sequence's [`Speculation`] proposes; the scheduler decides how much of it is worth computing;
//! the step loop samples row after row until one differs, and takes the rest back.

mod acceptance;
mod lookup;
mod model;
mod seat;

pub use model::{DraftModel, Draftee};

use crate::ipc::Token;
use acceptance::Acceptance;
use lookup::Lookup;
use seat::Seat;

/// Tokens drafted for a sequence in one step, at most. A longer draft gains little: every step pays
/// for its first token anyway.
pub const MAX_DRAFTED: usize = 16;

/// How likely a token is that a grammar forces: only where its text is cut into tokens otherwise
/// does another come.
const FORCED: f32 = 0.98;

/// What one sequence may go on with, and how its drafts have fared.
#[derive(Debug, Default)]
pub struct Speculation {
    lookup: Lookup,
    acceptance: Acceptance,
    /// `None` until a draft model has to do with it.
    seat: Option<Seat>,
    draft: Vec<Token>,
    /// The first tokens of the draft that the grammar forces.
    forced: usize,
    /// Where the others are the draft model's: the probability of each in it.
    confidence: Vec<f32>,
    /// Where they are copied: tokens before them that also stood before what they were copied from.
    matched: usize,
    /// Tokens of the draft that have come since.
    confirmed: usize,
}

impl Speculation {
    /// Drafts at most `most` tokens to come after `tokens`, which are those of the call before and
    /// more; those that a grammar forces come first. Takes about a microsecond.
    pub fn propose(&mut self, tokens: &[Token], forced: &[Token], most: usize) {
        self.confirmed = 0;
        self.forced = forced.len().min(most);
        self.confidence.clear();
        self.draft.clear();
        self.draft.extend_from_slice(&forced[..self.forced]);
        if let Some(found) = self.lookup.find(tokens, &self.draft) {
            self.matched = found.length;
            lookup::copy(tokens, found, most, &mut self.draft);
        }
    }

    /// How many of the draft's tokens have come, the first ones.
    pub fn confirmed(&self) -> usize {
        self.confirmed
    }

    pub fn draft(&self) -> &[Token] {
        &self.draft
    }

    /// For each token of the draft, how likely it is that it and all before it stand; falling.
    pub fn chances(&self) -> impl Iterator<Item = f32> {
        (0..self.draft.len()).scan(1.0, |all, at| {
            *all *= match (at.checked_sub(self.forced), &self.seat) {
                (None, _) => FORCED,
                (Some(at), Some(seat)) if self.is_modelled() => {
                    seat.trust.rate(self.confidence[at])
                }
                (Some(copied), _) => self.acceptance.rate(self.matched + copied),
            };
            Some(*all)
        })
    }

    fn is_modelled(&self) -> bool {
        !self.confidence.is_empty()
    }

    /// How many of the draft's first `count` tokens are the draft model's.
    pub fn modelled(&self, count: usize) -> usize {
        if self.is_modelled() { count.saturating_sub(self.forced) } else { 0 }
    }

    /// The tokens that a draft model goes on from: those that are forced, and its own.
    fn begun(&self) -> &[Token] {
        &self.draft[..self.forced + self.confidence.len()]
    }

    /// The draft model's next token, instead of what was copied.
    fn push(&mut self, token: Token, confidence: f32) {
        self.draft.truncate(self.forced + self.confidence.len());
        self.draft.push(token);
        self.confidence.push(confidence);
    }

    /// How likely the next token after the forced ones is, as far as it is known without a model.
    fn copied_chance(&self) -> f32 {
        let any = self.draft.len() > self.forced;
        if any { self.acceptance.rate(self.matched) } else { 0.0 }
    }

    /// The sequence has to wait: a draft model's pages are others' until it goes on.
    pub fn make_room(&mut self) {
        self.seat.iter_mut().for_each(Seat::leave);
    }

    /// A token has come. What it says of the draft is learned whether that was computed or not.
    pub fn observe(&mut self, token: Token) {
        let Some(&foreseen) = self.draft.get(self.confirmed) else { return };
        let stands = foreseen == token;
        let modelled = self.is_modelled();
        match (self.confirmed.checked_sub(self.forced), &mut self.seat) {
            (None, _) => {}
            (Some(at), Some(seat)) if modelled => seat.observe(self.confidence[at], stands),
            (Some(copied), _) => self.acceptance.observe(self.matched + copied, stands),
        }
        if stands {
            self.confirmed += 1;
        } else {
            self.draft.clear();
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod native;

#[cfg(test)]
#[path = "model_tests.rs"]
mod model_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_is_followed_until_it_is_wrong() {
        let mut speculation = Speculation::default();
        speculation.propose(&[1, 2, 3, 4, 5, 1, 2], &[], 3);
        assert_eq!(speculation.draft(), [3, 4, 5]);
        let chances: Vec<_> = speculation.chances().collect();
        assert!(chances.is_sorted_by(|a, b| a >= b) && chances.len() == 3);
        // What would have come after a wrong token says nothing.
        for (token, confirmed) in [(3, 1), (9, 1), (5, 1)] {
            speculation.observe(token);
            assert_eq!(speculation.confirmed(), confirmed);
        }
        speculation.propose(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 5], &[], 3);
        assert!(speculation.draft().is_empty());
        // What a grammar forces, and what came after that.
        speculation.propose(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 5], &[7, 2, 3], 5);
        assert_eq!(speculation.draft(), [7, 2, 3, 9, 5]);
        assert!(speculation.chances().nth(2).unwrap() > 0.9);
        speculation.propose(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 5], &[7, 2, 3], 2);
        assert_eq!(speculation.draft(), [7, 2]);
    }
}
