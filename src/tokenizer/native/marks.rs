//! [`Marks`]: finds special tokens in a text before it is tokenized.
//!
//! Source: `tokenizer_st_partition` in `src/llama-vocab.cpp`. llama.cpp searches for each special
//! token in turn, longest first, in the text that longer ones left; so a longer token wins even
//! over a shorter one that starts before it. Here one automaton finds all of them, with one round
//! per length that occurs in the text, not per token. Which of two overlapping marks of equal
//! length wins is undefined in llama.cpp; here it is the first.

use super::super::spans_barrier;
use super::NativeError;
use super::lexicon::{Kind, Lexicon, not_covered};
use crate::gguf::Gguf;
use crate::ipc::Token;
use aho_corasick::{AhoCorasick, Match};
use std::collections::BTreeSet;
use std::ops::Range;

/// A part of a text: a special token or plain text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    Mark(Token),
    Text(&'t str),
}

struct Mark {
    token: Token,
    /// Matched even if special tokens are not parsed.
    always: bool,
    /// Whether the mark removes white space before or after it.
    strip: Strip,
}

#[derive(Clone, Copy, Default)]
struct Strip {
    left: bool,
    right: bool,
}

/// The marks that are searched for in a text.
struct Wanted<'b> {
    all: bool,
    barriers: &'b [usize],
    /// The address of the whole text, from which the offsets of its parts are computed.
    start: usize,
}

impl Wanted<'_> {
    /// Whether the mark found at `range` of `part` counts. `part` is a slice of the whole text.
    fn takes(&self, mark: &Mark, part: &str, range: Range<usize>) -> bool {
        let offset = part.as_ptr() as usize - self.start;
        let range = range.start + offset..range.end + offset;
        mark.always || (self.all && !spans_barrier(self.barriers, range))
    }
}

pub(super) struct Marks {
    /// The pattern indices are those of `marks`.
    finder: AhoCorasick,
    marks: Vec<Mark>,
}

impl Marks {
    pub(super) fn new(gguf: &Gguf, lexicon: &Lexicon) -> Result<Self, NativeError> {
        let strips = Strips::read(gguf)?;
        let mark = |token| {
            let (text, kind) = (lexicon.text(token), lexicon.kind(token));
            Mark { token, always: kind == Kind::UserDefined, strip: strips.of(text) }
        };
        let marks: Vec<Mark> = lexicon.marks().map(mark).collect();
        let finder = AhoCorasick::new(marks.iter().map(|mark| lexicon.text(mark.token)))
            .map_err(|error| not_covered(format!("its special tokens: {error}")))?;
        Ok(Self { finder, marks })
    }

    /// Splits `text` into fragments, in order. With `all`, control tokens are matched too, not only
    /// user-defined tokens; control tokens that span one of the ascending byte offsets `barriers`
    /// are not matched.
    pub(super) fn cut<'t>(
        &self,
        text: &'t str,
        all: bool,
        barriers: &[usize],
    ) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        push_text(text, &mut fragments);
        let wanted = Wanted { all, barriers, start: text.as_ptr() as usize };
        for length in self.lengths(text, &wanted).into_iter().rev() {
            let mut finer = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                match fragment {
                    Fragment::Text(text) => self.cut_one(text, length, &wanted, &mut finer),
                    Fragment::Mark(_) => finer.push(fragment),
                }
            }
            fragments = finer;
        }
        fragments
    }

    /// The lengths of the marks that occur in `text`, in bytes.
    fn lengths(&self, text: &str, wanted: &Wanted) -> BTreeSet<usize> {
        let found = self.finder.find_overlapping_iter(text);
        let wanted = |m: &Match| wanted.takes(&self.marks[m.pattern()], text, m.range());
        found.filter(wanted).map(|m| m.len()).collect()
    }

    /// Splits a text at the marks of one length.
    fn cut_one<'t>(
        &self,
        text: &'t str,
        length: usize,
        wanted: &Wanted,
        out: &mut Vec<Fragment<'t>>,
    ) {
        // The text from `rest` on has not been split yet.
        let mut rest = 0;
        for found in self.finder.find_overlapping_iter(text) {
            let mark = &self.marks[found.pattern()];
            let elsewhere = found.len() != length || found.start() < rest;
            if elsewhere || !wanted.takes(mark, text, found.range()) {
                continue;
            }
            let before = &text[rest..found.start()];
            let before = if mark.strip.left { before.trim_end_matches(is_space) } else { before };
            push_text(before, out);
            out.push(Fragment::Mark(mark.token));
            rest = found.end();
            if mark.strip.right {
                rest = text.len() - text[rest..].trim_start_matches(is_space).len();
            }
        }
        push_text(&text[rest..], out);
    }
}

fn push_text<'t>(text: &'t str, out: &mut Vec<Fragment<'t>>) {
    if !text.is_empty() {
        out.push(Fragment::Text(text));
    }
}

/// Whether C's `isspace` holds for the character.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// The marks that remove white space. Files do not specify this; llama.cpp recognises some models
/// by name.
enum Strips {
    None,
    /// Removes white space before this mark.
    Before(&'static str),
    /// Phi 3: removes white space after all marks except three.
    Phi3,
}

impl Strips {
    fn read(gguf: &Gguf) -> Result<Self, NativeError> {
        let read = |key| gguf.str(key).map(|value| value.unwrap_or("").to_owned());
        let pre = read("tokenizer.ggml.pre")?;
        let architecture = read("general.architecture")?;
        let name = read("general.name")?.to_ascii_lowercase();
        let has = |text: &str, parts: &[&str]| parts.iter().any(|part| text.contains(part));
        let before_mask = has(&pre, &["jina-v2-de", "jina-v2-es", "jina-v2-code", "mmbert"])
            || has(&architecture, &["nomic-bert-moe", "jina-bert-v3"]);
        Ok(if before_mask {
            Self::Before("<mask>")
        } else if has(&name, &["phi-3", "phi3"]) {
            Self::Phi3
        } else if has(&name, &["modern-bert"]) {
            Self::Before("[MASK]")
        } else {
            Self::None
        })
    }

    fn of(&self, text: &str) -> Strip {
        match self {
            Self::None => Strip::default(),
            Self::Before(mark) => Strip { left: text == *mark, right: false },
            Self::Phi3 => {
                let right = !["<unk>", "<s>", "<|endoftext|>"].contains(&text);
                Strip { left: false, right }
            }
        }
    }
}
