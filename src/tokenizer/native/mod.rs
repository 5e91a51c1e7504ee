//! A tokenizer of our own, made from a GGUF header alone: no weights, no llama.cpp.
//!
//! | file | what |
//! |---|---|
//! | `lexicon.rs` | tokens, their kinds and roles, as `llama_vocab::impl::load` resolves them |
//! | `marks.rs` | special tokens found in a text before anything else |
//! | `pretokenize.rs` | the table of pre-tokenizers by name |
//! | `split.rs` | what runs that table: a text into words |
//! | `bpe.rs` | byte-level BPE and BPE over characters (`gpt2`, `gemma4`) |
//! | `spm.rs` | SentencePiece's merges by score (`llama`) |
//!
//! Everything follows `src/llama-vocab.cpp` and `src/unicode.cpp` of llama.cpp, which is the oracle
//! of the tests. Work and memory are linear in the text, up to the logarithm of a heap.
//!
//! Of the crate `tokenizers` only the merges of BPE are used. Its pre-tokenizers and added tokens do
//! what a model's authors wrote, and llama.cpp does not: it knows no case of letters and no
//! characters since Unicode 15.1, and its longest special token wins over the first one. Also, the
//! crate's expressions backtrack, and it cannot merge by the score of the result (see `spm.rs`).

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

/// Why a header makes no tokenizer here.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    #[error(transparent)]
    Header(#[from] GgufError),
    /// The file may be fine: llama.cpp's vocabulary is the one to use.
    #[error("the native tokenizer does not cover {0}")]
    NotCovered(String),
}

/// A vocabulary and the algorithm that goes with it. Immutable.
pub struct NativeTokenizer {
    vocab: Vocab,
    marks: Marks,
    model: Model,
    /// Whether BOS and EOS are put around a prompt.
    add_bos: bool,
    add_eos: bool,
}

enum Model {
    Bpe(Box<Bpe>),
    Spm(Box<Spm>),
}

impl NativeTokenizer {
    /// Reads the `tokenizer.*` keys.
    ///
    /// # Errors
    /// [`NativeError::NotCovered`] for models other than BPE and SentencePiece's BPE and for
    /// pre-tokenizers without a row in the table; [`NativeError::Header`] if the keys contradict
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
            // Gemma 4's files say no and mean yes (llama.cpp's pull request 21500).
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
    /// Appends the tokens of a text's fragments. With `add_spaces` SentencePiece puts a space in front of
    /// it, and behind each special token.
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
