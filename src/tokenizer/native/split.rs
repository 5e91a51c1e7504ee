//! [`Splitter`]: splits a text into words, which merges do not cross.
//!
//! Source: `unicode_regex_split` in `src/unicode.cpp`: expressions are applied in turn, each to the
//! pieces that the previous one left; the text between matches is a piece too. llama.cpp uses
//! backtracking expressions, and code for some of them; here every expression runs in linear time.
//! For that, `\s+(?!\S)`, the one look-ahead that they share, is replaced by a rule.

use super::pretokenize::Step;
use regex_automata::Input;
use regex_automata::meta::Regex;

/// Index of the white-space expression where a rule handles white space; the other expression has
/// index 0.
const WHITE_SPACE: usize = 1;

pub(super) struct Splitter(Vec<Splitting>);

enum Splitting {
    Match(Regex),
    Words(Regex),
    Halves(Regex),
    Threes(Regex),
    AsciiThrees,
}

impl Splitter {
    pub(super) fn new(steps: &[Step]) -> Self {
        let compile = |step: &Step| match *step {
            Step::Match(expression) => Splitting::Match(regex(&[expression])),
            Step::Words(expression) => Splitting::Words(regex(&[expression, r"\s+"])),
            Step::Halves(expression) => Splitting::Halves(regex(&[expression, r"\s+"])),
            Step::Threes => Splitting::Threes(regex(&[r"\p{N}+"])),
            Step::AsciiThrees => Splitting::AsciiThrees,
        };
        Self(steps.iter().map(compile).collect())
    }

    /// Splits `text` into words, in order and without gaps.
    pub(super) fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut words = vec![text];
        for splitting in &self.0 {
            let mut pieces = Pieces(Vec::with_capacity(words.len()));
            for word in words {
                splitting.apply(word, &mut pieces);
            }
            words = pieces.0;
        }
        words
    }
}

/// Compiles an expression of the table.
fn regex(expressions: &[&str]) -> Regex {
    let expressions: Vec<String> = expressions.iter().map(|text| dated(text)).collect();
    Regex::builder().build_many(&expressions).expect("every expression in the table is valid")
}

/// Restricts general categories to the characters of Unicode 15.1, which llama.cpp's tables
/// contain; to the oracle, later characters are neither letters nor digits.
fn dated(expression: &str) -> String {
    ["L", "N", "P", "S", "M"].iter().fold(expression.to_owned(), |text, category| {
        let class = format!(r"\p{{{category}}}");
        text.replace(&class, &format!(r"[{class}&&\p{{age=15.1}}]"))
    })
}

/// A list of pieces that omits empty ones.
struct Pieces<'t>(Vec<&'t str>);

impl<'t> Pieces<'t> {
    fn push(&mut self, piece: &'t str) {
        if !piece.is_empty() {
            self.0.push(piece);
        }
    }
}

impl Splitting {
    fn apply<'t>(&self, text: &'t str, out: &mut Pieces<'t>) {
        match self {
            Self::Match(regex) => each(regex, text, out, |_, _| None),
            Self::Words(regex) => each(regex, text, out, all_but_last),
            Self::Halves(regex) => each(regex, text, out, half),
            Self::Threes(regex) => threes(regex, text, out),
            Self::AsciiThrees => ascii_threes(text, out),
        }
    }
}

/// Splits `text` at the matches of `regex`. A run of white space is split further by `part`: given
/// the run and whether the text ends with it, `part` returns the length of the next part in bytes,
/// or `None` for the rest.
fn each<'t>(
    regex: &Regex,
    text: &'t str,
    out: &mut Pieces<'t>,
    part: impl Fn(&str, bool) -> Option<usize>,
) {
    let mut at = 0;
    while let Some(found) = regex.search(&Input::new(text).range(at..)) {
        out.push(&text[at..found.start()]);
        at = found.end();
        if found.pattern().as_usize() != WHITE_SPACE {
            out.push(&text[found.range()]);
            continue;
        }
        let (mut run, ends) = (&text[found.range()], at == text.len());
        // The last character may begin a word: the next search decides.
        while let Some(length) = part(run, ends) {
            out.push(&run[..length]);
            run = &run[length..];
        }
        match ends || run.len() == found.len() {
            true => out.push(run),
            false => at -= run.len(),
        }
    }
    out.push(&text[at..]);
}

/// `\s+(?!\S)|\s+`: leaves the last character of a run to the word after it, if there is one.
fn all_but_last(run: &str, ends: bool) -> Option<usize> {
    let (last, _) = run.char_indices().next_back()?;
    (!ends && last > 0).then_some(last)
}

/// `\s{512}(?!\S)|\s{256}(?!\S)|…|\s{1,2}(?!\S)|\s{1}`: parts whose lengths are powers of two.
fn half(run: &str, ends: bool) -> Option<usize> {
    // Characters beyond the largest part do not matter.
    let length = run.chars().take(513).count();
    let room = if ends { length } else { length - 1 };
    if room == 0 || (ends && length == 1) {
        return None;
    }
    let part = (0..=9).rev().map(|power| 1 << power).find(|&part| part <= room)?;
    Some(run.char_indices().nth(part).map_or(run.len(), |(at, _)| at))
}

/// Splits digits into groups of three from the right. As in llama.cpp, the text before the digits
/// stays with their first group: later expressions split the two.
fn threes<'t>(regex: &Regex, text: &'t str, out: &mut Pieces<'t>) {
    let mut done = 0;
    for digits in regex.find_iter(text) {
        let count = text[digits.range()].chars().count();
        let starts = text[digits.range()].char_indices().map(|(at, _)| digits.start() + at);
        let ends = starts.skip(1).chain([digits.end()]);
        for (_, end) in ends.enumerate().filter(|(at, _)| (count - at - 1).is_multiple_of(3)) {
            out.push(&text[done..end]);
            done = end;
        }
    }
    out.push(&text[done..]);
}

/// `(?=(\d{3})+(?!\d))`: splits before every group of three ASCII digits, from the right.
fn ascii_threes<'t>(text: &'t str, out: &mut Pieces<'t>) {
    let bytes = text.as_bytes();
    let mut done = 0;
    let mut at = 0;
    while at < bytes.len() {
        let run = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        for cut in (at + run % 3..at + run).step_by(3) {
            out.push(&text[done..cut]);
            done = cut;
        }
        at += run.max(1);
    }
    out.push(&text[done..]);
}
