//! Tests of single rules, on vocabularies made for them.

use super::super::NativeError;
use super::super::pretokenize::Pre;
use super::super::split::Splitter;
use super::{NAMES, decode, every_byte, made, splitters, strings, try_made};
use crate::gguf::GgufWriter;
use crate::tokenizer::Tokenizer;
use proptest::prelude::*;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER: i32 = 4;
const BYTE: i32 = 6;

/// Sets tokens and their types, in id order.
fn list(w: &mut GgufWriter, model: &str, tokens: &[(&str, i32)]) {
    let texts: Vec<&str> = tokens.iter().map(|token| token.0).collect();
    let types: Vec<i32> = tokens.iter().map(|token| token.1).collect();
    w.set("tokenizer.ggml.model", model)
        .set("tokenizer.ggml.tokens", strings(&texts))
        .set("tokenizer.ggml.token_type", types);
}

fn bpe(w: &mut GgufWriter, tokens: &[(&str, i32)], merges: &[&str]) {
    list(w, "gpt2", tokens);
    w.set("tokenizer.ggml.pre", "gpt-2").set("tokenizer.ggml.merges", strings(merges));
}

#[test]
fn merges_go_by_rank_and_then_from_the_left() {
    let tokens = ["a", "b", "c", "aa", "ab", "bc", "abc"].map(|text| (text, NORMAL));
    let t = made(|w| bpe(w, &tokens, &["b c", "a a", "a b", "a bc"]));
    assert_eq!(t.encode("abc", false, false), [6]);
    assert_eq!(t.encode("aaa", false, false), [3, 0]);
    assert_eq!(t.encode("aab", false, false), [3, 1]);
    assert_eq!(t.encode("ab", false, false), [4]);
}

#[test]
fn a_byte_without_a_token_is_dropped_and_parts_its_neighbours() {
    let t = made(|w| bpe(w, &[("a", NORMAL), ("aa", NORMAL)], &["a a"]));
    assert_eq!(t.encode("aaxa", false, false), [1, 0]);
    assert_eq!(t.encode("axa", false, false), [0, 0]);
    assert_eq!(t.encode("\u{e9}", false, false), [0u32; 0]);
}

#[test]
fn whole_words_overrule_merges_where_the_model_says_so() {
    let tokens = ["a", "b", "ab", "aba"].map(|text| (text, NORMAL));
    let with = |pre: &str| {
        made(|w| {
            bpe(w, &tokens, &["a b"]);
            w.set("tokenizer.ggml.pre", pre).set("tokenizer.ggml.add_bos_token", false);
        })
    };
    assert_eq!(with("gpt-2").encode("aba", false, false), [2, 0]);
    assert_eq!(with("llama-bpe").encode("aba", true, false), [3]);
}

#[test]
fn bos_and_eos_stand_around_a_prompt() {
    let tokens = [("a", NORMAL), ("<s>", CONTROL), ("</s>", CONTROL)];
    let with = |bos: bool, eos: bool| {
        let t = made(|w| {
            bpe(w, &tokens, &[]);
            w.set("tokenizer.ggml.bos_token_id", 1u32).set("tokenizer.ggml.eos_token_id", 2u32);
            w.set("tokenizer.ggml.add_bos_token", bos).set("tokenizer.ggml.add_eos_token", eos);
        });
        assert_eq!(t.encode("a", false, false), [0]);
        t.encode("a", true, false)
    };
    assert_eq!(with(true, true), [1, 0, 2]);
    assert_eq!(with(true, false), [1, 0]);
    assert_eq!(with(false, false), [0]);
}

#[test]
fn long_marks_win_and_control_tokens_have_to_be_asked_for() {
    let tokens = [
        ("a", NORMAL),
        ("b", NORMAL),
        ("c", NORMAL),
        ("ab", USER),
        ("bca", USER),
        ("<c>", CONTROL),
        ("<", NORMAL),
        (">", NORMAL),
    ];
    let t = made(|w| bpe(w, &tokens, &[]));
    assert_eq!(t.encode("abca", false, false), [0, 4]);
    assert_eq!(t.encode("abab", false, false), [3, 3]);
    assert_eq!(t.encode("a<c>b", false, true), [0, 5, 1]);
    assert_eq!(t.encode("a<c>b", false, false), [0, 6, 2, 7, 1]);
    assert_eq!(t.encode("", false, true), [0u32; 0]);
    assert_eq!(t.vocab().output_piece(5, false), b"");
    assert_eq!(t.vocab().output_piece(3, false), b"ab");
}

#[test]
fn phi_3_marks_swallow_the_space_behind_them() {
    let tokens = [("a", NORMAL), ("\u{120}", NORMAL), ("<x>", CONTROL), ("<s>", CONTROL)];
    let t = made(|w| {
        bpe(w, &tokens, &[]);
        w.set("general.name", "Phi-3 mini");
    });
    assert_eq!(t.encode("a <x> \n a", false, true), [0, 1, 2, 0]);
    assert_eq!(t.encode("<s> a<x>", false, true), [3, 1, 0, 2]);
}

#[test]
fn sentencepiece_goes_by_score_and_falls_back_to_bytes() {
    let tokens = [
        ("<unk>", UNKNOWN),
        ("<s>", CONTROL),
        ("</s>", CONTROL),
        ("<0xC3>", BYTE),
        ("<0xA9>", BYTE),
        ("▁", NORMAL),
        ("a", NORMAL),
        ("b", NORMAL),
        ("▁a", NORMAL),
        ("ab", NORMAL),
        ("aa", NORMAL),
        ("bb", NORMAL),
    ];
    let scores = vec![0.0f32, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0, -1.0];
    let t = made(|w| {
        list(w, "llama", &tokens);
        w.set("tokenizer.ggml.scores", scores);
    });
    assert_eq!(t.encode("a", true, false), [1, 8], "a space is put in front");
    assert_eq!(t.encode("ab", false, false), [5, 9], "the best score first");
    assert_eq!(t.encode("aaabb", false, false), [5, 10, 6, 11], "equal scores from the left");
    assert_eq!(t.encode("aé", false, false), [8, 3, 4]);
    assert_eq!(t.encode("a</s>a", false, true), [8, 2, 8], "also behind a mark");
    assert_eq!(t.encode("", true, false), [1]);
    assert_eq!(t.vocab().piece(8), b" a");
    assert_eq!(t.vocab().piece(3), [0xc3]);
    assert!(t.vocab().ends_generation(2) && !t.vocab().ends_generation(1));
}

#[test]
fn sentencepiece_merges_across_a_space_where_a_token_does() {
    let tokens = [("<unk>", UNKNOWN), ("▁", NORMAL), ("a", NORMAL), ("b", NORMAL)];
    let merged = [("b▁", NORMAL), ("b▁a", NORMAL), ("▁a", NORMAL), ("▁▁", NORMAL)];
    let t = made(|w| {
        list(w, "llama", &[&tokens[..], &merged[..]].concat());
        w.set("tokenizer.ggml.scores", vec![0.0f32, -9.0, -9.0, -9.0, -1.0, -1.0, -2.0, -3.0]);
        w.set("tokenizer.ggml.add_space_prefix", false);
    });
    assert_eq!(t.encode("b a", false, false), [5], "a token has b before a space");
    assert_eq!(t.encode("a a", false, false), [2, 6], "no token has a before a space");
    assert_eq!(t.encode("a  a", false, false), [2, 1, 6]);
    assert_eq!(t.encode("a   b", false, false), [2, 7, 1, 3]);
}

#[test]
fn continuations_get_no_spaces_and_prompts_no_eos() {
    let tokens = [
        ("<unk>", UNKNOWN),
        ("<s>", CONTROL),
        ("</s>", CONTROL),
        ("▁", NORMAL),
        ("a", NORMAL),
        ("▁a", NORMAL),
        ("<0x01>", BYTE),
        ("▁▁", NORMAL),
    ];
    let scores = vec![0.0f32, 0.0, 0.0, -9.0, -9.0, -1.0, 0.0, -2.0];
    for (space_prefix, add_eos) in [(true, false), (true, true), (false, true)] {
        let t = made(|w| {
            list(w, "llama", &tokens);
            w.set("tokenizer.ggml.scores", scores.clone());
            w.set("tokenizer.ggml.bos_token_id", 1u32).set("tokenizer.ggml.eos_token_id", 2u32);
            w.set("tokenizer.ggml.add_space_prefix", space_prefix);
            w.set("tokenizer.ggml.add_eos_token", add_eos);
        });
        let first = if space_prefix { 5 } else { 4 };
        let eos: &[u32] = if add_eos { &[2] } else { &[] };
        assert_eq!(t.encode("a", true, true), [&[1, first], eos].concat());
        assert_eq!(t.encode_prompt("a", true, true), [1, first]);
        assert_eq!(t.encode_prompt("a</s>", true, true), [1, first, 2], "the text's own EOS stays");
        assert_eq!(t.encode_prompt("a", false, true), [first]);
        for (text, expected) in [
            ("a", &[4][..]),
            (" a", &[5]),
            ("  a", &[3, 5]),
            ("a a", &[4, 5]),
            ("a</s>a", &[4, 2, 4]),
            ("</s> a</s>a", &[2, 5, 2, 4]),
            ("", &[]),
        ] {
            assert_eq!(t.encode_continuation(text, true, &[]), expected, "{text:?}");
            // The generic method, for tokenizers that cannot omit the spaces.
            let encode = |text: &str| t.encode(text, false, true);
            let found = crate::tokenizer::without_added_spaces(text, &encode, t.vocab());
            assert_eq!(found, expected, "{text:?}");
        }
    }
}

#[test]
fn what_is_not_covered_says_so() {
    let tokens = [("a", NORMAL), ("b", NORMAL)];
    let refused = |set: &dyn Fn(&mut GgufWriter<'static>)| match try_made(|w| set(w)) {
        Err(NativeError::NotCovered(what)) => what,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("covered"),
    };
    for model in ["t5", "bert", "rwkv", "plamo2", "none"] {
        let what = refused(&|w| list(w, model, &tokens));
        assert!(what.contains(model), "{what}");
    }
    let what = refused(&|w| {
        bpe(w, &tokens, &[]);
        w.set("tokenizer.ggml.pre", "whitespace");
    });
    assert!(what.contains("whitespace"), "{what}");
    let what = refused(&|w| bpe(w, &tokens, &["a b"]));
    assert!(what.contains("longer"), "{what}");
    let what = refused(&|w| {
        bpe(w, &[("a", NORMAL), ("b", NORMAL), ("cd", NORMAL)], &["a b"]);
    });
    assert!(what.contains("`ab`"), "{what}");
    refused(&|w| bpe(w, &[("a", NORMAL), ("a", NORMAL)], &[]));
    let scores = |w: &mut GgufWriter<'static>| {
        list(w, "llama", &tokens);
        w.set("tokenizer.ggml.scores", vec![0.0f32]);
    };
    assert!(matches!(try_made(scores), Err(NativeError::Header(_))));
    assert!(matches!(try_made(|_| {}), Err(NativeError::Header(_))));
}

#[test]
fn texts_give_roles_and_take_them_back() {
    let harmony = ["<|end|>", "<|call|>", "<|return|>", "<|channel|>", "a"].map(|t| (t, CONTROL));
    let ends = |tokens: &[(&str, i32)]| {
        let t = made(|w| {
            bpe(w, tokens, &[]);
            w.set("tokenizer.ggml.eos_token_id", 2u32);
        });
        (t.vocab().end_tokens(), t.vocab().is_control(0), t.vocab().is_control(3))
    };
    assert_eq!(ends(&harmony), (vec![1, 2], false, false));
    let plain = ["<|end|>", "a", "<|return|>", "</s>", "b"].map(|t| (t, NORMAL));
    assert_eq!(ends(&plain), (vec![0, 2, 3], true, true));
}

fn split(name: &str, text: &str) -> Vec<String> {
    let pre = Pre::by_name(name).expect("in the table");
    Splitter::new(pre.steps).split(text).into_iter().map(str::to_owned).collect()
}

#[test]
fn white_space_leaves_its_last_character_to_the_word_behind_it() {
    assert_eq!(split("gpt-2", "a   b\n\nc  "), ["a", "  ", " b", "\n", "\n", "c", "  "]);
    assert_eq!(split("llama3", "a   b \n\n c  "), ["a", "  ", " b", " \n\n", " c", "  "]);
    assert_eq!(split("spark2_5", "  \n\nx"), ["  \n", "\n", "x"]);
    assert_eq!(split("jais-2", "       x"), ["    ", "  ", " x"]);
    assert_eq!(split("jais-2", &" ".repeat(7)), ["    ", "  ", " "]);
}

#[test]
fn digits_group_from_the_right() {
    assert_eq!(split("afmoe", "1234567"), ["1", "234", "567"]);
    assert_eq!(split("tiny_aya", "a12345"), ["a", "12", "345"]);
    assert_eq!(split("superbpe", "x123456"), ["x", "123", "456"]);
    assert_eq!(split("llama3", "1234567"), ["123", "456", "7"]);
    assert_eq!(split("qwen2", "12"), ["1", "2"]);
}

#[test]
fn characters_since_unicode_15_1_are_no_letters() {
    // GARAY SMALL LETTER A, of Unicode 16.
    assert_eq!(split("gpt-2", "a\u{10d70}"), ["a", "\u{10d70}"]);
    // CJK UNIFIED IDEOGRAPH-2EBF0, of Unicode 15.1.
    assert_eq!(split("gpt-2", "a\u{2ebf0}"), ["a\u{2ebf0}"]);
}

#[test]
fn every_name_is_in_the_table() {
    for name in NAMES {
        assert!(Pre::by_name(name).is_some(), "{name}");
    }
    assert_eq!(Pre::by_name("whitespace"), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn words_are_the_text(text in "(\\PC|[ \n\t0-9a-zA-Z'])*") {
        for (name, splitter) in splitters() {
            let words = splitter.split(&text).concat();
            prop_assert_eq!(&words, &text, "{}", name);
        }
    }

    #[test]
    fn bytes_come_back(text in "(\\PC|[ \n\t0-9a-zA-Z'])*") {
        let t = every_byte();
        let tokens = t.encode(&text, false, true);
        prop_assert_eq!(decode(t, &tokens), text.as_bytes());
    }
}
