//! [`Lexicon`]: every token with its text and kind, and the roles that llama.cpp derives from
//! texts.
//!
//! Source: `llama_vocab::impl::load` and `token_to_piece` in `src/llama-vocab.cpp`.

use super::NativeError;
use crate::gguf::{Array, Gguf, GgufError, SpecialToken, TokenizerFacts, Value};
use crate::ipc::Token;
use crate::tokenizer::Vocab;
use std::collections::{BTreeSet, HashMap};
use tokenizers::models::bpe::Vocab as Ids;

const TOKENS: &str = "tokenizer.ggml.tokens";
pub(super) const MERGES: &str = "tokenizer.ggml.merges";
/// SentencePiece writes a space as this character.
pub(super) const SPACE: &str = "\u{2581}";

/// The kind of a token (`enum llama_token_type`). llama.cpp keeps a set of attributes; if it adds
/// "control" to another attribute, only "control" has an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Undefined,
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    fn from_number(number: i32) -> Kind {
        match number {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => Kind::Undefined,
        }
    }

    /// Whether the token is matched in a text by its spelling, before the text is split.
    pub(super) fn is_mark(self) -> bool {
        matches!(self, Kind::Control | Kind::UserDefined | Kind::Unknown)
    }
}

/// Texts of tokens that end generation.
const ENDS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];
/// Tokens that are shown as text regardless of the file (gpt-oss).
const SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];
/// Infill roles that end generation: identified by key, otherwise by the first of the texts that
/// exists.
const INFILL_ENDS: &[(&str, &[&str])] = &[
    ("fim_pad", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    ("fim_rep", &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"]),
    ("fim_sep", &["<|file_sep|>"]),
];

/// A vocabulary read from a file. Only needed to construct a tokenizer.
pub(super) struct Lexicon {
    pub facts: TokenizerFacts,
    /// By token id.
    pub texts: Vec<String>,
    pub kinds: Vec<Kind>,
    /// Token ids by text; the crate's map type, which hashes faster than the standard library's.
    pub ids: Ids,
    ends: BTreeSet<Token>,
}

impl Lexicon {
    pub(super) fn read(gguf: &Gguf) -> Result<Self, NativeError> {
        let mut facts = TokenizerFacts::read(gguf)?;
        let listed = gguf.strings(TOKENS)?.ok_or_else(|| GgufError::MissingKey(TOKENS.into()))?;
        if gguf.lossy_keys().iter().any(|key| key == TOKENS || key == MERGES) {
            return Err(not_covered("a vocabulary that is not UTF-8"));
        }
        // As in llama.cpp: an empty token gets a name, so that it is never matched.
        let named = |(id, text): (usize, &String)| match text.is_empty() {
            true => format!("[EMPTY_{id}]"),
            false => text.clone(),
        };
        let texts: Vec<String> = listed.iter().enumerate().map(named).collect();
        let ids: Ids = texts.iter().cloned().zip(0..).collect();
        if ids.len() < texts.len() {
            return Err(not_covered("a vocabulary that lists a token twice"));
        }
        if is_glm(facts.pre.as_deref()) && !has_key(gguf, "bos", texts.len()) {
            facts.bos = None;
        }
        let kinds = read_kinds(gguf, texts.len())?;
        let mut lexicon = Self { facts, texts, kinds, ids, ends: BTreeSet::new() };
        lexicon.assign_roles(gguf);
        Ok(lexicon)
    }

    pub(super) fn id(&self, text: &str) -> Option<Token> {
        self.ids.get(text).copied()
    }

    /// Tokens that are matched in a text by their spelling.
    pub(super) fn marks(&self) -> impl Iterator<Item = Token> {
        (0..self.texts.len()).filter(|&at| self.kinds[at].is_mark()).map(|at| at as Token)
    }

    pub(super) fn text(&self, token: Token) -> &str {
        &self.texts[token as usize]
    }

    pub(super) fn kind(&self, token: Token) -> Kind {
        self.kinds[token as usize]
    }

    /// The name of the pre-tokenizer; the `gemma4` model implies its own.
    pub(super) fn pre(&self) -> &str {
        match self.facts.model.as_deref() {
            Some("gemma4") => "gemma4",
            _ => self.facts.pre.as_deref().unwrap_or(""),
        }
    }

    pub(super) fn pre_is_gemma4(&self) -> bool {
        let bpe = self.facts.model.as_deref() != Some("llama");
        bpe && matches!(self.pre(), "gemma4" | "granite-embed-multi-311m")
    }

    /// Assigns token roles. Later rules override earlier ones, as in llama.cpp.
    fn assign_roles(&mut self, gguf: &Gguf) {
        let facts = &self.facts;
        let id = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.id);
        let infill = [
            (["prefix", "fim_pre"], id(&facts.fim_pre)),
            (["suffix", "fim_suf"], id(&facts.fim_suf)),
            (["middle", "fim_mid"], id(&facts.fim_mid)),
        ];
        let by_key: Vec<Token> =
            [&facts.eos, &facts.eot, &facts.eom].into_iter().filter_map(id).collect();
        for (keys, token) in infill {
            // A token found by its text, not by its key, becomes a control token.
            if !keys.iter().any(|key| has_key(gguf, key, self.texts.len())) {
                self.set(token, Kind::Control);
            }
        }
        for (key, texts) in INFILL_ENDS {
            let token = self.by_key(gguf, key).or_else(|| {
                let token = texts.iter().find_map(|text| self.id(text));
                self.set(token, Kind::Control);
                token
            });
            self.ends.extend(token);
        }
        for text in ENDS {
            let token = self.id(text);
            self.set(token, Kind::Control);
            self.ends.extend(token);
        }
        for text in SHOWN {
            self.set(self.id(text), Kind::UserDefined);
        }
        self.ends.extend(by_key);
        self.take_back_ends();
    }

    /// Unmarks two texts that end generation in most vocabularies, but not if certain other tokens
    /// exist.
    fn take_back_ends(&mut self) {
        let ends = |text: &str| self.id(text).filter(|token| self.ends.contains(token));
        let calls = ends("<|call|>").or(ends("<|calls|>")).is_some();
        let harmony = calls && (ends("<|return|>").is_some() || ends("<|flush|>").is_some());
        let normal_s = ends("<|tool_response>").or(ends("<|plamo:eos|>")).is_some();
        let end = ends("<|end|>").filter(|_| harmony);
        let s = ends("</s>").filter(|_| normal_s);
        for (token, kind) in [(end, Kind::UserDefined), (s, Kind::Normal)] {
            self.set(token, kind);
            self.ends.retain(|&end| Some(end) != token);
        }
    }

    fn set(&mut self, token: Option<Token>, kind: Kind) {
        if let Some(token) = token {
            self.kinds[token as usize] = kind;
        }
    }

    fn by_key(&self, gguf: &Gguf, name: &str) -> Option<Token> {
        keyed(gguf, name).filter(|&id| (id as usize) < self.texts.len())
    }

    /// The tokens' bytes and roles; `bytes` means that texts are spelled in GPT-2's byte alphabet.
    pub(super) fn vocab(&self, bytes: bool) -> Vocab {
        let decode = bytes.then(byte_values);
        let pieces = self.texts.iter().zip(&self.kinds).zip(0..).map(|((text, kind), token)| {
            let piece = piece(text, *kind, decode.as_ref());
            (piece, *kind == Kind::Control, self.ends.contains(&token))
        });
        let mut vocab = Vocab::new(pieces);
        let id = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.id);
        let facts = &self.facts;
        vocab.bos = id(&facts.bos);
        vocab.eos = id(&facts.eos);
        vocab.infill = match (id(&facts.fim_pre), id(&facts.fim_suf), id(&facts.fim_mid)) {
            (Some(prefix), Some(suffix), Some(middle)) => Some([prefix, suffix, middle]),
            _ => None,
        };
        vocab
    }
}

pub(super) fn not_covered(what: impl Into<String>) -> NativeError {
    NativeError::NotCovered(what.into())
}

/// GLM vocabularies have no BOS by default, unlike other BPE vocabularies.
fn is_glm(pre: Option<&str>) -> bool {
    matches!(pre, Some("chatglm-bpe" | "glm4" | "glm5"))
}

fn keyed(gguf: &Gguf, name: &str) -> Option<u32> {
    gguf.u32(&format!("tokenizer.ggml.{name}_token_id")).ok().flatten()
}

/// Whether a key names a token for the role; ids beyond the vocabulary's end are ignored.
fn has_key(gguf: &Gguf, name: &str, n_tokens: usize) -> bool {
    keyed(gguf, name).is_some_and(|id| (id as usize) < n_tokens)
}

fn read_kinds(gguf: &Gguf, n_tokens: usize) -> Result<Vec<Kind>, NativeError> {
    let key = "tokenizer.ggml.token_type";
    match gguf.get(key) {
        None => Ok(vec![Kind::Normal; n_tokens]),
        Some(Value::Array(Array::I32(types))) if types.len() >= n_tokens => {
            Ok(types[..n_tokens].iter().map(|&number| Kind::from_number(number)).collect())
        }
        Some(Value::Array(Array::I32(types))) => {
            let n = types.len();
            Err(GgufError::Malformed(format!("{key} lists {n} of {n_tokens} tokens")).into())
        }
        Some(other) => Err(GgufError::WrongType {
            key: key.to_owned(),
            wanted: "an array of i32",
            found: other.type_name(),
        }
        .into()),
    }
}

/// A token's bytes; empty for kinds that are not used in text.
fn piece(text: &str, kind: Kind, decode: Option<&HashMap<char, u8>>) -> Vec<u8> {
    match kind {
        Kind::Control | Kind::Unknown | Kind::UserDefined => text.as_bytes().to_vec(),
        Kind::Normal => match decode {
            Some(values) => spelled_bytes(text, values),
            None => text.replace(SPACE, " ").into_bytes(),
        },
        // `<0x0A>`
        Kind::Byte => {
            let digits = text.get(3..5).unwrap_or("");
            vec![u8::from_str_radix(digits, 16).unwrap_or(0)]
        }
        Kind::Unused | Kind::Undefined => Vec::new(),
    }
}

/// The bytes that a byte-level text represents; for a character outside the alphabet, llama.cpp's
/// replacement text.
fn spelled_bytes(text: &str, values: &HashMap<char, u8>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    for c in text.chars() {
        if let Some(&value) = values.get(&c) {
            bytes.push(value);
            continue;
        }
        let code: String =
            c.encode_utf8(&mut [0; 4]).bytes().map(|byte| format!("{byte:02x}")).collect();
        bytes.extend(format!("[UNK_BYTE_0x{code}{text}]").into_bytes());
    }
    bytes
}

/// The characters that represent bytes in byte-level BPE (`bytes_to_unicode` of GPT-2): printable
/// Latin-1 represents itself, the other bytes get characters from U+0100 on.
pub fn byte_chars() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| match byte as u8 {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte as u8),
        _ => {
            next += 1;
            char::from_u32(next - 1).expect("U+0100 to U+0143 are characters")
        }
    })
}

fn byte_values() -> HashMap<char, u8> {
    byte_chars().into_iter().zip(0..=255).collect()
}
