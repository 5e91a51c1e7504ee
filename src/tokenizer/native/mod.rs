//! A native tokenizer, built from a GGUF header alone, without weights or llama.cpp.
//!
//! | file | contents |
//! |---|---|
//! | `lexicon.rs` | tokens, their kinds and roles, as `llama_vocab::impl::load` resolves them |
//! | `marks.rs` | finds special tokens in a text before it is split |
//! | `pretokenize.rs` | the table of pre-tokenizers by name |
//! | `split.rs` | applies that table: splits a text into words |
//! | `bpe.rs` | byte-level BPE and BPE over characters (`gpt2`, `gemma4`) |
//! | `spm.rs` | SentencePiece's merges by score (`llama`) |
//!
//! The rules follow `src/llama-vocab.cpp` and `src/unicode.cpp` of llama.cpp, which is the oracle
//! of the tests. Time and memory are linear in the text, up to the logarithm of a heap.
//!
//! Of the crate `tokenizers` only the BPE merges are used. Its pre-tokenizers and added tokens
//! implement what the models' authors specified, and llama.cpp differs: it does not distinguish the
//! case of letters, does not know characters added after Unicode 15.1, and prefers the longest
//! special token over the first one. Also, the crate's expressions backtrack, and it cannot merge
//! by the score of the result (see `spm.rs`).

mod bpe;
mod lexicon;
mod marks;
mod pretokenize;
mod split;
mod spm;
#[cfg(test)]
mod tests;

use super::{Tokenizer, Vocab};
use crate::gguf::{Gguf, GgufError};
use crate::ipc::Token;
use bpe::Bpe;
use lexicon::Lexicon;
pub use lexicon::byte_chars;
use marks::{Fragment, Marks};
use spm::Spm;

/// The reason why no native tokenizer can be built from a header.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    #[error(transparent)]
    Header(#[from] GgufError),
    /// The file may be valid: use llama.cpp's vocabulary instead.
    #[error("the native tokenizer does not cover {0}")]
    NotCovered(String),
}

/// A vocabulary with its tokenization algorithm. Immutable.
pub struct NativeTokenizer {
    vocab: Vocab,
    marks: Marks,
    model: Model,
    /// Whether BOS is added before, and EOS after, a prompt.
    add_bos: bool,
    add_eos: bool,
}

enum Model {
    Bpe(Box<Bpe>),
    Spm(Box<Spm>),
}

impl NativeTokenizer {
    /// Builds a tokenizer from the `tokenizer.*` keys.
    ///
    /// # Errors
    /// [`NativeError::NotCovered`] for models other than BPE and SentencePiece's BPE and for
    /// pre-tokenizers that are not in the table; [`NativeError::Header`] if the keys contradict
    /// each other.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, NativeError> {
        let lexicon = Lexicon::read(gguf)?;
        let model = match lexicon.facts.model.as_deref() {
            Some("gpt2" | "gemma4") => Model::Bpe(Box::new(Bpe::new(gguf, &lexicon)?)),
            Some("llama") => Model::Spm(Box::new(Spm::new(gguf, &lexicon)?)),
            other => {
                let name = other.unwrap_or("");
                return Err(NativeError::NotCovered(format!("the tokenizer model '{name}'")));
            }
        };
        let bytes = matches!(&model, Model::Bpe(bpe) if bpe.is_byte_level());
        Ok(Self {
            vocab: lexicon.vocab(bytes),
            marks: Marks::new(gguf, &lexicon)?,
            // Gemma 4's files set this key to false although they need BOS (llama.cpp's pull
            // request 21500).
            add_bos: lexicon.facts.add_bos || lexicon.pre_is_gemma4(),
            add_eos: lexicon.facts.add_eos,
            model,
        })
    }
}

impl Tokenizer for NativeTokenizer {
    fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Vec<Token> {
        let mut tokens = Vec::new();
        if add_special && self.add_bos {
            tokens.extend(self.vocab.bos);
        }
        self.append(self.marks.cut(text, parse_special, &[]), true, &mut tokens);
        if add_special && self.add_eos {
            tokens.extend(self.vocab.eos);
        }
        tokens
    }

    fn encode_rendered(&self, text: &str, barriers: &[usize], add_special: bool) -> Vec<Token> {
        let mut tokens = Vec::new();
        if add_special && self.add_bos {
            tokens.extend(self.vocab.bos);
        }
        self.append(self.marks.cut(text, true, barriers), true, &mut tokens);
        tokens
    }

    fn adds_eos(&self) -> bool {
        self.add_eos && self.vocab.eos.is_some()
    }

    fn encode_continuation(
        &self,
        text: &str,
        parse_special: bool,
        barriers: &[usize],
    ) -> Vec<Token> {
        let mut tokens = Vec::new();
        self.append(self.marks.cut(text, parse_special, barriers), false, &mut tokens);
        tokens
    }
}

impl NativeTokenizer {
    /// Appends the tokens of a text's fragments. With `add_spaces`, SentencePiece adds a space
    /// before the text and after each special token.
    fn append(&self, fragments: Vec<Fragment>, add_spaces: bool, tokens: &mut Vec<Token>) {
        let mut starts = add_spaces;
        for fragment in fragments {
            match (fragment, &self.model) {
                (Fragment::Mark(token), _) => tokens.push(token),
                (Fragment::Text(text), Model::Bpe(bpe)) => bpe.encode(text, tokens),
                (Fragment::Text(text), Model::Spm(spm)) => spm.encode(text, starts, tokens),
            }
            starts = add_spaces && matches!(fragment, Fragment::Mark(_));
        }
    }
}
