//! Tokenizers of new models: byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; bytes as in
//! GPT-2) trained on the data, single bytes, or the tokenizer of an existing model.
//!
//! A tokenizer is stored as the `tokenizer.*` keys of a GGUF, which llama.cpp and our own tokenizer
//! read. Tokens 0 to 255 are the bytes, token 256 is end-of-text, and the merges follow in order.
//! The pre-tokenizer is SmolLM's, which llama.cpp knows as `smollm`: it splits digits, then splits
//! as GPT-2 does.

use crate::dataset::{DataError, Texts};
use crate::gguf::{Array, Gguf, Value};
use crate::tokenizer::native::byte_chars;
use std::collections::HashSet;
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::{
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Result as Outcome, Trainer,
};

/// Maximum length, in letters, of the parts into which the trainer splits words.
const LONGEST_WORD: usize = 128;
/// Maximum number of bytes of text that merges are learned from, spread over the whole file.
const SAMPLE: u64 = 100 << 20;
const BYTES: usize = 256;
const END: &str = "<|endoftext|>";
/// The chat template of a model that has never seen a conversation: each message on its own line;
/// assistant messages end with the end-of-text token.
const TEMPLATE: &str = "{%- for message in messages -%}\
{{- (message.content or '') + (eos_token if message.role == 'assistant' else '\\n') -}}\
{%- endfor -%}";
/// `enum llama_token_type`
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

/// Why there is no tokenizer.
#[derive(Debug, thiserror::Error)]
pub enum VocabularyError {
    #[error(transparent)]
    Data(#[from] DataError),
    #[error("the tokenizer cannot be trained: {0}")]
    Trainer(String),
    #[error("the model has no tokenizer: take it from another")]
    None,
    #[error("the key '{0}' holds text that is not UTF-8, which a copy would change")]
    Lossy(String),
}

/// A tokenizer as GGUF keys.
#[derive(Debug, Clone, PartialEq)]
pub struct Vocabulary {
    keys: Vec<(String, Value)>,
    tokens: usize,
}

impl Vocabulary {
    /// The 256 bytes and the end-of-text token.
    pub fn bytes() -> Self {
        Self::of_merges(&[])
    }

    /// Learns merges from a file, until there are `size` tokens in all; fewer if no pair occurs
    /// twice in the remaining text.
    ///
    /// # Errors
    /// [`VocabularyError`].
    pub fn train(source: &Path, size: usize) -> Result<Self, VocabularyError> {
        if size <= BYTES + 1 {
            return Ok(Self::bytes());
        }
        let mut trainer = BpeTrainer::builder()
            .show_progress(false)
            // The end-of-text token is not part of the trained vocabulary.
            .vocab_size(size - 1)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut sample = Sample::open(source).map_err(DataError::from)?;
        trainer.feed(&mut sample, words).map_err(failed)?;
        if let Some(error) = sample.failed {
            return Err(error.into());
        }
        let mut model = BPE::default();
        trainer.train(&mut model).map_err(failed)?;
        let model = serde_json::to_value(&model).map_err(failed)?;
        let merges: Option<Vec<[String; 2]>> = serde_json::from_value(model["merges"].clone()).ok();
        let merges = merges.ok_or_else(|| failed("it has no list of merges"))?;
        Ok(Self::of_merges(&merges))
    }

    fn of_merges(merges: &[[String; 2]]) -> Self {
        let mut tokens: Vec<String> = byte_chars().iter().map(char::to_string).collect();
        tokens.push(END.into());
        let mut known: HashSet<String> = tokens.iter().cloned().collect();
        for [left, right] in merges {
            let token = format!("{left}{right}");
            if known.insert(token.clone()) {
                tokens.push(token);
            }
        }
        let mut kinds = vec![NORMAL; tokens.len()];
        kinds[BYTES] = CONTROL;
        let merges: Vec<_> = merges.iter().map(|[left, right]| format!("{left} {right}")).collect();
        let (end, count) = (Value::from(BYTES as u32), tokens.len());
        let keys = [
            ("tokenizer.ggml.model", "gpt2".into()),
            ("tokenizer.ggml.pre", "smollm".into()),
            ("tokenizer.ggml.tokens", tokens.into()),
            ("tokenizer.ggml.token_type", kinds.into()),
            ("tokenizer.ggml.merges", merges.into()),
            ("tokenizer.ggml.bos_token_id", end.clone()),
            ("tokenizer.ggml.eos_token_id", end),
            ("tokenizer.ggml.add_bos_token", false.into()),
            ("tokenizer.chat_template", TEMPLATE.into()),
        ];
        let keys = keys.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { keys, tokens: count }
    }

    /// The tokenizer of a model.
    ///
    /// # Errors
    /// If the model has no tokenizer that can be copied.
    pub fn of(model: &Gguf) -> Result<Self, VocabularyError> {
        if let Some(key) = model.lossy_keys().iter().find(|key| key.starts_with("tokenizer.")) {
            return Err(VocabularyError::Lossy(key.clone()));
        }
        let tokens = match model.get("tokenizer.ggml.tokens").and_then(Value::as_array) {
            Some(Array::String(tokens)) if !tokens.is_empty() => tokens.len(),
            _ => return Err(VocabularyError::None),
        };
        let own = model.metadata().filter(|(key, _)| key.starts_with("tokenizer."));
        let keys = own.map(|(key, value)| (key.to_owned(), value.clone())).collect();
        Ok(Self { keys, tokens })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens
    }

    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// The tokenizer's GGUF keys.
    pub fn keys(&self) -> &[(String, Value)] {
        &self.keys
    }
}

fn failed(error: impl std::fmt::Display) -> VocabularyError {
    VocabularyError::Trainer(error.to_string())
}

/// The words of a text, in the alphabet of byte-level BPE.
fn words(text: &str) -> Outcome<Vec<String>> {
    let mut pieces = PreTokenizedString::from(text);
    Digits::new(true).pre_tokenize(&mut pieces)?;
    ByteLevel::new(false, true, true).pre_tokenize(&mut pieces)?;
    let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().flat_map(|(word, _, _)| parts(word)).collect())
}

/// Splits a word into parts of bounded length. A merge visits all pairs of every word that contains
/// it, so a word as long as the text would take quadratic time.
fn parts(word: &str) -> impl Iterator<Item = String> + '_ {
    let mut rest = word.chars();
    std::iter::from_fn(move || {
        let part: String = rest.by_ref().take(LONGEST_WORD).collect();
        (!part.is_empty()).then_some(part)
    })
}

/// Documents of a file, [`SAMPLE`] bytes in total, evenly spread over the file.
struct Sample {
    texts: Texts,
    size: u64,
    taken: u64,
    ready: std::vec::IntoIter<String>,
    failed: Option<DataError>,
}

impl Sample {
    fn open(path: &Path) -> std::io::Result<Self> {
        let (texts, size) = (Texts::open(path)?, path.metadata()?.len());
        Ok(Self { texts, size, taken: 0, ready: Vec::new().into_iter(), failed: None })
    }
}

impl Iterator for Sample {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        loop {
            if let Some(text) = self.ready.next() {
                return Some(text);
            }
            let pieces = match self.texts.next_chunk() {
                Ok(pieces) if pieces.is_empty() => return None,
                Ok(pieces) => pieces,
                Err(error) => {
                    self.failed = Some(error);
                    return None;
                }
            };
            // The fraction of the file read so far is the fraction of the sample to take.
            let share = self.texts.bytes() as f64 / self.size.max(1) as f64;
            let due = (SAMPLE.min(self.size) as f64 * share) as u64;
            let mut taken = Vec::new();
            for piece in pieces {
                if self.taken >= due {
                    break;
                }
                self.taken += piece.text.len() as u64;
                taken.push(piece.text);
            }
            self.ready = taken.into_iter();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufWriter;
    use crate::template::{ChatTemplate, RenderInput};
    use crate::tokenizer::Tokenizer;
    use crate::tokenizer::native::NativeTokenizer;
    use serde_json::{Value as Json, json};

    const TEXT: &str = "ROMEO:\nBut, soft! what light through yonder window breaks?\n\nIt is the \
                        east, and Juliet is the sun. 1597 éà 文字 the the the 'tis don't\t \n";

    fn native(vocabulary: &Vocabulary) -> NativeTokenizer {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vocab.gguf");
        let mut writer = GgufWriter::new();
        writer.set("general.architecture", "llama");
        for (key, value) in vocabulary.keys() {
            writer.set(key, value.clone());
        }
        writer.write(&path).unwrap();
        NativeTokenizer::from_gguf(&Gguf::open_header(&path).unwrap()).unwrap()
    }

    #[test]
    fn words_are_bounded() {
        for (length, parts) in [(0, 0), (1, 1), (128, 1), (129, 2), (300, 3)] {
            let word = "é".repeat(length);
            let found: Vec<String> = super::parts(&word).collect();
            assert_eq!((found.len(), found.concat()), (parts, word), "{length}");
        }
        // This would take minutes if it were one word of two million letters.
        let one = trained(&"a".repeat(2_000_000), 300);
        assert!(one.len() > BYTES + 1);
    }

    fn trained(text: &str, size: usize) -> Vocabulary {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.txt");
        std::fs::write(&path, text).unwrap();
        Vocabulary::train(&path, size).unwrap()
    }

    #[test]
    fn bytes_are_their_own_tokens() {
        let vocabulary = trained(TEXT, 256);
        assert_eq!(vocabulary.len(), 257);
        let tokenizer = native(&vocabulary);
        let expected: Vec<u32> = TEXT.bytes().map(u32::from).collect();
        assert_eq!(tokenizer.encode(TEXT, true, true), expected);
        assert_eq!((tokenizer.vocab().bos, tokenizer.vocab().eos), (Some(256), Some(256)));
        assert!(tokenizer.vocab().ends_generation(256));
        assert_eq!(tokenizer.encode("a<|endoftext|>", false, true), [97, 256]);
    }

    #[test]
    fn merges_come_in_the_order_of_their_counts() {
        // By hand: `th` and `he` are equally frequent, and the lower ids win: `he`.
        let vocabulary = trained("the the the hat", 259);
        let merges = vocabulary.keys.iter().find(|(key, _)| key.ends_with("merges")).unwrap();
        let merges = merges.1.as_array().unwrap().as_strings().unwrap();
        assert_eq!(merges, ["h e", "t he"]);
        assert_eq!(native(&vocabulary).encode("the hat", false, false).len(), 5);
    }

    #[test]
    fn texts_come_back_and_the_same_data_gives_the_same_tokens() {
        let text = TEXT.repeat(300);
        let vocabulary = trained(&text, 300);
        assert_eq!(vocabulary.len(), 300);
        assert_eq!(trained(&text, 300), vocabulary);
        let tokenizer = native(&vocabulary);
        let tokens = tokenizer.encode(TEXT, false, false);
        assert!(tokens.len() < TEXT.len() * 3 / 4, "{} of {}", tokens.len(), TEXT.len());
        let pieces = tokens.iter().flat_map(|token| tokenizer.vocab().piece(*token));
        assert_eq!(pieces.copied().collect::<Vec<u8>>(), TEXT.as_bytes());
    }

    #[test]
    fn pieces_of_a_text_have_its_tokens() {
        let text = TEXT.repeat(9000);
        let tokenizer = native(&trained(&text, 400));
        let folder = tempfile::tempdir().unwrap();
        let (source, cache) = (folder.path().join("data"), folder.path().join("data.bin"));
        std::fs::write(&source, &text).unwrap();
        let (stream, report) =
            crate::train::data::prepare_stream(&source, &tokenizer, &cache, |_| {}).unwrap();
        let mut whole = tokenizer.encode(&text, false, false);
        whole.push(256);
        assert_eq!(stream.read(0, whole.len()).unwrap(), whole);
        assert_eq!((report.examples, report.tokens), (1, whole.len() as u64));
        assert_eq!(report.bytes, text.len() as u64);
    }

    #[test]
    fn conversations_render_as_text() {
        let template = ChatTemplate::compile(TEMPLATE, None, END, END).unwrap();
        let render = |messages: Json, add_generation_prompt| {
            let Json::Array(messages) = messages else { panic!("a list") };
            let input = RenderInput { messages, add_generation_prompt, ..RenderInput::default() };
            template.render(&input).unwrap()
        };
        let user = json!({"role": "user", "content": "ROMEO:"});
        assert_eq!(render(json!([user.clone()]), true), "ROMEO:\n");
        let answer = json!({"role": "assistant", "content": "Ay me!"});
        assert_eq!(render(json!([user, answer]), false), "ROMEO:\nAy me!<|endoftext|>");
    }
}
