//! Tests with hostile inputs: tokenization takes time linear in the length of the text.

use super::{folder, splitters, vocabularies};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::native::NativeTokenizer;

/// Length of a text in bytes; a megabyte of one letter is compared with llama.cpp elsewhere.
const LENGTH: usize = 1 << 18;
/// Limit of CPU time; quadratic work would take minutes.
const LIMIT_SECONDS: f64 = 5.0;
/// One vocabulary per algorithm, and the one with the most merges.
const CHOSEN: &[&str] = &["gpt-2", "llama-bpe", "gemma-4", "llama-spm"];
/// Repeated, these units give long words, long runs, or many words.
const UNITS: &[&str] =
    &["a", " ", "\n", "\t ", "0", "!", "中", "a ", " \n ", "\n   ", "<|", "e\u{301}", "éA"];

fn in_time(what: &str, unit: &str, bytes: usize, work: impl FnOnce(&str)) {
    let text = unit.repeat(bytes / unit.len());
    let started = thread_seconds();
    work(&text);
    let took = thread_seconds() - started;
    assert!(took < LIMIT_SECONDS, "{what}: {unit:?} took {took} s");
}

/// CPU time of this thread: a busy machine must not make a test fail.
fn thread_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("Linux");
    // The name may contain spaces, but ends with the last parenthesis.
    let (_, fields) = stat.rsplit_once(") ").expect("a name");
    let ticks: f64 = fields.split(' ').nth(11).expect("utime").parse().expect("a number");
    ticks / 100.0
}

#[test]
fn long_runs_of_anything_take_linear_time() {
    let Some(folder) = folder() else { return };
    for (name, gguf, _) in vocabularies(&folder) {
        if !CHOSEN.contains(&&*name) {
            continue;
        }
        let tokenizer = NativeTokenizer::from_gguf(&gguf).expect("covered");
        for unit in UNITS {
            in_time(&name, unit, LENGTH, |text| {
                let tokens = tokenizer.encode(text, true, true);
                assert!(tokens.len() <= text.len() + 2, "{name}: {unit:?}");
            });
        }
    }
}

#[test]
fn no_expression_walks_back() {
    for (name, splitter) in splitters() {
        for unit in UNITS {
            in_time(name, unit, LENGTH / 2, |text| assert!(!splitter.split(text).is_empty()));
        }
    }
}
