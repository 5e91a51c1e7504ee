//! [`Spm`]: SentencePiece's BPE: adjacent symbols that form a token are merged, best score first.
//!
//! Source: `llm_tokenizer_spm_session` in `src/llama-vocab.cpp`. The crate `tokenizers` cannot do
//! this: it ranks pairs, while here tokens of equal score are merged by their position in the text.

use super::NativeError;
use super::lexicon::{Lexicon, SPACE};
use crate::gguf::{Array, Gguf, GgufError, Value};
use crate::ipc::Token;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashSet};
use tokenizers::models::bpe::Vocab as Ids;

pub(super) struct Spm {
    ids: Ids,
    /// Log probabilities by token id.
    scores: Vec<f32>,
    /// Characters that precede a space in some token.
    before_space: HashSet<char>,
    /// Length of the longest token text, in bytes.
    longest: usize,
    /// The token for each byte of a character that is not in the vocabulary.
    bytes: [Option<Token>; 256],
    /// Whether a space is added before a text.
    space_prefix: bool,
}

/// A part of the text, initially one character. A merge extends the left symbol and empties the
/// right one.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    /// Indices of the neighbouring symbols; `NONE` at the ends.
    left: usize,
    right: usize,
}

const NONE: usize = usize::MAX;

impl Symbol {
    fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Two adjacent symbols that form a token. Outdated once either has changed.
struct Bigram {
    score: f32,
    left: usize,
    right: usize,
    /// Total length of both symbols in bytes when the bigram was found.
    length: usize,
}

impl Ord for Bigram {
    /// The greatest bigram is merged next: best score, then leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Bigram {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Bigram {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Bigram {}

impl Spm {
    pub(super) fn new(gguf: &Gguf, lexicon: &Lexicon) -> Result<Self, NativeError> {
        let scores = read_scores(gguf, lexicon.texts.len())?;
        let unknown = lexicon.facts.unk.as_ref().map(|token| token.id);
        let byte_token = |byte: u8| {
            let fallback = || lexicon.id(str::from_utf8(&[byte]).ok()?);
            lexicon.id(&format!("<{byte:#04X}>")).or_else(fallback).or(unknown)
        };
        Ok(Self {
            longest: lexicon.texts.iter().map(String::len).max().unwrap_or(0),
            bytes: std::array::from_fn(|byte| byte_token(byte as u8)),
            space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
            before_space: lexicon.texts.iter().flat_map(|text| before_spaces(text)).collect(),
            ids: lexicon.ids.clone(),
            scores,
        })
    }

    /// Appends the tokens of `text`. `starts`: the text is at the beginning or follows a mark.
    pub(super) fn encode(&self, text: &str, starts: bool, tokens: &mut Vec<Token>) {
        let prefix = if self.space_prefix && starts { SPACE } else { "" };
        let text = format!("{prefix}{}", text.replace(' ', SPACE));
        for word in self.words(&text) {
            self.encode_word(word, tokens);
        }
    }

    /// Splits the text where no merge can join the parts, because no token contains the characters
    /// on both sides. The merges are the same as in the whole text, with shorter queues.
    fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let mut spaces = rest.match_indices(SPACE).map(|(at, _)| at);
            let end = spaces.find(|&at| {
                let before = rest[..at].chars().next_back();
                before.is_some_and(|c| !self.before_space.contains(&c))
            });
            let (word, behind) = rest.split_at(end.unwrap_or(rest.len()));
            rest = behind;
            (!word.is_empty()).then_some(word)
        })
    }

    fn encode_word(&self, text: &str, tokens: &mut Vec<Token>) {
        let symbols = self.merge(text);
        let mut at = if symbols.is_empty() { NONE } else { 0 };
        while at != NONE {
            let symbol = symbols[at];
            let piece = &text[symbol.start..symbol.end];
            match self.ids.get(piece) {
                Some(&token) => tokens.push(token),
                None => tokens.extend(piece.bytes().filter_map(|b| self.bytes[usize::from(b)])),
            }
            at = symbol.right;
        }
    }

    /// Merges the symbols of a text. Returns all symbols, including emptied ones; the first is
    /// never emptied and links to the others.
    fn merge(&self, text: &str) -> Vec<Symbol> {
        let mut symbols = characters(text);
        let mut heap = BinaryHeap::with_capacity(symbols.len());
        for right in 1..symbols.len() {
            heap.extend(self.bigram(text, &symbols, right - 1, right));
        }
        while let Some(next) = heap.pop() {
            let (left, right) = (symbols[next.left], symbols[next.right]);
            if left.len() == 0 || right.len() == 0 || left.len() + right.len() != next.length {
                continue;
            }
            symbols[next.left].end = right.end;
            symbols[next.left].right = right.right;
            symbols[next.right].start = right.end;
            if let Some(behind) = symbols.get_mut(right.right) {
                behind.left = next.left;
            }
            heap.extend(self.bigram(text, &symbols, left.left, next.left));
            heap.extend(self.bigram(text, &symbols, next.left, right.right));
        }
        symbols
    }

    fn bigram(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Bigram> {
        let (start, end) = (symbols.get(left)?.start, symbols.get(right)?.end);
        // Avoids hashing text that is longer than any token.
        let both = (end - start <= self.longest).then(|| &text[start..end])?;
        let token = *self.ids.get(both)?;
        Some(Bigram { score: self.scores[token as usize], left, right, length: both.len() })
    }
}

fn characters(text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
    for (start, c) in text.char_indices() {
        let at = symbols.len();
        let end = start + c.len_utf8();
        let right = if end == text.len() { NONE } else { at + 1 };
        symbols.push(Symbol { start, end, left: at.wrapping_sub(1), right });
    }
    symbols
}

fn before_spaces(text: &str) -> impl Iterator<Item = char> {
    text.match_indices(SPACE).filter_map(|(at, _)| text[..at].chars().next_back())
}

/// Log probabilities by token id; all zero if the file has none.
fn read_scores(gguf: &Gguf, n_tokens: usize) -> Result<Vec<f32>, NativeError> {
    let key = "tokenizer.ggml.scores";
    let scores: Vec<f32> = match gguf.get(key) {
        None => return Ok(vec![0.0; n_tokens]),
        // Adding zero turns -0.0 into 0.0, so that the two compare equal.
        Some(Value::Array(Array::F32(scores))) => scores.iter().map(|score| score + 0.0).collect(),
        Some(Value::Array(Array::I32(scores))) => scores.iter().map(|&n| n as f32).collect(),
        Some(other) => {
            let (key, found) = (key.to_owned(), other.type_name());
            return Err(GgufError::WrongType { key, wanted: "an array of f32", found }.into());
        }
    };
    if scores.len() < n_tokens {
        let n = scores.len();
        return Err(GgufError::Malformed(format!("{key} lists {n} of {n_tokens} tokens")).into());
    }
    Ok(scores)
}
