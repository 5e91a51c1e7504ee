//! [`Marks`]: special tokens found in a text before it is tokenized.
//!
//! Source: `tokenizer_st_partition` in `src/llama-vocab.cpp`. llama.cpp looks for each special
//! token in turn, longest first, in all that longer ones left; so a long one wins even over a
//! shorter one that starts before it. Here one automaton finds them all, and there is a round per
//! length that occurs in the text, not per token. Which of two overlapping marks of one length wins
//! is undefined in llama.cpp; here it is the first.

use super::super::spans_barrier;
use super::NativeError;
use super::lexicon::{Kind, Lexicon, not_covered};
use crate::gguf::Gguf;
use crate::ipc::Token;
use aho_corasick::{AhoCorasick, Match};
use std::collections::BTreeSet;
use std::ops::Range;

/// A stretch of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment<'t> {
    Mark(Token),
    Text(&'t str),
}

struct Mark {
    token: Token,
    /// Found even if special tokens are not to be parsed.
    always: bool,
    /// Swallows white space before it, behind it.
    strip: Strip,
}

#[derive(Clone, Copy, Default)]
struct Strip {
    left: bool,
    right: bool,
}

/// Which marks are looked for in a text.
struct Wanted<'b> {
    all: bool,
    barriers: &'b [usize],
    /// The address of the whole text: where its parts lie in it.
    start: usize,
}

impl Wanted<'_> {
    /// `part` is a part of the whole text, in which the mark was found at `range`.
    fn takes(&self, mark: &Mark, part: &str, range: Range<usize>) -> bool {
        let offset = part.as_ptr() as usize - self.start;
        let range = range.start + offset..range.end + offset;
        mark.always || (self.all && !spans_barrier(self.barriers, range))
    }
}

pub struct Marks {
    /// Patterns are the texts of `marks`, in their order.
    finder: AhoCorasick,
    marks: Vec<Mark>,
}

impl Marks {
    pub fn new(gguf: &Gguf, lexicon: &Lexicon) -> Result<Self, NativeError> {
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

    /// `text` in order; `all` finds control tokens too, not only those that users may type, unless they
    /// span one of the ascending byte offsets `barriers`.
    pub fn cut<'t>(&self, text: &'t str, all: bool, barriers: &[usize]) -> Vec<Fragment<'t>> {
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

    /// The lengths of the marks in `text`, in bytes.
    fn lengths(&self, text: &str, wanted: &Wanted) -> BTreeSet<usize> {
        let found = self.finder.find_overlapping_iter(text);
        let wanted = |m: &Match| wanted.takes(&self.marks[m.pattern()], text, m.range());
        found.filter(wanted).map(|m| m.len()).collect()
    }

    /// Cuts out the marks of one length.
    fn cut_one<'t>(
        &self,
        text: &'t str,
        length: usize,
        wanted: &Wanted,
        out: &mut Vec<Fragment<'t>>,
    ) {
        // From here on nothing is cut yet.
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

/// C's `isspace`.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

/// Which marks swallow white space. Files do not say; llama.cpp knows some models by their names.
enum Strips {
    None,
    /// Before this one mark.
    Before(&'static str),
    /// Phi 3: behind all marks but three.
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
