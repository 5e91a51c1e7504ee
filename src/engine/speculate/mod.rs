//! Speculative decoding: tokens are drafted, computed in one step, and verified.
//!
//! A drafted token is accepted while it equals the token sampled from the row before it. Sampling
//! uses an RNG keyed by (seed, position), and a row's numbers do not depend on the batch's shape,
//! so the output is bit-identical with and without speculation; a wrong draft costs only time.
//! (Leviathan et al., arXiv:2211.17192, accept by a ratio of probabilities instead, which preserves
//! the distribution but not the sampled tokens.)
//!
//! Drafts come from a grammar that allows only one token, from prompt lookup, and from a
//! [`DraftModel`] if there is one and no likelier draft is known. A sequence's [`Speculation`]
//! proposes tokens; the scheduler decides how many of them are worth computing; the step loop
//! samples row after row until a token differs, and rolls the remaining rows back.

mod acceptance;
mod draft_state;
mod model;
mod ngram;

pub(super) use model::{DraftModel, DraftRequest};

use crate::ipc::Token;
use acceptance::Acceptance;
use draft_state::DraftState;
use ngram::NgramProposer;

/// Most tokens drafted for a sequence in one step. Longer drafts gain little: every step pays for
/// its first token anyway.
pub(super) const MAX_DRAFTED: usize = 16;

/// Acceptance probability of a token that a grammar forces. It is rejected only if the model
/// tokenizes the same text differently.
const FORCED: f32 = 0.98;

/// The draft of one sequence, and the acceptance statistics of its earlier drafts.
#[derive(Debug, Default)]
pub(super) struct Speculation {
    lookup: NgramProposer,
    acceptance: Acceptance,
    /// `None` until a draft model is consulted for this sequence.
    seat: Option<DraftState>,
    draft: Vec<Token>,
    /// Number of first tokens of the draft that the grammar forces.
    forced: usize,
    /// If the remaining tokens are the draft model's: the probability that it gives each of them.
    confidence: Vec<f32>,
    /// If the remaining tokens are copied: the length of the match that they continue.
    matched: usize,
    /// Number of tokens of the draft that have been sampled since.
    confirmed: usize,
}

impl Speculation {
    /// Drafts at most `most` tokens to follow `tokens`, which must begin with the tokens of the
    /// previous call. Tokens that a grammar forces come first. Takes about a microsecond.
    pub(super) fn propose(&mut self, tokens: &[Token], forced: &[Token], most: usize) {
        self.confirmed = 0;
        self.forced = forced.len().min(most);
        self.confidence.clear();
        self.draft.clear();
        self.draft.extend_from_slice(&forced[..self.forced]);
        if let Some(found) = self.lookup.find(tokens, &self.draft) {
            self.matched = found.length;
            ngram::copy(tokens, found, most, &mut self.draft);
        }
    }

    /// Number of first tokens of the draft that have been confirmed by sampling.
    pub(super) fn confirmed(&self) -> usize {
        self.confirmed
    }

    pub(super) fn draft(&self) -> &[Token] {
        &self.draft
    }

    /// For each token of the draft, the probability that it and all tokens before it are accepted;
    /// decreasing.
    pub(super) fn chances(&self) -> impl Iterator<Item = f32> {
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

    /// Number of the draft model's tokens among the draft's first `count`.
    pub(super) fn modelled(&self, count: usize) -> usize {
        if self.is_modelled() { count.saturating_sub(self.forced) } else { 0 }
    }

    /// The tokens that the draft model continues: the forced ones and its own.
    fn begun(&self) -> &[Token] {
        &self.draft[..self.forced + self.confidence.len()]
    }

    /// Appends the draft model's next token; drops the copied tokens.
    fn push(&mut self, token: Token, confidence: f32) {
        self.draft.truncate(self.forced + self.confidence.len());
        self.draft.push(token);
        self.confidence.push(confidence);
    }

    /// Acceptance probability of the first token after the forced ones, as known without a draft
    /// model.
    fn copied_chance(&self) -> f32 {
        let any = self.draft.len() > self.forced;
        if any { self.acceptance.rate(self.matched) } else { 0.0 }
    }

    /// Releases the draft model's pages of this sequence. Called when the sequence must wait.
    pub(super) fn make_room(&mut self) {
        self.seat.iter_mut().for_each(DraftState::leave);
    }

    /// Updates the acceptance statistics with a sampled token, whether its draft was computed or
    /// not.
    pub(super) fn observe(&mut self, token: Token) {
        let Some(&foreseen) = self.draft.get(self.confirmed) else { return };
        let accepts = foreseen == token;
        let modelled = self.is_modelled();
        match (self.confirmed.checked_sub(self.forced), &mut self.seat) {
            (None, _) => {}
            (Some(at), Some(seat)) if modelled => seat.observe(self.confidence[at], accepts),
            (Some(copied), _) => self.acceptance.observe(self.matched + copied, accepts),
        }
        if accepts {
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
        // Tokens after a wrong one give no information.
        for (token, confirmed) in [(3, 1), (9, 1), (5, 1)] {
            speculation.observe(token);
            assert_eq!(speculation.confirmed(), confirmed);
        }
        speculation.propose(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 5], &[], 3);
        assert!(speculation.draft().is_empty());
        // Forced tokens first, then the tokens that followed them earlier.
        speculation.propose(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 5], &[7, 2, 3], 5);
        assert_eq!(speculation.draft(), [7, 2, 3, 9, 5]);
        assert!(speculation.chances().nth(2).unwrap() > 0.9);
        speculation.propose(&[1, 2, 3, 4, 5, 1, 2, 3, 9, 5], &[7, 2, 3], 2);
        assert_eq!(speculation.draft(), [7, 2]);
    }
}
