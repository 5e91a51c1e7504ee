//! Converts text to tokens and tokens to text; usable from any thread.

pub mod native;

use crate::ipc::Token;
use aho_corasick::{AhoCorasick, MatchKind};
use std::ops::Range;

/// Largest difference in size between two vocabularies that count as equal.
const MAX_PADDING: usize = 256;

/// A model's vocabulary and its tokenizer.
pub trait Tokenizer: Send + Sync {
    fn vocab(&self) -> &Vocab;
    /// Tokenizes `text`. `add_special` prepends BOS if the vocabulary asks for it; `parse_special`
    /// parses control tokens in the text.
    fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<Token>;
    /// Whether [`encode`](Self::encode) appends EOS when `add_special` is set.
    fn adds_eos(&self) -> bool {
        false
    }

    /// Tokenizes a prompt for a model to continue. As [`encode`](Self::encode), but without the EOS
    /// that some vocabularies ask for: a model does not continue a text that has ended.
    fn encode_prompt(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<Token> {
        let mut tokens = self.encode(text, add_special, parse_special);
        if add_special && self.adds_eos() {
            tokens.pop();
        }
        tokens
    }

    /// Tokenizes a text that continues other tokens: without BOS and EOS, and without the spaces
    /// that SentencePiece adds before a text and after special tokens. The concatenated pieces of
    /// the tokens equal the text, as with a model's output. Control tokens that span one of the
    /// ascending byte offsets `barriers` are not parsed.
    fn encode_continuation(
        &self,
        text: &str,
        parse_special: bool,
        barriers: &[usize],
    ) -> Vec<Token> {
        if barriers.is_empty() || !parse_special {
            let encode = |text: &str| self.encode(text, false, parse_special);
            return without_added_spaces(text, &encode, self.vocab());
        }
        let encode = |text: &str| self.encode(text, false, false);
        let mut tokens = Vec::new();
        for fragment in fragments(self.vocab(), text, barriers) {
            match fragment {
                Fragment::Control(token) => tokens.push(token),
                Fragment::Text(text) => {
                    tokens.extend(without_added_spaces(text, &encode, self.vocab()));
                }
            }
        }
        tokens
    }

    /// Tokenizes a rendered prompt. As [`encode_prompt`](Self::encode_prompt) with control tokens
    /// parsed, except that those which span one of the ascending byte offsets `barriers` are plain
    /// text.
    fn encode_rendered(&self, text: &str, barriers: &[usize], add_special: bool) -> Vec<Token> {
        if barriers.is_empty() {
            return self.encode_prompt(text, add_special, true);
        }
        let mut tokens = if add_special { self.encode_prompt("", true, false) } else { Vec::new() };
        for fragment in fragments(self.vocab(), text, barriers) {
            match fragment {
                Fragment::Control(token) => tokens.push(token),
                Fragment::Text(text) => tokens.extend(self.encode(text, false, false)),
            }
        }
        tokens
    }
}

/// A part of a text that has been split at its control tokens.
enum Fragment<'t> {
    Control(Token),
    Text(&'t str),
}

/// Splits a text at the control tokens that span no barrier; the first and longest match wins. For
/// tokenizers that do not support barriers.
fn fragments<'t>(vocab: &Vocab, text: &'t str, barriers: &[usize]) -> Vec<Fragment<'t>> {
    let control = vocab.control_tokens();
    let texts = control.iter().map(|(text, _)| text.as_str());
    let finder = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts);
    let (mut fragments, mut done) = (Vec::new(), 0);
    for found in finder.iter().flat_map(|finder| finder.find_iter(text)) {
        if found.is_empty() || spans_barrier(barriers, found.range()) {
            continue;
        }
        if found.start() > done {
            fragments.push(Fragment::Text(&text[done..found.start()]));
        }
        fragments.push(Fragment::Control(control[found.pattern().as_usize()].1));
        done = found.end();
    }
    if done < text.len() {
        fragments.push(Fragment::Text(&text[done..]));
    }
    fragments
}

/// Whether one of the ascending offsets lies strictly inside the range.
fn spans_barrier(barriers: &[usize], range: Range<usize>) -> bool {
    let next = barriers.partition_point(|&at| at <= range.start);
    barriers.get(next).is_some_and(|&at| at < range.end)
}

/// A character that never merges with others: vocabularies have it as a byte, or not at all.
const MARKER: &str = "\u{1}";

/// Tokenizes `text` with an `encode` that may add spaces before it and after special tokens. Each
/// stretch that got a space is tokenized again, after a marker.
fn without_added_spaces(
    text: &str,
    encode: &dyn Fn(&str) -> Vec<Token>,
    vocab: &Vocab,
) -> Vec<Token> {
    let (mut tokens, mut found, mut rest) = (Vec::new(), encode(text), text);
    let mut marked = false;
    while let Some(added) = added_space(&found, rest, vocab) {
        // Tokenize the whole stretch again, unless the marker already precedes it.
        let (count, bytes) = match added.stretch {
            (0, _) if marked => added.at,
            stretch => stretch,
        };
        if marked && count == 0 {
            break;
        }
        let marker = encode(MARKER);
        let behind = encode(&format!("{MARKER}{}", &rest[bytes..]));
        // If the marker is not a token of its own, the result cannot be split there.
        let Some(behind) = behind.strip_prefix(&marker[..]) else { break };
        tokens.extend_from_slice(&found[..count]);
        rest = &rest[bytes..];
        (found, marked) = (behind.to_vec(), true);
    }
    tokens.extend(found);
    tokens
}

/// A token that begins with a space which the text does not have at that position.
struct AddedSpace {
    /// Number of tokens, and of bytes of the text, before the token.
    at: (usize, usize),
    /// The same counts before the stretch between special tokens that contains it.
    stretch: (usize, usize),
}

fn added_space(tokens: &[Token], text: &str, vocab: &Vocab) -> Option<AddedSpace> {
    let (mut at, mut stretch) = (0, (0, 0));
    for (count, &token) in tokens.iter().enumerate() {
        let (piece, rest) = (vocab.piece(token), &text.as_bytes()[at..]);
        if !rest.starts_with(piece) {
            let added = piece.first() == Some(&b' ') && rest.starts_with(&piece[1..]);
            let added = added && text.is_char_boundary(at);
            return added.then_some(AddedSpace { at: (count, at), stretch });
        }
        at += piece.len();
        if vocab.is_control(token) {
            stretch = (count + 1, at);
        }
    }
    None
}

/// The vocabulary's immutable properties.
#[derive(Debug)]
pub struct Vocab {
    /// The concatenated pieces of all tokens.
    bytes: Vec<u8>,
    /// (tokens + 1) offsets into `bytes`.
    offsets: Vec<u32>,
    control: Vec<bool>,
    end_of_generation: Vec<bool>,
    pub bos: Option<Token>,
    pub eos: Option<Token>,
    /// Prefix, suffix and middle tokens, if the model supports infill.
    pub infill: Option<[Token; 3]>,
}

impl Vocab {
    /// Creates a vocabulary from (bytes, is control, ends generation) for each token id.
    pub fn new(pieces: impl IntoIterator<Item = (Vec<u8>, bool, bool)>) -> Self {
        let mut vocab = Self {
            bytes: Vec::new(),
            offsets: vec![0],
            control: Vec::new(),
            end_of_generation: Vec::new(),
            bos: None,
            eos: None,
            infill: None,
        };
        for (bytes, control, end) in pieces {
            vocab.bytes.extend_from_slice(&bytes);
            vocab.offsets.push(u32::try_from(vocab.bytes.len()).unwrap_or(u32::MAX));
            vocab.control.push(control);
            vocab.end_of_generation.push(end);
        }
        vocab
    }

    pub fn len(&self) -> usize {
        self.control.len()
    }

    pub fn is_empty(&self) -> bool {
        self.control.is_empty()
    }

    /// A token's bytes; for a control token its text; empty for an unknown id.
    pub fn piece(&self, token: Token) -> &[u8] {
        let at = token as usize;
        match (self.offsets.get(at), self.offsets.get(at + 1)) {
            (Some(&from), Some(&to)) => &self.bytes[from as usize..to as usize],
            _ => &[],
        }
    }

    pub fn is_control(&self, token: Token) -> bool {
        self.control.get(token as usize).copied().unwrap_or(false)
    }

    /// Whether a token ends generation: end of turn, end of text and similar tokens.
    pub fn ends_generation(&self, token: Token) -> bool {
        self.end_of_generation.get(token as usize).copied().unwrap_or(false)
    }

    /// A token's bytes in the output: empty for tokens that end generation, and for other control
    /// tokens unless `render_special` is set.
    pub fn output_piece(&self, token: Token, render_special: bool) -> &[u8] {
        if self.ends_generation(token) || (self.is_control(token) && !render_special) {
            return &[];
        }
        self.piece(token)
    }

    /// Describes how another vocabulary differs; `None` if both tokenize every text alike. Either
    /// may have additional tokens at its end, as models of one family are padded to different
    /// sizes.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let common = self.len().min(other.len());
        if self.len().max(other.len()) - common > MAX_PADDING {
            return Some(format!("with {} tokens instead of {}", other.len(), self.len()));
        }
        let text = |vocab: &Self, token| {
            format!("{:?}", String::from_utf8_lossy(vocab.piece(token)).into_owned())
        };
        let differs = |&token: &Token| self.piece(token) != other.piece(token);
        if let Some(token) = (0..common as Token).find(differs) {
            let (ours, theirs) = (text(self, token), text(other, token));
            return Some(format!("token {token} is {theirs} instead of {ours}"));
        }
        let named = |token: Option<Token>| token.map_or("none".into(), |token| token.to_string());
        [("begins", self.bos, other.bos), ("ends", self.eos, other.eos)].into_iter().find_map(
            |(what, ours, theirs)| {
                let (ours, theirs) = (named(ours), named(theirs));
                (ours != theirs).then(|| format!("token {theirs} instead of {ours} {what} a text"))
            },
        )
    }

    /// All tokens that end generation.
    pub fn end_tokens(&self) -> Vec<Token> {
        (0..self.len() as Token).filter(|&token| self.ends_generation(token)).collect()
    }

    /// Control tokens with their texts.
    pub fn control_tokens(&self) -> Vec<(String, Token)> {
        (0..self.len() as Token)
            .filter(|&token| self.is_control(token))
            .map(|token| (String::from_utf8_lossy(self.piece(token)).into_owned(), token))
            .collect()
    }
}

#[cfg(test)]
mod same {
    use super::*;

    fn vocab(pieces: &[&str]) -> Vocab {
        let pieces = pieces.iter().map(|piece| (piece.as_bytes().to_vec(), false, false));
        let mut vocab = Vocab::new(pieces);
        (vocab.bos, vocab.eos) = (Some(0), Some(1));
        vocab
    }

    #[test]
    fn differences_are_named() {
        let ours = vocab(&["<s>", "</s>", "a", "b"]);
        assert_eq!(ours.difference(&vocab(&["<s>", "</s>", "a", "b"])), None);
        assert_eq!(ours.difference(&vocab(&["<s>", "</s>", "a", "b", "[pad]"])), None);
        assert_eq!(ours.difference(&vocab(&["<s>", "</s>", "a"])), None);
        let other = ours.difference(&vocab(&["<s>", "</s>", "a", "c"])).unwrap();
        assert_eq!(other, r#"token 3 is "c" instead of "b""#);
        let mut ends = vocab(&["<s>", "</s>", "a", "b"]);
        ends.eos = Some(2);
        assert_eq!(ours.difference(&ends).unwrap(), "token 2 instead of 1 ends a text");
        let long = vocab(&["<s>"; 300]);
        assert_eq!(ours.difference(&long).unwrap(), "with 300 tokens instead of 4");
    }
}
