//! Prevents duplicate keys in one JSON object. A context-free grammar cannot express this: where a
//! schema leaves an object open, models repeat keys, and `minProperties` would count the repeated
//! ones.
//!
//! The text is tracked byte by byte beside the grammar, and tokens that would complete a key which
//! its object already has are removed from the mask.

use crate::ipc::Token;
use std::collections::HashSet;
use std::sync::Arc;
use toktrie::TokTrie;

/// The first byte of a control token in llguidance's trie.
const CONTROL: u8 = 0xff;

/// The bytes that a token writes.
pub(super) fn bytes(trie: &TokTrie, token: Token) -> &[u8] {
    let bytes = trie.token(token);
    bytes.strip_prefix(&[CONTROL]).unwrap_or(bytes)
}

/// The tokens of a vocabulary that can complete a key.
#[derive(Debug, Default)]
pub(super) struct QuoteTokens {
    /// Tokens with one quotation mark: they can end a key that has begun.
    one: Vec<Token>,
    /// Tokens with at least two: they can contain a whole key.
    two: Vec<Token>,
}

impl QuoteTokens {
    pub(super) fn of(trie: &TokTrie) -> Self {
        let mut found = Self::default();
        for token in 0..trie.vocab_size() as Token {
            let quotes = bytes(trie, token).iter().filter(|byte| **byte == b'"').count();
            if quotes >= 1 {
                found.one.push(token);
            }
            if quotes >= 2 {
                found.two.push(token);
            }
        }
        found
    }
}

/// The position of a text in its JSON values, and the keys of the open objects.
#[derive(Clone, Debug, Default)]
pub(super) struct UniqueKeys {
    reasoning: Option<Reasoning>,
    open: Vec<Frame>,
    string: Option<Text>,
}

#[derive(Clone, Debug)]
enum Frame {
    Object { keys: Arc<HashSet<Vec<u8>>>, before_key: bool },
    Array,
}

#[derive(Clone, Debug)]
struct Text {
    is_key: bool,
    escaped: bool,
    /// The bytes of the current key as written; empty outside of keys.
    raw: Vec<u8>,
}

/// A reasoning block before the JSON, present if the text begins with its marker. It is free text:
/// its braces are ignored.
#[derive(Clone, Debug)]
struct Reasoning {
    open: Vec<u8>,
    close: Vec<u8>,
    inside: bool,
    /// Bytes that may be part of a marker.
    seen: Vec<u8>,
}

impl UniqueKeys {
    /// Tracks a text that may begin with a block between these markers.
    pub(super) fn after(reasoning: Option<&(String, String)>) -> Self {
        let reasoning = reasoning.map(|(open, close)| Reasoning {
            open: open.clone().into_bytes(),
            close: close.clone().into_bytes(),
            inside: false,
            seen: Vec::new(),
        });
        Self { reasoning, ..Self::default() }
    }

    /// Reads further bytes; returns false if they repeat a key.
    pub(super) fn push_all(&mut self, bytes: &[u8]) -> bool {
        let mut fine = true;
        for byte in bytes {
            // Read on even after a repeated key, so that the position stays correct.
            fine &= self.push(*byte);
        }
        fine
    }

    /// The tokens among `allowed` that would repeat a key at this position.
    pub(super) fn repeats<'t>(
        &'t self,
        trie: &'t TokTrie,
        tokens: &'t QuoteTokens,
        allowed: impl Fn(Token) -> bool + 't,
    ) -> impl Iterator<Item = Token> + 't {
        let in_key = self.string.as_ref().is_some_and(|text| text.is_key);
        let candidates: &[Token] = match () {
            () if self.open.is_empty() || self.reasoning.is_some() => &[],
            () if in_key => &tokens.one,
            () => &tokens.two,
        };
        let repeats =
            move |token: &Token| allowed(*token) && !self.clone().push_all(bytes(trie, *token));
        candidates.iter().copied().filter(repeats)
    }

    fn push(&mut self, byte: u8) -> bool {
        if self.reasoning.is_some() {
            return self.reason(byte);
        }
        let Some(text) = &mut self.string else {
            self.structure(byte);
            return true;
        };
        match byte {
            b'"' if !text.escaped => {
                let key = self.string.take().filter(|text| text.is_key);
                return key.is_none_or(|key| self.add(unescaped(key.raw)));
            }
            b'\\' if !text.escaped => text.escaped = true,
            _ => text.escaped = false,
        }
        if text.is_key {
            text.raw.push(byte);
        }
        true
    }

    /// Reads a byte outside of strings.
    fn structure(&mut self, byte: u8) {
        match (byte, self.open.last_mut()) {
            (b'{', _) => self.open.push(Frame::Object { keys: Arc::default(), before_key: true }),
            // Outside of all values there are markers, and lists of calls.
            (_, None) => {}
            (b'[', _) => self.open.push(Frame::Array),
            (b'}' | b']', _) => drop(self.open.pop()),
            (b'"', Some(frame)) => {
                let is_key = matches!(frame, Frame::Object { before_key: true, .. });
                self.string = Some(Text { is_key, escaped: false, raw: Vec::new() });
            }
            (b':', Some(Frame::Object { before_key, .. })) => *before_key = false,
            (b',', Some(Frame::Object { before_key, .. })) => *before_key = true,
            _ => {}
        }
    }

    /// Adds a key to the innermost object; returns false if the object already has it.
    fn add(&mut self, key: Vec<u8>) -> bool {
        match self.open.last_mut() {
            Some(Frame::Object { keys, .. }) => {
                !keys.contains(&key) && Arc::make_mut(keys).insert(key)
            }
            _ => true,
        }
    }

    fn reason(&mut self, byte: u8) -> bool {
        let Some(block) = &mut self.reasoning else { return true };
        block.seen.push(byte);
        if block.inside {
            if block.seen.ends_with(&block.close) {
                self.reasoning = None;
            } else if block.seen.len() >= block.close.len().max(1) {
                block.seen.remove(0);
            }
            return true;
        }
        let begun = block.seen.trim_ascii_start();
        if begun == block.open {
            block.inside = true;
            block.seen.clear();
        } else if !block.open.starts_with(begun) {
            // The text does not begin with a block.
            let seen = std::mem::take(&mut block.seen);
            self.reasoning = None;
            return self.push_all(&seen);
        }
        true
    }
}

/// A key without its escapes: `"a"` and `"\u0061"` are equal.
fn unescaped(raw: Vec<u8>) -> Vec<u8> {
    if !raw.contains(&b'\\') {
        return raw;
    }
    let quoted = [b"\"", &raw[..], b"\""].concat();
    serde_json::from_slice::<String>(&quoted).map_or(raw, String::into_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether a text has no duplicate keys.
    fn unique(text: &str) -> bool {
        UniqueKeys::default().push_all(text.as_bytes())
    }

    #[test]
    fn keys_are_those_of_one_object() {
        for (text, fine) in [
            (r#"{"a": 1, "b": 2}"#, true),
            (r#"{"a": 1, "a": 2}"#, false),
            (r#"{"a": 1, "\u0061": 2}"#, false),
            (r#"{"a\"": 1, "a": 2}"#, true),
            (r#"{"a\\": 1, "a\\": 2}"#, false),
            // Values are not keys, and each object has its own keys.
            (r#"{"a": "a", "b": ["a", "a", {"a": 1}], "c": {"a": "b"}}"#, true),
            (r#"{"b": [{"a": 1, "a": 2}]}"#, false),
            (r#"{"a": {"b": 1}, "a""#, false),
            (r#"{"a": "}", "a""#, false),
            (r#"{"a": 1, "a"#, true),
            // Two values, one after the other.
            (r#"<tool_call>{"a": 1}</tool_call><tool_call>{"a": 1}"#, true),
            (r#"[TOOL_CALLS][{"a": 1}, {"a": 1}]"#, true),
        ] {
            assert_eq!(unique(text), fine, "{text}");
        }
    }

    #[test]
    fn reasoning_is_free() {
        let markers = ("<think>".to_owned(), "</think>".to_owned());
        for (text, fine) in [
            (r#"<think>{"a", "a" { </think>{"a": 1, "b": 2}"#, true),
            (r#"<think>{"a", "a" { </think>{"a": 1, "a": 2}"#, false),
            (" \n<think></think>\n{\"a\": 1, \"a\": 2}", false),
            (r#"{"a": 1, "a": 2}"#, false),
            (r#"{"<think>": 1, "a": 2}"#, true),
            (r#"<think>{"a": 1, "a": 2}"#, true),
        ] {
            let mut keys = UniqueKeys::after(Some(&markers));
            assert_eq!(keys.push_all(text.as_bytes()), fine, "{text}");
        }
    }
}
