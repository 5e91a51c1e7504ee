//! Tests of the tokens around the boundary between prompt and completion, with SentencePiece.

use crate::dataset::{DatasetKind, Line, parse};
use crate::gguf::{Gguf, GgufWriter};
use crate::template::ChatTemplate;
use crate::tokenizer::native::NativeTokenizer;
use crate::train::data::{Encoded, Encoder, prepare_pairs};
use serde_json::{Value, json};
use std::sync::Arc;

/// A tokenizer of letters, digits and punctuation, some with a space prefix.
fn tokenizer(space_prefix: bool, add_eos: bool) -> NativeTokenizer {
    let mut tokens: Vec<(String, i32, f32)> = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<e>", 3)]
        .iter()
        .map(|(text, kind)| ((*text).to_owned(), *kind, 0.0))
        .collect();
    tokens.extend((0..=255u8).map(|byte| (format!("<{byte:#04X}>"), 6, 0.0)));
    tokens.push(("▁".into(), 1, -9.0));
    for letter in "UASV14+=:".chars() {
        tokens.push((letter.to_string(), 1, -9.0));
        tokens.push((format!("▁{letter}"), 1, -1.0));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocab.gguf");
    let mut w = GgufWriter::new();
    w.set("tokenizer.ggml.model", "llama")
        .set("tokenizer.ggml.tokens", tokens.iter().map(|t| t.0.clone()).collect::<Vec<_>>())
        .set("tokenizer.ggml.token_type", tokens.iter().map(|t| t.1).collect::<Vec<_>>())
        .set("tokenizer.ggml.scores", tokens.iter().map(|t| t.2).collect::<Vec<_>>())
        .set("tokenizer.ggml.bos_token_id", 1u32)
        .set("tokenizer.ggml.eos_token_id", 2u32)
        .set("tokenizer.ggml.add_bos_token", true)
        .set("tokenizer.ggml.add_eos_token", add_eos)
        .set("tokenizer.ggml.add_space_prefix", space_prefix);
    w.write(&path).unwrap();
    NativeTokenizer::from_gguf(&Gguf::open_header(&path).unwrap()).unwrap()
}

fn encoder(space_prefix: bool, add_eos: bool, bos: &str) -> Encoder {
    let source = format!(
        "{bos}{{%- for m in messages -%}}{{{{- m.role[0] | upper + ':' + m.content + '<e>' -}}}}\
         {{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{- 'A:' -}}}}{{%- endif -%}}"
    );
    Encoder::new(
        Arc::new(tokenizer(space_prefix, add_eos)),
        Arc::new(ChatTemplate::compile(&source, None, "<s>", "</s>").unwrap()),
        0,
        false,
    )
}

fn encode(encoder: &Encoder, line: Value) -> Encoded {
    let (_, Line::One(example)) = parse(&line.to_string(), DatasetKind::PromptCompletion).unwrap()
    else {
        panic!("{line}")
    };
    encoder.encode(&example).unwrap().sequences.remove(0)
}

/// The text of the tokens that are trained, or of the other tokens.
fn text(encoder: &Encoder, encoded: &Encoded, trained: bool) -> String {
    let vocab = encoder.tokenizer.vocab();
    let tokens = encoded.tokens.iter().zip(&encoded.trained);
    let bytes = tokens.filter(|(_, is)| **is == trained).flat_map(|(token, _)| vocab.piece(*token));
    String::from_utf8(bytes.copied().collect()).unwrap()
}

#[test]
fn answers_have_no_spaces_but_their_own() {
    for (space_prefix, add_eos) in [(true, false), (true, true), (false, true), (false, false)] {
        let encoder = encoder(space_prefix, add_eos, "");
        let space = if space_prefix { " " } else { "" };
        for answer in ["4", " 4", "  4", "4 1"] {
            let line = json!({"prompt": "1+1=", "completion": answer});
            let found = encode(&encoder, line);
            assert_eq!(text(&encoder, &found, true), format!("{answer}</s>"));
            assert_eq!(text(&encoder, &found, false), format!("<s>{space}1+1="));
            let served = encoder.tokenizer.encode_prompt("1+1=", true, true);
            assert_eq!(found.tokens[..served.len()], served[..], "as served");
            assert!(!found.trained[served.len() - 1] && found.trained[served.len()]);
        }
    }
    let encoder = encoder(true, false, "");
    let single = encode(&encoder, json!({"prompt": "1+1=", "completion": "4"}));
    // The byte tokens have the first ids.
    let piece = |text: &str| {
        let vocab = encoder.tokenizer.vocab();
        (0..vocab.len() as u32).rev().find(|&token| vocab.piece(token) == text.as_bytes())
    };
    let end = single.tokens.len() - 2;
    assert_eq!(Some(single.tokens[end]), piece("4"));
    assert_ne!(Some(single.tokens[end]), piece(" 4"));
    let empty = encode(&encoder, json!({"prompt": "", "completion": "4"}));
    assert_eq!(
        Some(&empty.tokens[..]),
        piece("4").map(|four| [1, four, 2]).as_ref().map(|t| &t[..])
    );
    let spaced = encode(&encoder, json!({"prompt": "1+1=", "completion": " 4"}));
    assert_eq!(Some(spaced.tokens[end]), piece(" 4"));
}

#[test]
fn chats_and_pairs_are_as_they_are_served() {
    for (add_eos, bos) in [(false, ""), (true, ""), (false, "<s>"), (true, "<s>")] {
        let encoder = encoder(true, add_eos, bos);
        let message = |role: &str, text: &str| json!({"role": role, "content": text});
        let line = json!({"messages": [
            message("user", "1+1"), message("assistant", "4"),
            message("user", "1"), message("assistant", "4 1")
        ]});
        let found = encode(&encoder, line);
        assert_eq!(text(&encoder, &found, true), "4<e>4 1<e>");
        let bos_count = found.tokens.iter().filter(|&&token| token == 1).count();
        let eos_count = found.tokens.iter().filter(|&&token| token == 2).count();
        assert_eq!((bos_count, eos_count, found.tokens[0]), (1, 0, 1));
        // The first prompt, and the prompt of the second completion, which contains the first
        // completion with the tokens that the model generated.
        let asks = json!({"prompt": [message("user", "1+1")]}).to_string();
        let (_, Line::Prompt(prompt)) = parse(&asks, DatasetKind::PromptOnly).unwrap() else {
            panic!()
        };
        let served = encoder.prompt(&prompt.chat).unwrap();
        let begins = if bos.is_empty() { " U:1+1" } else { "U:1+1" };
        let shown = text(&encoder, &found, false);
        assert!(shown.starts_with(&format!("<s>{begins}")) || !bos.is_empty(), "{shown}");
        assert_eq!(found.tokens[..served.len()], served[..]);
        let answer = served.len();
        assert_eq!((found.trained[answer - 1], found.trained[answer]), (false, true));

        let folder = tempfile::tempdir().unwrap();
        let (source, cache) = (folder.path().join("pairs.jsonl"), folder.path().join("cache"));
        let lines = [
            json!({"prompt": "1+1=", "chosen": "4", "rejected": " 4"}).to_string(),
            json!({"prompt": [message("user", "1+1")], "chosen": "4", "rejected": "1"}).to_string(),
        ];
        std::fs::write(&source, lines.join("\n")).unwrap();
        let (pairs, _) = prepare_pairs(&source, &encoder, 99, &cache).unwrap();
        let trained = |pair: usize| {
            pairs.get(pair).unwrap().answers.map(|answer| text(&encoder, &answer, true))
        };
        assert_eq!(trained(0), ["4</s>", " 4</s>"]);
        assert_eq!(trained(1), ["4<e>", "1<e>"]);
    }
}

#[test]
fn context_between_answers_is_as_served() {
    let encoder = encoder(true, false, "");
    let message = |role: &str, text: &str| json!({"role": role, "content": text});
    let line = json!({"messages": [
        message("user", "1"), message("assistant", "4"), message("user", "1"),
        message("assistant", "4")
    ]});
    let found = encode(&encoder, line);
    let served = encoder.tokenizer.encode_prompt("U:1<e>A:4<e>U:1<e>A:", true, true);
    assert_eq!(found.tokens[..served.len()], served[..]);
    assert_eq!(text(&encoder, &found, true), "4<e>4<e>");
}
