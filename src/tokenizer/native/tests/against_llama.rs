//! Compares with llama.cpp's tokenizer as the oracle, on the same files without their weights.

use super::{NAMES, corpus, default_model, folder, vocabularies};
use crate::engine::runner::llama_cpp;
use crate::gguf::{Gguf, GgufWriter};
use crate::ipc::Token;
use crate::tokenizer::native::pretokenize::{Pre, Units};
use crate::tokenizer::native::{NativeError, NativeTokenizer};
use crate::tokenizer::{Tokenizer, Vocab};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// Stack size in bytes: llama.cpp's expressions recurse once per character of a match.
const STACK: usize = 256 << 20;
/// (add special tokens, parse special tokens): all combinations that a request can ask for.
const FLAGS: [(bool, bool); 3] = [(false, false), (true, true), (false, true)];

fn oracle(path: &Path) -> Arc<dyn Tokenizer> {
    llama_cpp::tokenizer(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Compares all properties of two vocabularies.
fn compare_facts(what: &str, ours: &Vocab, theirs: &Vocab) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let roles = |vocab: &Vocab| (vocab.bos, vocab.eos, vocab.infill);
    assert_eq!(roles(ours), roles(theirs), "{what}");
    for token in 0..ours.len() as Token {
        let facts = |v: &Vocab| {
            let piece = String::from_utf8_lossy(v.piece(token)).into_owned();
            (piece, v.piece(token).len(), v.is_control(token), v.ends_generation(token))
        };
        assert_eq!(facts(ours), facts(theirs), "{what}: token {token}");
    }
}

fn compare(
    what: &str,
    native: &NativeTokenizer,
    oracle: &dyn Tokenizer,
    texts: &[String],
    flags: &[(bool, bool)],
) {
    for text in texts {
        for &(add, parse) in flags {
            let found = native.encode(text, add, parse);
            if found != oracle.encode(text, add, parse) {
                report(what, native, oracle, text, (add, parse));
            }
        }
    }
}

/// Panics with the first token that differs and the text around it.
fn report(
    what: &str,
    native: &NativeTokenizer,
    oracle: &dyn Tokenizer,
    text: &str,
    (add, parse): (bool, bool),
) -> ! {
    let (found, expected) = (native.encode(text, add, parse), oracle.encode(text, add, parse));
    let same = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
    let around = |tokens: &[Token]| -> Vec<String> {
        let shown = tokens.iter().skip(same.saturating_sub(3)).take(8);
        let piece = |&token| String::from_utf8_lossy(native.vocab().piece(token)).into_owned();
        shown.map(piece).collect()
    };
    let text: String = text.chars().take(300).collect();
    panic!(
        "{what}, add {add}, parse {parse}, token {same}: {:?}, llama.cpp {:?}, of {text:?}",
        around(&found),
        around(&expected)
    );
}

/// Runs on a stack large enough for llama.cpp's recursion.
fn with_stack(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(work);
    if let Err(panic) = thread.expect("a thread").join() {
        std::panic::resume_unwind(panic);
    }
}

/// Compares with the texts and tokens that llama.cpp stores beside a vocabulary; returns their
/// number.
fn compare_pairs(what: &str, native: &NativeTokenizer, path: &Path) -> usize {
    let read = |end: &str| std::fs::read_to_string(format!("{}.{end}", path.display()));
    let (Ok(texts), Ok(expected)) = (read("inp"), read("out")) else { return 0 };
    let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    let expected: Vec<&str> = expected.lines().collect();
    assert!(texts.len() >= expected.len(), "{what}: a text for every line");
    for (text, line) in texts.iter().zip(&expected) {
        let found = native.encode(text, false, false);
        let found: Vec<String> = found.iter().map(Token::to_string).collect();
        let expected: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(found, expected, "{what}: {text:?}");
    }
    expected.len()
}

/// Compares texts that continue other tokens; llama.cpp's own tokenizers cannot omit the spaces.
fn compare_continuations(what: &str, native: &NativeTokenizer, oracle: &dyn Tokenizer) {
    assert_eq!(native.adds_eos(), oracle.adds_eos(), "{what}");
    let eos = native.vocab().eos.map(|eos| native.vocab().piece(eos)).unwrap_or_default();
    let eos = String::from_utf8_lossy(eos);
    for text in ["4", " 4", "  4", "four, 4", "\n4", "<s", "é 4", &format!("4{eos}4{eos}")] {
        let found = native.encode_continuation(text, true, &[]);
        assert_eq!(found, oracle.encode_continuation(text, true, &[]), "{what}: {text:?}");
        let bytes: Vec<u8> =
            found.iter().flat_map(|&token| native.vocab().piece(token)).copied().collect();
        assert_eq!(String::from_utf8_lossy(&bytes), text, "{what}");
        let prompt = native.encode_prompt(text, true, true);
        assert_eq!(prompt, oracle.encode_prompt(text, true, true), "{what}: {text:?}");
    }
}

#[test]
fn every_vocabulary_agrees_with_llama_cpp() {
    let Some(folder) = folder() else { return };
    with_stack(move || {
        let (texts, planes) = (corpus::texts(30_000), corpus::planes(41));
        let mut found = vocabularies(&folder);
        found.extend(default_model());
        let (mut skipped, mut pairs) = (Vec::new(), 0);
        for (name, gguf, path) in found {
            let native = match NativeTokenizer::from_gguf(&gguf) {
                Err(NativeError::NotCovered(_)) => {
                    skipped.push(name);
                    continue;
                }
                other => other.unwrap_or_else(|error| panic!("{name}: {error}")),
            };
            let oracle = oracle(&path);
            compare_facts(&name, native.vocab(), oracle.vocab());
            compare(&name, &native, &*oracle, &texts, &FLAGS);
            compare(&name, &native, &*oracle, &planes, &FLAGS[..1]);
            compare_continuations(&name, &native, &*oracle);
            pairs += compare_pairs(&name, &native, &path);
        }
        assert_eq!(skipped, ["bert-bge", "nomic-bert-moe"], "no BPE of either kind");
        assert!(pairs > 500, "some forty texts for each of fifteen files, not {pairs}");
    });
}

/// One vocabulary per algorithm, chosen from those that llama.cpp implements in code: its
/// expressions would recurse a million levels deep.
#[test]
fn a_megabyte_of_one_letter_agrees_with_llama_cpp() {
    let Some(folder) = folder() else { return };
    let mut found = vocabularies(&folder);
    found.retain(|(name, ..)| ["gpt-2", "llama-bpe", "llama-spm"].contains(&&**name));
    for (name, gguf, path) in found {
        let native = NativeTokenizer::from_gguf(&gguf).expect("covered");
        let oracle = oracle(&path);
        let text = "a".repeat(1 << 20);
        let same = native.encode(&text, true, true) == oracle.encode(&text, true, true);
        assert!(same, "{name}");
    }
}

/// All pre-tokenizers by name, on other models' vocabularies: a long text for each row of the
/// table, a short one for each name.
#[test]
fn every_pre_tokenizer_agrees_with_llama_cpp() {
    let Some(folder) = folder() else { return };
    with_stack(move || {
        let (short, mut long) = (corpus::texts(1_000), corpus::texts(15_000));
        long.extend(corpus::planes(401));
        let place = tempfile::tempdir().expect("a folder");
        let path = place.path().join("vocab.gguf");
        let vocabularies = vocabularies(&folder);
        let gpt2 = vocabularies.iter().find(|(name, ..)| name == "gpt-2").expect("is there");
        let mut rows = Vec::new();
        for pre in NAMES {
            let row = Pre::by_name(pre).expect("in the table");
            let mut writer = match row.units {
                Units::Bytes => beginning(&gpt2.1),
                _ => of_characters(&gpt2.1),
            };
            writer.set("tokenizer.ggml.pre", *pre);
            writer.write(&path).expect("written");
            let native = NativeTokenizer::from_gguf(&Gguf::open_header(&path).expect("a file"));
            let native = native.unwrap_or_else(|error| panic!("{pre}: {error}"));
            let oracle = oracle(&path);
            compare_facts(pre, native.vocab(), oracle.vocab());
            let texts = if rows.contains(&row) { &short } else { &long };
            compare(pre, &native, &*oracle, texts, &FLAGS[1..2]);
            rows.push(row);
        }
    });
}

/// The first tokens and merges of a byte-level vocabulary, which load faster.
fn beginning(from: &Gguf) -> GgufWriter<'static> {
    const TOKENS: usize = 4000;
    let first = |key: &str, count: usize| -> Vec<String> {
        from.strings(key).expect("strings").expect("there")[..count].to_vec()
    };
    let tokens = first("tokenizer.ggml.tokens", TOKENS);
    let merges = first("tokenizer.ggml.merges", TOKENS - 256);
    with_vocabulary(from, tokens, vec![1; TOKENS], merges)
}

/// A vocabulary of tokens spelled in characters, and all bytes.
fn of_characters(from: &Gguf) -> GgufWriter<'static> {
    let mut tokens: Vec<String> = (0..=255u8).map(|byte| format!("<{byte:#04X}>")).collect();
    tokens.extend(('!'..='~').chain("\n▁é中".chars()).map(String::from));
    let merges = ["t h", "th e", "▁ the", "▁ T", "\n \n", "\n\n \n", "▁ ▁", "▁▁ ▁▁", "a ▁", "1 2"];
    let merges = merges.map(str::to_owned).to_vec();
    tokens.extend(merges.iter().map(|merge| merge.replacen(' ', "", 1)));
    let mut types = vec![1; tokens.len()];
    types[..256].fill(6);
    with_vocabulary(from, tokens, types, merges)
}

/// The header of `from`, which llama.cpp requires, with another vocabulary.
fn with_vocabulary(
    from: &Gguf,
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
) -> GgufWriter<'static> {
    let mut writer = GgufWriter::new();
    writer
        .copy_metadata(from, |key| !key.starts_with("tokenizer."))
        .set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", types)
        .set("tokenizer.ggml.merges", merges);
    writer
}

/// Prints load time and speed compared with llama.cpp's, on the sources of this crate: `cargo test
/// --release --lib how_fast -- --ignored --nocapture`.
#[test]
#[ignore = "prints figures"]
fn how_fast() {
    let Some(folder) = folder() else { return };
    with_stack(move || {
        let text = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
        let megabytes = text.len() as f64 / 1e6;
        eprintln!("{megabytes:.1} MB of text; ms to load, MB/s, and the same of llama.cpp");
        let mut found = vocabularies(&folder);
        found.extend(default_model());
        for (name, _, path) in found {
            let (load, ours) =
                timed(|| NativeTokenizer::from_gguf(&Gguf::open_header(&path).expect("a file")));
            let Ok(ours) = ours else { continue };
            let (their_load, theirs) = timed(|| oracle(&path));
            let (took, tokens) = timed(|| ours.encode(&text, false, false));
            let (they_took, expected) = timed(|| theirs.encode(&text, false, false));
            assert_eq!(tokens, expected, "{name}");
            let (speed, their_speed) = (megabytes / took, megabytes / they_took);
            let (load, their_load) = (load * 1e3, their_load * 1e3);
            eprintln!("{name:16} {load:6.0} {speed:6.2}   {their_load:6.0} {their_speed:6.2}");
        }
    });
}

/// Runs `work`; returns the elapsed seconds and the result.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let started = Instant::now();
    let done = work();
    (started.elapsed().as_secs_f64(), done)
}

/// The concatenated contents of all files in a folder and its subfolders.
fn sources(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    paths.sort();
    let read = |path: &PathBuf| match path.is_dir() {
        true => sources(path),
        false => std::fs::read_to_string(path).expect("text"),
    };
    paths.iter().map(read).collect()
}
