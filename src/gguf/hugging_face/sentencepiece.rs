//! `tokenizer.model`: SentencePiece's own file, a protocol buffer
//! (`src/sentencepiece_model.proto` of google/sentencepiece), of which a few fields are read.

use super::ConvertError;
use super::folder::TOKENIZER_MODEL;
use super::tokenizer::{BYTE, Base, CONTROL, NORMAL, Token, UNKNOWN, UNUSED, USER_DEFINED};
use std::collections::BTreeMap;

/// `TrainerSpec.ModelType.BPE`
const BPE: u64 = 2;

/// Reads the file's bytes.
pub(super) fn read(bytes: &[u8]) -> Result<Base, ConvertError> {
    let wrong = |reason: &str| ConvertError::new(TOKENIZER_MODEL, reason);
    let torn = || wrong("it is torn, or no file of SentencePiece: download it again");
    let mut tokens = BTreeMap::new();
    // The format's defaults: unigram, a space in front.
    let (mut kind, mut prefix) = (1, true);
    for field in Fields(bytes) {
        match field.ok_or_else(torn)? {
            (1, Field::Bytes(piece)) => {
                let token = token(piece).ok_or_else(torn)?;
                tokens.insert(tokens.len() as u64, token);
            }
            (2, Field::Bytes(trainer)) => {
                kind = number(trainer, 3).ok_or_else(torn)?.unwrap_or(1);
            }
            (3, Field::Bytes(normalizer)) => {
                prefix = number(normalizer, 3).ok_or_else(torn)?.unwrap_or(1) != 0;
            }
            _ => {}
        }
    }
    if tokens.is_empty() {
        return Err(torn());
    }
    if kind != BPE {
        return Err(wrong(
            "its type is not BPE, and a GGUF of this architecture knows no other tokenizer of \
             SentencePiece",
        ));
    }
    Ok(Base {
        model: "llama",
        pre: "default",
        tokens,
        scored: true,
        merges: Vec::new(),
        space_prefix: Some(prefix),
    })
}

/// `ModelProto.SentencePiece`: its text, score and type.
fn token(message: &[u8]) -> Option<Token> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, NORMAL);
    for field in Fields(message) {
        match field? {
            (1, Field::Bytes(bytes)) => text = String::from_utf8(bytes.to_vec()).ok()?,
            (2, Field::Four(bits)) => score = f32::from_bits(bits),
            (3, Field::Number(number)) => {
                kind = match number {
                    2 => UNKNOWN,
                    3 => CONTROL,
                    4 => USER_DEFINED,
                    5 => UNUSED,
                    6 => BYTE,
                    _ => NORMAL,
                }
            }
            _ => {}
        }
    }
    score.is_finite().then_some(Token { text, kind, score })
}

/// The last number in a field of a message; in protocol buffers the last value counts.
fn number(message: &[u8], wanted: u64) -> Option<Option<u64>> {
    let mut found = None;
    for field in Fields(message) {
        if let (field, Field::Number(number)) = field?
            && field == wanted
        {
            found = Some(number);
        }
    }
    Some(found)
}

/// A field by its wire type.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Four(u32),
    Eight,
}

/// The fields of a message; ends with `None` if the message is truncated.
struct Fields<'a>(&'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<(u64, Field<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.varint()?;
        let field = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => self.take(8).map(|_| Field::Eight)?,
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Four(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, field))
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// Reads a varint: seven bits per byte, the lowest first.
    fn varint(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for at in 0..10 {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f).checked_shl(7 * at)?;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }
}
