//! Prompt lookup: proposes the tokens that followed an earlier occurrence of the newest n-gram in
//! the prompt or output (Saxena, "Prompt Lookup Decoding", 2023; Yang et al., "Inference with
//! Reference", arXiv:2304.04487).
//!
//! The index is a table of positions by the hash of an n-gram, as in LZ4: the newest entry
//! overwrites an older one, and a hit is verified against the tokens themselves. Each token costs a
//! few writes, each lookup a few comparisons, and memory is bounded at any context length.

use crate::ipc::Token;

/// Lengths of the n-grams that are looked up, longest first.
const LENGTHS: std::ops::RangeInclusive<usize> = 2..=4;
/// Most tokens of a match that are compared: a longer match is no better.
pub(super) const LONGEST_MATCH: usize = 16;
/// Base-2 logarithm of the table's size. The table grows with the tokens, up to 1 MiB.
const TABLE_BITS: std::ops::RangeInclusive<u32> = 8..=18;
/// Table entries per n-gram; enough that few entries are overwritten.
const SPARSE: usize = 4;

/// An index over the tokens of one sequence, which must only grow between calls.
#[derive(Debug, Default)]
pub(super) struct NgramProposer {
    /// By hash: the position after the last occurrence of an n-gram; 0 if there is none.
    table: Vec<u32>,
    bits: u32,
    /// N-grams that end before this position are in the table.
    indexed: usize,
}

/// An earlier position that is preceded by the newest tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Match {
    /// Position of the token that followed the earlier occurrence.
    pub next: usize,
    /// Number of equal tokens before that position, at most [`LONGEST_MATCH`].
    pub length: usize,
}

impl NgramProposer {
    /// Finds the latest position in `tokens` that is preceded by the longest known n-gram at the
    /// end of `tokens` + `prefetch_next`. `tokens` must begin with the tokens of the previous call.
    pub(super) fn find(&mut self, tokens: &[Token], prefetch_next: &[Token]) -> Option<Match> {
        self.extend(tokens);
        let kept = tokens.len().saturating_sub(LONGEST_MATCH);
        let newest = [&tokens[kept..], prefetch_next].concat();
        LENGTHS.rev().filter(|&n| n <= newest.len()).find_map(|n| {
            let ngram = &newest[newest.len() - n..];
            let next = self.table[self.slot(ngram)] as usize;
            (next >= n && tokens[next - n..next] == *ngram)
                .then(|| Match { next, length: common_tail(&tokens[..next], &newest) })
        })
    }

    /// Indexes every n-gram that is followed by another token.
    fn extend(&mut self, tokens: &[Token]) {
        let wanted = (SPARSE * LENGTHS.count() * tokens.len()).next_power_of_two().ilog2();
        let bits = wanted.clamp(*TABLE_BITS.start(), *TABLE_BITS.end());
        if bits > self.bits {
            self.bits = bits;
            self.table = vec![0; 1 << bits];
            self.indexed = 0;
        }
        for end in self.indexed.max(*LENGTHS.start())..tokens.len() {
            for n in LENGTHS.filter(|&n| n <= end) {
                let slot = self.slot(&tokens[end - n..end]);
                // Contexts are far shorter than four billion tokens.
                self.table[slot] = end as u32;
            }
        }
        self.indexed = tokens.len();
    }

    fn slot(&self, ngram: &[Token]) -> usize {
        let mix = |hash: u64, &token: &Token| {
            (hash ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
        };
        let hash = ngram.iter().fold(ngram.len() as u64, mix);
        (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - self.bits)) as usize
    }
}

/// Fills a draft of the tokens after `tokens`, up to `most` tokens, with the tokens that follow
/// `found`. At the end of `tokens` copying continues from the draft itself, so that a loop of a few
/// tokens can be drafted at any length.
pub(super) fn copy(tokens: &[Token], found: Match, most: usize, draft: &mut Vec<Token>) {
    for at in (found.next..).take(most.saturating_sub(draft.len())) {
        let token = tokens.get(at).copied().unwrap_or_else(|| draft[at - tokens.len()]);
        draft.push(token);
    }
}

/// Number of equal tokens at the end of both slices, at most [`LONGEST_MATCH`].
fn common_tail(a: &[Token], b: &[Token]) -> usize {
    let pairs = a.iter().rev().zip(b.iter().rev()).take(LONGEST_MATCH);
    pairs.take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    /// The latest earlier position for the longest n-gram, found by exhaustive search.
    fn oracle(tokens: &[Token]) -> Option<Match> {
        let end = tokens.len();
        LENGTHS.rev().filter(|&n| n < end).find_map(|n| {
            let newest = &tokens[end - n..];
            let next = (n..end).rev().find(|&at| tokens[at - n..at] == *newest)?;
            Some(Match { next, length: common_tail(&tokens[..next], tokens) })
        })
    }

    /// Fixed seed: a run that passes once passes again.
    fn config() -> ProptestConfig {
        ProptestConfig {
            rng_seed: RngSeed::Fixed(1),
            failure_persistence: None,
            ..Default::default()
        }
    }

    proptest! {
        #![proptest_config(config())]
        #[test]
        fn what_is_found_is_there(
            tokens in prop::collection::vec(0..5 as Token, 1..300),
            start in 1..300usize,
        ) {
            let mut lookup = NgramProposer::default();
            for end in start.min(tokens.len())..=tokens.len() {
                let Some(found) = lookup.find(&tokens[..end], &[]) else { continue };
                prop_assert!(found.next < end && found.length >= 2);
                let length = common_tail(&tokens[..found.next], &tokens[..end]);
                prop_assert_eq!(found.length, length);
            }
        }
    }

    /// Some table entries are overwritten, so a few matches are missed.
    #[test]
    fn finds_what_trying_all_places_finds() {
        let mut state = 1u32;
        let tokens: Vec<Token> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) % 32
        })
        .take(5000)
        .collect();
        let mut lookup = NgramProposer::default();
        let (mut same, mut asked) = (0, 0);
        for end in (10..tokens.len()).step_by(7) {
            let best = oracle(&tokens[..end]);
            asked += usize::from(best.is_some());
            same += usize::from(best.is_some() && lookup.find(&tokens[..end], &[]) == best);
        }
        println!("{same} of {asked}");
        assert!(asked > 400 && same * 5 >= asked * 4, "{same} of {asked}");
    }

    #[test]
    fn a_loop_is_drafted_for_as_long_as_wanted() {
        let tokens = [9, 1, 2, 3, 1, 2, 3, 1];
        let found = NgramProposer::default().find(&tokens, &[]).unwrap();
        assert_eq!(found, Match { next: 5, length: 4 });
        let mut draft = Vec::new();
        copy(&tokens, found, 7, &mut draft);
        assert_eq!(draft, [2, 3, 1, 2, 3, 1, 2]);
        // The draft begins with two given tokens.
        let mut draft = vec![2, 3];
        let found = NgramProposer::default().find(&tokens, &draft).unwrap();
        assert_eq!(found, Match { next: 7, length: 6 });
        copy(&tokens, found, 5, &mut draft);
        assert_eq!(draft, [2, 3, 1, 2, 3]);
    }

    #[test]
    fn nothing_is_found_where_nothing_repeats() {
        let mut lookup = NgramProposer::default();
        for end in 0..2000 {
            let tokens: Vec<_> = (0..end as Token).collect();
            if end % 100 == 0 {
                assert_eq!(lookup.find(&tokens, &[]), None);
            }
        }
    }

    /// A lookup happens in every step: its time must not depend on the context length.
    #[test]
    fn a_token_costs_the_same_at_any_length() {
        let tokens: Vec<_> = (0..200_000).map(|at: u32| at.wrapping_mul(at) % 5003).collect();
        let mut lookup = NgramProposer::default();
        lookup.find(&tokens[..190_000], &[]);
        let started = std::time::Instant::now();
        for end in 190_000..200_000 {
            std::hint::black_box(lookup.find(&tokens[..end], &[]));
        }
        let each = started.elapsed() / 10_000;
        println!("find: {each:?}");
        assert!(each < std::time::Duration::from_micros(20), "{each:?}");
        assert_eq!(lookup.table.len(), 1 << TABLE_BITS.end());
    }
}
