//! The pairs of texts and tokens that llama.cpp keeps beside its vocabularies.

use super::{decode, folder, vocabularies};
use crate::engine::tokenizer::Tokenizer;
use crate::engine::tokenizer::native::{Model, NativeError, NativeTokenizer};
use crate::ipc::Token;
use std::fs;

/// Neither BPE nor SentencePiece's BPE.
const NOT_COVERED: &[&str] = &["bert-bge", "nomic-bert-moe"];

#[test]
fn every_vocabulary_tokenizes_as_its_file_says() {
    let Some(folder) = folder() else { return };
    let mut compared = 0;
    for (name, gguf) in vocabularies(&folder) {
        let tokenizer = match NativeTokenizer::from_gguf(&gguf) {
            Err(NativeError::NotCovered(_)) if NOT_COVERED.contains(&&*name) => continue,
            other => other.unwrap_or_else(|error| panic!("{name}: {error}")),
        };
        let read =
            |end: &str| fs::read_to_string(folder.join(format!("ggml-vocab-{name}.gguf.{end}")));
        let (Ok(texts), Ok(expected)) = (read("inp"), read("out")) else { continue };
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        for (text, line) in texts.iter().zip(expected.lines()) {
            let expected: Vec<Token> =
                line.split_whitespace().map(|id| id.parse().expect("a token")).collect();
            let found = tokenizer.encode(text, false, false);
            assert_eq!(found, expected, "{name}: {text:?}");
            compared += 1;
        }
        assert!(texts.len() >= expected.lines().count(), "{name}: a text for every line");
    }
    assert!(compared > 500, "some forty texts for each of fifteen files, not {compared}");
}

/// Vocabularies of bytes are complete: every text comes back.
#[test]
fn tokens_spell_the_text() {
    let Some(folder) = folder() else { return };
    let texts = super::corpus::texts(20_000);
    for (name, gguf) in vocabularies(&folder) {
        let Ok(tokenizer) = NativeTokenizer::from_gguf(&gguf) else { continue };
        if !matches!(&tokenizer.model, Model::Bpe(bpe) if bpe.is_byte_level()) {
            continue;
        }
        for text in &texts {
            let bytes = decode(&tokenizer, &tokenizer.encode(text, false, false));
            assert_eq!(String::from_utf8_lossy(&bytes), *text, "{name}");
        }
    }
}
