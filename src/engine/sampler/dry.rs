//! DRY ("don't repeat yourself"): a penalty that grows exponentially with the length of the
//! sequence that a token would repeat.
//!
//! Ported from `llama_sampler_dry` in llama.cpp's `src/llama-sampler.cpp`, itself ported from
//! koboldcpp#982 (pi6am) and the original of p-e-w (text-generation-webui#5677).

use crate::ipc::{SamplingParams, Token};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Longest breaker text that is used, in bytes (llama.cpp's `MAX_CHAR_LEN`).
pub const MAX_BREAKER_BYTES: usize = 40;
/// Longest tail of a breaker, in tokens (llama.cpp's `MAX_SEQ_LEN`).
pub const MAX_BREAKER_TOKENS: usize = 20;

/// All token sequences that can contain or overlap the text `breaker`: a first token that contains
/// it or ends with its beginning, followed by the tokens of the remaining text.
///
/// `pieces` yields every token of the vocabulary with its bytes, special tokens with their text;
/// `tokenize` must neither add nor parse special tokens. The function scans the whole vocabulary:
/// cache the result per breaker. Corresponds to llama.cpp's `get_overlapping_token_sequences`.
pub fn overlapping_sequences<'a>(
    breaker: &str,
    pieces: impl Iterator<Item = (Token, &'a [u8])>,
    tokenize: &dyn Fn(&str) -> Vec<Token>,
) -> Vec<Vec<Token>> {
    let mut end = breaker.len().min(MAX_BREAKER_BYTES);
    while !breaker.is_char_boundary(end) {
        end -= 1;
    }
    let text = &breaker.as_bytes()[..end];
    let mut found = Vec::new();
    if text.is_empty() {
        return found;
    }
    // A tail starts where its head ends. A split inside a character has no tokenization.
    let tails: Vec<Option<Vec<Token>>> = (0..text.len())
        .map(|at| breaker[..end].get(at..).map(tokenize))
        .map(|tail| {
            tail.map(|mut t| {
                t.truncate(MAX_BREAKER_TOKENS);
                t
            })
        })
        .collect();
    for (token, piece) in pieces {
        if piece.windows(text.len()).any(|w| w == text) {
            found.push(vec![token]);
            continue;
        }
        let longest = piece.len().min(text.len() - 1);
        for overlap in 1..=longest {
            if piece[piece.len() - overlap..] == text[..overlap]
                && let Some(tail) = tails[overlap].as_ref().filter(|tail| !tail.is_empty())
            {
                found.push(std::iter::once(token).chain(tail.iter().copied()).collect());
            }
        }
    }
    found
}

/// Buffers that [`Dry::apply`] reuses between calls.
#[derive(Debug, Default)]
pub(super) struct DryScratch {
    repeats: Vec<u32>,
    longest: HashMap<Token, u32>,
}

/// The DRY penalty of one sequence.
#[derive(Debug, Clone)]
pub(super) struct Dry {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    last_n: usize,
    /// Tails of breakers by their first token. Shared with copies of the sampler.
    breakers: Arc<HashMap<Token, Vec<Vec<Token>>>>,
    /// Tokens that are a breaker by themselves: never penalized.
    single: Arc<HashSet<Token>>,
}

impl Dry {
    /// Returns `None` if the parameters disable DRY. `breakers` maps a breaker's text to the token
    /// sequences that represent it, head first (see [`overlapping_sequences`]).
    pub(super) fn new(
        params: &SamplingParams,
        breakers: &dyn Fn(&str) -> Vec<Vec<Token>>,
    ) -> Option<Self> {
        let on = params.dry_multiplier != 0.0
            && params.dry_multiplier.is_finite()
            && params.dry_base.is_finite()
            && params.dry_base >= 1.0
            && params.dry_penalty_last_n > 0;
        if !on {
            return None;
        }
        let mut tails: HashMap<Token, Vec<Vec<Token>>> = HashMap::new();
        let mut single = HashSet::new();
        for text in params.dry_sequence_breakers.iter().filter(|text| !text.is_empty()) {
            for sequence in breakers(text) {
                let Some((&head, tail)) = sequence.split_first() else { continue };
                let tail = &tail[..tail.len().min(MAX_BREAKER_TOKENS)];
                if tail.is_empty() {
                    single.insert(head);
                }
                tails.entry(head).or_default().push(tail.to_vec());
            }
        }
        Some(Self {
            multiplier: params.dry_multiplier,
            base: params.dry_base,
            allowed_length: params.dry_allowed_length as usize,
            last_n: params.dry_penalty_last_n as usize,
            breakers: Arc::new(tails),
            single: Arc::new(single),
        })
    }

    /// Number of history tokens that [`apply`](Self::apply) examines.
    pub(super) fn lookback(&self) -> usize {
        self.last_n
    }

    /// Lowers the logits of tokens that would continue a repetition. `history` is prompt and
    /// output, oldest token first. Linear in `dry_penalty_last_n`.
    pub(super) fn apply(&self, logits: &mut [f32], history: &[Token], scratch: &mut DryScratch) {
        let recent = &history[history.len().saturating_sub(self.last_n)..];
        if recent.len() <= self.allowed_length {
            return;
        }
        let limit = self.limit(recent);
        if limit < self.allowed_length {
            return;
        }
        suffix_repeats(recent, limit, &mut scratch.repeats);
        scratch.longest.clear();
        // The `repeats[k]` tokens that end k tokens back equal the newest ones: the token after
        // them, k - 1 back, would continue the repetition.
        for k in 1..recent.len() {
            let length = scratch.repeats[k];
            if length as usize >= self.allowed_length {
                let next = recent[recent.len() - k];
                let longest = scratch.longest.entry(next).or_insert(0);
                *longest = (*longest).max(length);
            }
        }
        // The largest exponent that cannot overflow an f32; 88.72 is ln(f32::MAX).
        let ceiling = match self.base {
            base if base > 1.000_001 => (88.722_84 / base.ln()) as u32,
            _ => u32::MAX,
        };
        for (&token, &length) in &scratch.longest {
            if self.single.contains(&token) {
                continue;
            }
            if let Some(logit) = logits.get_mut(token as usize) {
                let exponent = (length - self.allowed_length as u32).min(ceiling);
                *logit -= self.multiplier * self.base.powf(exponent as f32);
            }
        }
    }

    /// Number of tokens since the newest breaker: a repetition does not extend across a breaker.
    fn limit(&self, recent: &[Token]) -> usize {
        for back in 0..recent.len() {
            let at = recent.len() - 1 - back;
            let Some(tails) = self.breakers.get(&recent[at]) else { continue };
            let after = &recent[at + 1..];
            let longest = tails.iter().filter(|t| after.starts_with(t)).map(Vec::len).max();
            if let Some(length) = longest {
                return back - length;
            }
        }
        recent.len()
    }
}

/// For each `k >= 1`: the number of equal tokens, counted backwards, at the end of `recent` and `k`
/// tokens before it, at most `limit`. The Z-algorithm on the reversed history: linear time.
fn suffix_repeats(recent: &[Token], limit: usize, repeats: &mut Vec<u32>) {
    let n = recent.len();
    let back = |i: usize| recent[n - 1 - i];
    repeats.clear();
    repeats.resize(n, 0);
    // The rightmost interval found so far, [left, right), equals the beginning.
    let (mut left, mut right) = (0, 0);
    for k in 1..n {
        let known = if k < right { (repeats[k - left] as usize).min(right - k) } else { 0 };
        let mut length = known;
        if k + known >= right {
            while k + length < n && back(length) == back(k + length) {
                length += 1;
            }
        }
        if k + length > right {
            (left, right) = (k, k + length);
        }
        repeats[k] = length as u32;
    }
    for length in repeats.iter_mut() {
        *length = (*length).min(limit as u32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(recent: &[Token], limit: usize) -> Vec<u32> {
        let n = recent.len();
        (0..n)
            .map(|k| match k {
                0 => 0,
                _ => (0..n - k)
                    .take_while(|i| recent[n - 1 - i] == recent[n - 1 - i - k])
                    .count()
                    .min(limit) as u32,
            })
            .collect()
    }

    proptest! {
        #[test]
        fn repeats_equal_the_naive_count(
            recent in prop::collection::vec(0u32..3, 1..80),
            limit in 0usize..80,
        ) {
            let mut fast = Vec::new();
            suffix_repeats(&recent, limit, &mut fast);
            prop_assert_eq!(fast, naive(&recent, limit));
        }
    }

    #[test]
    fn the_example_of_llama_cpp() {
        // a b c c b c y a b c: the last three tokens also occur seven tokens back.
        let recent = [0, 1, 2, 2, 1, 2, 9, 0, 1, 2];
        let mut repeats = Vec::new();
        suffix_repeats(&recent, recent.len(), &mut repeats);
        assert_eq!(repeats[1..], [0, 0, 0, 2, 0, 1, 3, 0, 0]);
    }

    fn dry(breakers: Vec<Vec<Token>>) -> Dry {
        let params = SamplingParams {
            dry_multiplier: 1.0,
            dry_base: 2.0,
            dry_allowed_length: 2,
            dry_sequence_breakers: vec!["x".into()],
            ..SamplingParams::default()
        };
        Dry::new(&params, &|_| breakers.clone()).expect("switched on")
    }

    #[test]
    fn penalizes_the_continuation_and_stops_at_breakers() {
        let history = [0, 1, 2, 2, 1, 2, 9, 0, 1, 2];
        let run = |dry: &Dry| {
            let mut logits = vec![0f32; 10];
            dry.apply(&mut logits, &history, &mut DryScratch::default());
            logits
        };
        // Token 2 would extend a repetition of three tokens to four, token 9 one of two tokens to
        // three.
        let free = run(&dry(vec![]));
        assert_eq!((free[2], free[9], free[1]), (-2.0, -1.0, 0.0));
        // A breaker after the last 0 leaves two tokens.
        let cut = run(&dry(vec![vec![0]]));
        assert_eq!((cut[2], cut[9]), (-1.0, -1.0));
        // A breaker of two tokens leaves one: too short.
        assert_eq!(run(&dry(vec![vec![0, 1]])), vec![0f32; 10]);
        // A breaker token is never penalized.
        assert_eq!(run(&dry(vec![vec![9]]))[9], 0.0);
    }

    #[test]
    fn finds_breakers_across_tokens() {
        let vocab: [&[u8]; 6] = [b"\n", b"a\n", b"x", b"say ab", b"c", b"zabcz"];
        let pieces = || vocab.iter().enumerate().map(|(i, &p)| (i as Token, p));
        let tokenize = |text: &str| if text == "c" { vec![4] } else { vec![2; 30] };
        assert_eq!(overlapping_sequences("\n", pieces(), &tokenize), [vec![0], vec![1]]);
        let abc = overlapping_sequences("abc", pieces(), &tokenize);
        assert_eq!(abc, [vec![3, 4], vec![5]]);
        assert!(overlapping_sequences("", pieces(), &tokenize).is_empty());
    }
}
