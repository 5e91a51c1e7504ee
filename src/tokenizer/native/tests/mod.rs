mod against_llama;
mod bounds;
mod corpus;
mod rules;

use super::NativeTokenizer;
use super::lexicon::byte_chars;
use super::pretokenize::{Pre, Step};
use super::split::Splitter;
use crate::gguf::{Gguf, GgufWriter};
use crate::ipc::Token;
use crate::tokenizer::Tokenizer;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The folder with `ggml-vocab-*.gguf` from `scripts/vocabs.sh`; `None` to skip a test.
fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("INGOT_TEST_VOCABS").map(PathBuf::from);
    if folder.is_none() {
        let ci = std::env::var_os("CI").is_some();
        assert!(!ci, "INGOT_TEST_VOCABS must name the folder that scripts/vocabs.sh makes");
        eprintln!("SKIPPED: run scripts/vocabs.sh and set INGOT_TEST_VOCABS to its folder");
    }
    folder
}

/// A vocabulary's name, its header and its path.
type Vocabulary = (String, Gguf, PathBuf);

/// The default model's vocabulary; always present in CI.
fn default_model() -> Option<Vocabulary> {
    let path = std::env::var_os("INGOT_TEST_MODEL").map(PathBuf::from);
    assert!(path.is_some() || std::env::var_os("CI").is_none(), "CI sets INGOT_TEST_MODEL");
    let gguf = Gguf::open_header(path.as_ref()?).expect("the default model is a GGUF file");
    Some(("default model".to_owned(), gguf, path?))
}

/// The vocabularies in `folder` by name, such as `gpt-2`.
fn vocabularies(folder: &Path) -> Vec<Vocabulary> {
    let files = std::fs::read_dir(folder).expect("the folder exists");
    let mut found: Vec<_> = files
        .filter_map(|file| {
            let path = file.expect("readable").path();
            let name = path.file_name()?.to_str()?.to_owned();
            let name = name.strip_prefix("ggml-vocab-")?.strip_suffix(".gguf")?.to_owned();
            Some((name, Gguf::open_header(&path).expect("a GGUF file"), path))
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(found.len() >= 15, "some twenty vocabularies, not {}", found.len());
    found
}

/// A tokenizer built from header keys set by a test.
fn made(set: impl FnOnce(&mut GgufWriter<'static>)) -> NativeTokenizer {
    try_made(set).unwrap_or_else(|error| panic!("{error}"))
}

fn try_made(
    set: impl FnOnce(&mut GgufWriter<'static>),
) -> Result<NativeTokenizer, super::NativeError> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vocab.gguf");
    let mut writer = GgufWriter::new();
    set(&mut writer);
    writer.write(&path).expect("written");
    NativeTokenizer::from_gguf(&Gguf::open_header(&path).expect("a GGUF file"))
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

fn decode(tokenizer: &NativeTokenizer, tokens: &[Token]) -> Vec<u8> {
    tokens.iter().flat_map(|&token| tokenizer.vocab().piece(token)).copied().collect()
}

/// The names of all pre-tokenizers in llama.cpp, except `whitespace`.
const NAMES: &[&str] = &[
    "default",
    "minicpm5",
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "spark2_5",
    "youtu",
    "falcon",
    "mpt",
    "starcoder",
    "gpt-2",
    "phi-2",
    "jina-es",
    "jina-de",
    "gigachat",
    "jina-v2-es",
    "jina-v2-de",
    "a.x-4.0",
    "mellum",
    "modern-bert",
    "jais-2",
    "gemma4",
    "granite-embed-multi-311m",
    "mmbert",
    "sarvam-moe",
    "jina-v1-en",
    "jina-v2-code",
    "roberta-bpe",
    "refact",
    "command-r",
    "qwen2",
    "deepseek-r1-qwen",
    "kormo",
    "f2llmv2",
    "qwen35",
    "stablelm2",
    "olmo",
    "dbrx",
    "smaug-bpe",
    "poro-chat",
    "chatglm-bpe",
    "glm4",
    "glm5",
    "viking",
    "jais",
    "tekken",
    "smollm",
    "codeshell",
    "bloom",
    "gpt3-finnish",
    "exaone",
    "exaone4",
    "exaone-moe",
    "chameleon",
    "minerva-7b",
    "megrez",
    "gpt-4o",
    "llama4",
    "kanana2",
    "talkie",
    "granite-embed-multi-97m",
    "tiny_aya",
    "cohere2moe",
    "superbpe",
    "trillion",
    "granite-docling",
    "bailingmoe",
    "bailingmoe2",
    "llada-moe",
    "seed-coder",
    "hunyuan",
    "hunyuan-dense",
    "hy_v4",
    "joyai-llm",
    "kimi-k2",
    "ufakzeka",
    "grok-2",
    "afmoe",
    "laguna",
    "minimax-m2",
    "solar-open",
    "mellum2",
];

/// A splitter for each row of the table, keyed by one of the row's names; compiled once per
/// process.
fn splitters() -> &'static BTreeMap<&'static str, Splitter> {
    static MADE: OnceLock<BTreeMap<&'static str, Splitter>> = OnceLock::new();
    MADE.get_or_init(|| {
        let mut rows: Vec<&[Step]> = Vec::new();
        let mut made = BTreeMap::new();
        for &name in NAMES {
            let steps = Pre::by_name(name).expect("in the table").steps;
            if !rows.contains(&steps) {
                rows.push(steps);
                made.insert(name, Splitter::new(steps));
            }
        }
        made
    })
}

/// A vocabulary of the 256 bytes, one merge and one mark.
fn every_byte() -> &'static NativeTokenizer {
    static MADE: OnceLock<NativeTokenizer> = OnceLock::new();
    MADE.get_or_init(|| {
        let mut tokens: Vec<String> = byte_chars().iter().map(char::to_string).collect();
        tokens.extend(strings(&["th", "<|x|>"]));
        let mut types = vec![1i32; tokens.len()];
        types[257] = 3;
        made(|w| {
            w.set("tokenizer.ggml.model", "gpt2")
                .set("tokenizer.ggml.pre", "llama-bpe")
                .set("tokenizer.ggml.tokens", tokens)
                .set("tokenizer.ggml.token_type", types)
                .set("tokenizer.ggml.merges", strings(&["t h"]));
        })
    })
}
