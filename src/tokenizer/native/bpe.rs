//! [`Bpe`]: merges by rank within words, using the crate `tokenizers`.
//!
//! Source: `llm_tokenizer_bpe_session` in `src/llama-vocab.cpp`. The crate and llama.cpp agree if
//! all parts and results of merges are tokens; files that violate this are rejected.

use super::NativeError;
use super::lexicon::{Lexicon, MERGES, SPACE, byte_chars, not_covered};
use super::pretokenize::{Pre, Units};
use super::split::Splitter;
use crate::gguf::{Gguf, GgufError};
use crate::ipc::Token;
use std::collections::HashSet;
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Merges};

/// Words whose tokens are cached, per thread; the crate caches those below 256 bytes.
const CACHED_WORDS: usize = 4096;

pub(super) struct Bpe {
    splitter: Splitter,
    units: Units,
    whole_words: bool,
    /// GPT-2's character for each byte, and whether it is a token.
    chars: [char; 256],
    known: [bool; 256],
    merges: BPE,
}

impl Bpe {
    pub(super) fn new(gguf: &Gguf, lexicon: &Lexicon) -> Result<Self, NativeError> {
        let name = lexicon.pre();
        let pre =
            Pre::by_name(name).ok_or_else(|| not_covered(format!("the pre-tokenizer '{name}'")))?;
        let chars = byte_chars();
        let known = chars.map(|c| lexicon.id(c.encode_utf8(&mut [0; 4])).is_some());
        if pre.units != Units::Bytes && !has_byte_tokens(lexicon) {
            return Err(not_covered("characters without tokens for all bytes"));
        }
        let listed = match gguf.strings(MERGES)? {
            Some(listed) => listed,
            // Kimi K2 files may have no merges: every word is a token.
            None if name == "kimi-k2" => &[],
            None => return Err(GgufError::MissingKey(MERGES.to_owned()).into()),
        };
        let merges = BPE::builder()
            .vocab_and_merges(lexicon.ids.clone(), read_merges(listed, lexicon)?)
            .byte_fallback(pre.units != Units::Bytes)
            .cache_capacity(CACHED_WORDS)
            .build()
            .map_err(|error| not_covered(format!("its merges: {error}")))?;
        let splitter = Splitter::new(pre.steps);
        let (units, whole_words) = (pre.units, pre.whole_words);
        Ok(Self { splitter, units, whole_words, chars, known, merges })
    }

    /// Whether tokens are spelled in GPT-2's byte alphabet.
    pub(super) fn is_byte_level(&self) -> bool {
        self.units == Units::Bytes
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(&self, text: &str, tokens: &mut Vec<Token>) {
        if self.is_byte_level() {
            let mut spelled = String::new();
            for word in self.splitter.split(text) {
                self.encode_bytes(word.as_bytes(), &mut spelled, tokens);
            }
            return;
        }
        let text = text.replace(' ', SPACE);
        for line in self.splitter.split(&text) {
            self.encode_line(line, tokens);
        }
    }

    /// Tokenizes a word; `spelled` is scratch space.
    fn encode_bytes(&self, word: &[u8], spelled: &mut String, tokens: &mut Vec<Token>) {
        self.spell(word, spelled);
        if self.is_known(word) || self.whole_word(spelled).is_some() {
            return self.encode_word(spelled, tokens);
        }
        // A byte without a token is dropped, and its neighbours do not merge.
        for run in word.split(|&byte| !self.known[usize::from(byte)]) {
            self.spell(run, spelled);
            self.merge(spelled, tokens);
        }
    }

    fn spell(&self, bytes: &[u8], spelled: &mut String) {
        spelled.clear();
        spelled.extend(bytes.iter().map(|&byte| self.chars[usize::from(byte)]));
    }

    fn is_known(&self, word: &[u8]) -> bool {
        word.iter().all(|&byte| self.known[usize::from(byte)])
    }

    /// Tokenizes a line, or a run of newlines, with spaces written as U+2581.
    fn encode_line(&self, line: &str, tokens: &mut Vec<Token>) {
        if self.units != Units::Characters && line.starts_with('\n') {
            return match self.merges.token_to_id(line) {
                Some(token) => tokens.push(token),
                None => self.merge(line, tokens),
            };
        }
        if self.units != Units::Metaspace {
            return self.encode_word(line, tokens);
        }
        // Every space starts a word; so does the beginning of the line.
        let line = if line.starts_with(SPACE) { line } else { &format!("{SPACE}{line}") };
        let starts = line.match_indices(SPACE).map(|(at, _)| at);
        let ends = starts.clone().skip(1).chain([line.len()]);
        for (start, end) in starts.zip(ends) {
            self.encode_word(&line[start..end], tokens);
        }
    }

    fn encode_word(&self, word: &str, tokens: &mut Vec<Token>) {
        match self.whole_word(word) {
            Some(token) => tokens.push(token),
            None => self.merge(word, tokens),
        }
    }

    fn whole_word(&self, word: &str) -> Option<Token> {
        if self.whole_words { self.merges.token_to_id(word) } else { None }
    }

    fn merge(&self, word: &str, tokens: &mut Vec<Token>) {
        let merged = self.merges.tokenize(word);
        let merged = merged.expect("only a missing unknown token fails, and none is set");
        tokens.extend(merged.into_iter().map(|token| token.id));
    }
}

/// Whether the vocabulary has the tokens `<0x00>` to `<0xFF>`.
fn has_byte_tokens(lexicon: &Lexicon) -> bool {
    (0..=255u8).all(|byte| lexicon.id(&format!("<{byte:#04X}>")).is_some())
}

/// Reads the merges in order, keeping the first of equal ones; the crate checks that all parts are
/// tokens.
fn read_merges(listed: &[String], lexicon: &Lexicon) -> Result<Merges, NativeError> {
    let longest = lexicon.texts.iter().map(String::len).max().unwrap_or(0);
    let mut merges = Vec::with_capacity(listed.len());
    let mut seen = HashSet::with_capacity(listed.len());
    for merge in listed {
        let Some((left, right)) = parts(merge) else { continue };
        // The crate would panic on such a merge.
        if left.len() + right.len() > longest {
            return Err(not_covered(format!("a merge longer than any token: '{merge}'")));
        }
        if seen.insert(merge) {
            merges.push((left.to_owned(), right.to_owned()));
        }
    }
    Ok(merges)
}

/// Splits a merge at its first space. The left part may start with a space, but is not empty.
fn parts(merge: &str) -> Option<(&str, &str)> {
    let (space, _) = merge.char_indices().skip(1).find(|&(_, c)| c == ' ')?;
    Some((&merge[..space], &merge[space + 1..]))
}
