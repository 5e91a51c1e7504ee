//! The model's vocabulary in llguidance's form: a trie of token bytes and a tokenizer.

use crate::ipc::{EngineError, Token};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

/// Longest token that grammars may use, in bytes: toktrie asserts at 1024.
const MAX_TOKEN_BYTES: usize = 1000;

/// Converts bytes (not always UTF-8) into plain tokens: neither adds nor parses special tokens.
pub type Tokenize = Arc<dyn Fn(&[u8]) -> Vec<Token> + Send + Sync>;

/// One token of the vocabulary.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VocabToken {
    /// The token's text; for a control token its name, such as `<tool_call>`. If empty, grammars
    /// never use the token.
    pub bytes: Vec<u8>,
    /// A control token: never part of a grammar's text. A Lark grammar refers to it as
    /// `<tool_call>`, or as `<[id]>` if its text does not have that form.
    pub special: bool,
}

/// The input of a [`GrammarEngine`](super::GrammarEngine).
pub struct VocabSource {
    /// All tokens of the model, in id order.
    pub tokens: Vec<VocabToken>,
    /// Tokens that end a generation; they are special regardless of their flag. May be empty: then
    /// a finished grammar's mask is empty too, and the caller must end the sequence.
    pub eos: Vec<Token>,
    /// The model's own tokenizer, so that forced text is tokenized as the model knows it. May be
    /// approximate: a result that does not spell the input is replaced by the greedy longest match.
    pub tokenize: Tokenize,
}

/// Adapts the model's tokenizer to toktrie.
struct Tokenizer {
    trie: TokTrie,
    tokenize: Tokenize,
}

impl TokenizerEnv for Tokenizer {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<Token> {
        let tokens = (self.tokenize)(bytes);
        if spells(&self.trie, &tokens, bytes) { tokens } else { self.trie.greedy_tokenize(bytes) }
    }
}

/// Whether these tokens spell exactly these bytes, without control tokens.
pub(super) fn spells(trie: &TokTrie, tokens: &[Token], bytes: &[u8]) -> bool {
    let mut rest = bytes;
    for &token in tokens {
        let piece = trie.token(token);
        if piece.is_empty() || trie.is_special_token(token) {
            return false;
        }
        match rest.strip_prefix(piece) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    rest.is_empty()
}

/// Builds the token environment.
///
/// # Errors
/// An internal error if the vocabulary is empty or larger than toktrie can hold.
pub(super) fn token_env(source: VocabSource) -> Result<TokEnv, EngineError> {
    let VocabSource { tokens, eos, tokenize } = source;
    let size = tokens.len();
    if size == 0 || size >= 1 << 24 {
        return Err(EngineError::internal(format!(
            "grammars need a vocabulary of 1 to {} tokens, not {size}",
            (1 << 24) - 1
        )));
    }
    let eos: Vec<Token> = eos.into_iter().filter(|&token| (token as usize) < size).collect();
    let mut words: Vec<Vec<u8>> = tokens
        .into_iter()
        .map(|token| match token {
            VocabToken { bytes, .. } if bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
            VocabToken { bytes, special: true } => marked(bytes),
            // A longer text that begins with the marker would be mistaken for a control token.
            // Valid UTF-8 never contains that byte.
            VocabToken { bytes, .. } if bytes.len() > 1 && bytes[0] == MARKER => Vec::new(),
            VocabToken { bytes, .. } => bytes,
        })
        .collect();
    for &token in &eos {
        let word = &mut words[token as usize];
        if word.first() != Some(&MARKER) {
            *word = marked(std::mem::take(word));
        }
    }
    let info = TokRxInfo::new(size as u32, eos.first().copied().unwrap_or(INVALID_TOKEN));
    // Duplicate tokens have no place in the trie. toktrie asserts that its nodes fit 22 bits, which
    // only a hostile vocabulary can violate.
    let trie = catch_unwind(AssertUnwindSafe(|| {
        let trie = TokTrie::from(&info, &words);
        if eos.is_empty() { trie } else { trie.with_eos_tokens(&eos) }
    }))
    .map_err(|_| EngineError::internal("the vocabulary is too large for grammars"))?;
    Ok(Arc::new(Tokenizer { trie, tokenize }))
}

const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// toktrie marks control tokens with a byte that no UTF-8 text contains.
fn marked(text: Vec<u8>) -> Vec<u8> {
    if text.is_empty() {
        return text;
    }
    let mut word = Vec::with_capacity(text.len() + 1);
    word.push(MARKER);
    word.extend(text);
    word
}
