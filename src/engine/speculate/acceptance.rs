//! Estimates the probability that a drafted token is accepted.

use super::ngram::LONGEST_MATCH;

/// Weight of the newest observation.
const ALPHA: f32 = 0.125;
/// Match lengths (lower bounds) and the acceptance rate initially assumed for each class. A short
/// match may be accidental; a long copied passage is likely to continue.
const CLASSES: [(usize, f32); 5] = [(2, 0.3), (3, 0.45), (4, 0.6), (8, 0.8), (LONGEST_MATCH, 0.9)];

/// Acceptance rates of one sequence, by the length of the match that a draft continues: decaying
/// means over all proposed tokens, whether they were computed or not.
#[derive(Debug)]
pub(super) struct Acceptance {
    rates: [f32; CLASSES.len()],
}

impl Default for Acceptance {
    fn default() -> Self {
        Self { rates: CLASSES.map(|(_, rate)| rate) }
    }
}

impl Acceptance {
    /// Probability that the token proposed after a match of `length` tokens is accepted.
    pub(super) fn rate(&self, length: usize) -> f32 {
        self.rates[class(length)]
    }

    pub(super) fn observe(&mut self, length: usize, stood: bool) {
        let rate = &mut self.rates[class(length)];
        *rate += ALPHA * (f32::from(u8::from(stood)) - *rate);
    }
}

fn class(length: usize) -> usize {
    CLASSES.iter().rposition(|&(least, _)| length >= least).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_what_is_seen() {
        let mut acceptance = Acceptance::default();
        assert!(acceptance.rate(16) > acceptance.rate(2));
        for turn in 0..100 {
            acceptance.observe(2, turn % 4 == 0);
            acceptance.observe(20, false);
        }
        assert!((0.15..0.35).contains(&acceptance.rate(2)), "{}", acceptance.rate(2));
        assert!(acceptance.rate(17) < 0.01);
        assert_eq!(acceptance.rate(5), 0.6);
    }
}
