//! Similarity of two texts, from 0 to 1.
//!
//! | metric | definition |
//! |---|---|
//! | `fuzzy_match` | rapidfuzz's `fuzz.ratio` of the characters, over 100 |
//! | `bleu` | nltk's `sentence_bleu`: 1- to 4-grams of words between white space, smoothing method 2 (Lin and Och 2004, COLING: one is added to both counts of the 2- to 4-grams) |
//! | `gleu` | nltk's `sentence_gleu`, the same n-grams (Wu et al. 2016, arXiv:1609.08144) |
//! | `rouge_1` to `rouge_5`, `rouge_l` | the F1 of rouge_score without a stemmer: words of a-z and 0-9 in lower case (Lin 2004) |
//!
//! `scripts/grader_reference.py` writes the values of these libraries for `tests/grade/text.json`.
//! As in the libraries, a text of fewer than four words does not reach 1 by `bleu` even compared
//! with itself, nor does a text of fewer than n words by `rouge_n`.

use rapidfuzz::{distance::lcs_seq, fuzz};
use std::collections::HashMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metric {
    FuzzyMatch,
    Bleu,
    Gleu,
    /// ROUGE of n-grams.
    Rouge(usize),
    /// ROUGE of the longest common subsequence.
    RougeL,
}

impl Metric {
    pub(super) const ALL: &[(&str, Self)] = &[
        ("fuzzy_match", Self::FuzzyMatch),
        ("bleu", Self::Bleu),
        ("gleu", Self::Gleu),
        ("rouge_1", Self::Rouge(1)),
        ("rouge_2", Self::Rouge(2)),
        ("rouge_3", Self::Rouge(3)),
        ("rouge_4", Self::Rouge(4)),
        ("rouge_5", Self::Rouge(5)),
        ("rouge_l", Self::RougeL),
    ];

    /// The similarity. Subsequences take time proportional to the product of the lengths, over 64.
    pub(super) fn of(self, input: &str, reference: &str) -> f64 {
        match self {
            Self::FuzzyMatch => fuzz::ratio(input.chars(), reference.chars()),
            Self::Bleu => {
                let [input, reference] = numbered([words(input), words(reference)]);
                bleu(&input, &reference)
            }
            Self::Gleu => {
                let [input, reference] = numbered([words(input), words(reference)]);
                gleu(&input, &reference)
            }
            Self::Rouge(n) => {
                let [input, reference] = numbered([plain(input), plain(reference)]);
                let matches = Matches::of(&input, &reference, n);
                f1(matches.common, matches.input, matches.reference)
            }
            Self::RougeL => {
                let [input, reference] = numbered([plain(input), plain(reference)]);
                let common = lcs_seq::similarity(input.iter().copied(), reference.iter().copied());
                f1(common, input.len(), reference.len())
            }
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Splits a text into words as rouge_score does.
fn plain(text: &str) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()));
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Replaces each distinct word by a number, which is faster to compare.
fn numbered(texts: [Vec<String>; 2]) -> [Vec<u32>; 2] {
    let mut numbers = HashMap::new();
    texts.map(|words| {
        let number = |word| {
            let next = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
            *numbers.entry(word).or_insert(next)
        };
        words.into_iter().map(number).collect()
    })
}

/// Numbers of n-grams: those in both texts (each counted as often as in the text where it is
/// rarer), and those in each text.
struct Matches {
    common: usize,
    input: usize,
    reference: usize,
}

impl Matches {
    fn of(input: &[u32], reference: &[u32], n: usize) -> Self {
        let mut counts: HashMap<&[u32], usize> = HashMap::new();
        for gram in reference.windows(n) {
            *counts.entry(gram).or_default() += 1;
        }
        let mut common = 0;
        for gram in input.windows(n) {
            if let Some(left) = counts.get_mut(gram).filter(|left| **left > 0) {
                *left -= 1;
                common += 1;
            }
        }
        let grams = |text: &[u32]| (text.len() + 1).saturating_sub(n);
        Self { common, input: grams(input), reference: grams(reference) }
    }
}

fn bleu(input: &[u32], reference: &[u32]) -> f64 {
    let mut logarithms = 0.0;
    for n in 1..=4 {
        let matches = Matches::of(input, reference, n);
        let added = usize::from(n > 1);
        let precision = (matches.common + added) as f64 / (matches.input.max(1) + added) as f64;
        if precision == 0.0 {
            return 0.0;
        }
        logarithms += precision.ln() / 4.0;
    }
    // Brevity penalty: a short text has a high precision because it omits words.
    let brevity = (1.0 - reference.len() as f64 / input.len() as f64).min(0.0);
    (logarithms + brevity).exp()
}

fn gleu(input: &[u32], reference: &[u32]) -> f64 {
    let (mut common, mut all) = (0, [0, 0]);
    for n in 1..=4 {
        let matches = Matches::of(input, reference, n);
        common += matches.common;
        all = [all[0] + matches.input, all[1] + matches.reference];
    }
    common as f64 / all[0].max(all[1]).max(1) as f64
}

/// The harmonic mean of precision and recall.
fn f1(common: usize, input: usize, reference: usize) -> f64 {
    if common == 0 {
        return 0.0;
    }
    let (precision, recall) = (common as f64 / input as f64, common as f64 / reference as f64);
    2.0 * precision * recall / (precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn metrics_are_those_of_the_references() {
        let text = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/grade/text.json"));
        let pairs: Vec<Value> = serde_json::from_str(text).unwrap();
        assert!(pairs.len() >= 40);
        for pair in pairs {
            let (input, reference) =
                (pair["input"].as_str().unwrap(), pair["reference"].as_str().unwrap());
            for (name, metric) in Metric::ALL {
                let expected = pair["scores"][*name].as_f64().unwrap();
                let got = metric.of(input, reference);
                assert!((got - expected).abs() < 1e-9, "{name} {got} {expected}: {pair}");
            }
        }
    }

    #[test]
    fn subsequences_are_those_of_the_table() {
        let mut state = 1u32;
        let mut next = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % below
        };
        for round in 0..200 {
            let letters = 2 + round % 40;
            let text = |next: &mut dyn FnMut(u32) -> u32| -> Vec<u32> {
                let length = next(150);
                (0..length).map(|_| next(letters)).collect()
            };
            let (a, b) = (text(&mut next), text(&mut next));
            let mut row = vec![0; b.len() + 1];
            for x in &a {
                let before = row.clone();
                for (at, y) in b.iter().enumerate() {
                    row[at + 1] = if x == y { before[at] + 1 } else { before[at + 1].max(row[at]) };
                }
            }
            let got = lcs_seq::similarity(a.iter().copied(), b.iter().copied());
            assert_eq!(got, row[b.len()]);
        }
    }

    #[test]
    fn the_longest_texts_are_compared_in_time() {
        let long = "a b ".repeat(16 << 10);
        let other = "b c ".repeat(16 << 10);
        let start = std::time::Instant::now();
        for (_, metric) in Metric::ALL {
            let alike = metric.of(&long, &other);
            assert!((0.0..=1.0).contains(&alike));
        }
        assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
    }
}
