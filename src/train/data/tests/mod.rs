mod formats;
mod seams;
mod sequences;

use super::*;
use crate::dataset::{
    Chat, DataError, DatasetKind, Example, Format, Line, PairFacts, Rendering, check, render,
};
use crate::job::DataReport;
use crate::template::{CHATML, ChatTemplate};
use crate::tokenizer::{Tokenizer, Vocab};
use serde_json::json;
use std::sync::Arc;

/// A tokenizer with one token per byte; `<|…|>` is one token.
pub(super) struct Bytes(Vocab);

impl Bytes {
    pub(super) fn new() -> Self {
        let bytes = (0..=255u8).map(|byte| (vec![byte], false, false));
        let special = [b"<|im_start|>".to_vec(), b"<|im_end|>".to_vec()];
        let mut vocab = Vocab::new(bytes.chain(special.map(|piece| (piece, true, false))));
        vocab.eos = Some(257);
        Self(vocab)
    }
}

impl Tokenizer for Bytes {
    fn vocab(&self) -> &Vocab {
        &self.0
    }

    fn encode(&self, text: &str, _: bool, parse_special: bool) -> Vec<u32> {
        let (mut tokens, mut rest) = (Vec::new(), text);
        while let Some(first) = rest.bytes().next() {
            let special = [(256, "<|im_start|>"), (257, "<|im_end|>")];
            match special.iter().find(|(_, text)| parse_special && rest.starts_with(text)) {
                Some((token, text)) => {
                    tokens.push(*token);
                    rest = &rest[text.len()..];
                }
                None => {
                    tokens.push(u32::from(first));
                    // The tests use only ASCII.
                    rest = &rest[1..];
                }
            }
        }
        tokens
    }
}

fn encoder() -> Encoder {
    let template = ChatTemplate::compile(CHATML, None, "", "<|im_end|>").unwrap();
    Encoder::new(Arc::new(Bytes::new()), Arc::new(template), 0, false)
}

/// Encodes an example that is one sequence.
fn encode(example: &Example) -> Encoded {
    let mut found = encoder().encode(example).unwrap().sequences;
    assert_eq!(found.len(), 1);
    found.remove(0)
}

fn parse(line: &str) -> Result<(Format, Example), String> {
    match crate::dataset::parse(line, DatasetKind::PromptCompletion)? {
        (format, Line::One(example)) => Ok((format, example)),
        (_, other) => panic!("{other:?} is no answer"),
    }
}

fn chat(line: serde_json::Value) -> Chat {
    match parse(&line.to_string()).unwrap().1 {
        Example::Chat(chat) => chat,
        other => panic!("{other:?} is no chat"),
    }
}

#[test]
fn formats_are_recognised() {
    let expected = chat(json!({"messages": [
        {"role": "user", "content": "Add.\n\n1 1"}, {"role": "assistant", "content": "2"}
    ]}));
    assert_eq!(expected.trained, [false, true]);
    for line in [
        json!({"instruction": "Add.", "input": "1 1", "output": "2"}),
        json!({"conversations": [{"from": "human", "value": "Add.\n\n1 1"}, {"from": "gpt", "value": "2"}]}),
        json!({"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Add.\n\n1 1"}]},
            {"role": "assistant", "content": "2", "weight": 1}
        ]}),
    ] {
        assert_eq!(chat(line.clone()), expected, "{line}");
    }
    let completion = parse(r#"{"prompt": "a", "completion": "b"}"#).unwrap();
    assert_eq!(completion.0, Format::Completion);
    assert_eq!(parse(r#"{"text": "a"}"#).unwrap().1, Example::Text("a".into()));
}

#[test]
fn bad_lines_say_why() {
    for (line, why) in [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        (r#"{"question": "a", "answer": "b"}"#, "`question`, `answer`"),
        (r#"{"messages": []}"#, "no message of the assistant"),
        (r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}"#, "no message"),
        (
            r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}"#,
            "neither 0 nor 1",
        ),
        (r#"{"messages": [{"role": "user", "content": "a", "weight": 1}]}"#, "only the assistant"),
        (r#"{"messages": [{"role": "robot", "content": "a"}]}"#, "`robot`"),
        (r#"{"messages": [{"role": "user"}]}"#, "`content` is missing"),
        (r#"{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}"#, "image_url"),
        (r#"{"conversations": [{"from": "x", "value": "a"}]}"#, "`x`"),
        (r#"{"instruction": "a", "output": ""}"#, "`output` is empty"),
        (r#"{"text": 1}"#, "`text` is not a string"),
        (r#"{"mesages": []}"#, "did you mean `messages`?"),
    ] {
        let error = parse(line).unwrap_err();
        assert!(error.contains(why), "{line}: {error}");
    }
}

#[test]
fn only_answers_are_trained_with_their_end() {
    let chat = chat(json!({"messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "V"},
        {"role": "assistant", "content": "B", "weight": 0},
        {"role": "user", "content": "W"},
        {"role": "assistant", "content": "C"}
    ]}));
    let rendered = render(&Example::Chat(chat), Rendering::plain(&encoder().template)).unwrap();
    let trained: Vec<_> =
        rendered.pieces.iter().filter(|piece| piece.trained).map(|piece| &piece.text[..]).collect();
    assert_eq!(trained, ["A<|im_end|>", "C<|im_end|>"]);
    let whole: String = rendered.pieces.iter().map(|piece| &piece.text[..]).collect();
    assert!(whole.starts_with("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU"), "{whole}");
    assert!(whole.ends_with("<|im_start|>assistant\nC<|im_end|>"), "{whole}");
}

#[test]
fn masks_fit_tokens() {
    let example = parse(r#"{"prompt": "ab", "completion": "cd"}"#).unwrap().1;
    let encoded = encode(&example);
    assert_eq!(encoded.tokens, [97, 98, 99, 100, 257]);
    assert_eq!(encoded.trained, [false, false, true, true, true]);
    assert_eq!(encoded.targets(), 3);
    let text = encode(&Example::Text("<|im_end|>".into()));
    assert_eq!((text.tokens.len(), text.targets()), (11, 10), "plain text spells no special token");
}

#[test]
fn the_longest_come_first_and_go_where_they_fit_best() {
    let members = |rows: Vec<Row>| rows.into_iter().map(|row| row.members).collect::<Vec<_>>();
    // Best fit decreasing: [1,2,3] [4,5,6,7] [8] to rows of 4.
    assert_eq!(members(pack(&[3, 4, 1], 4)), [vec![1], vec![0, 2]]);
    assert_eq!(members(pack(&[5, 6, 3, 4], 10)), [vec![1, 3], vec![0, 2]]);
    assert_eq!(members(pack(&[], 4)), Vec::<Vec<usize>>::new());
    let lengths: Vec<usize> = (0..200).map(|i| i * 37 % 90 + 1).collect();
    let rows = pack(&lengths, 100);
    let mut seen: Vec<_> = rows.iter().flat_map(|row| row.members.clone()).collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..200).collect::<Vec<_>>());
    let least = lengths.iter().sum::<usize>().div_ceil(100);
    assert!(rows.iter().all(|row| row.tokens <= 100) && rows.len() <= least * 11 / 9 + 1);
}

#[test]
fn an_order_is_its_seeds_and_goes_on_from_a_cursor() {
    let take = |mut cursor: Cursor, count| Order::new(10, Some(7)).next(&mut cursor, count);
    let all = take(Cursor::default(), 35);
    assert_eq!(all[20..], take(Cursor { epoch: 2, taken: 0 }, 15));
    assert_eq!(all[13..], take(Cursor { epoch: 1, taken: 3 }, 22));
    assert_ne!(all[..10], all[10..20]);
    for epoch in all[..30].chunks(10) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
    }
    let mut cursor = Cursor::default();
    assert_eq!(Order::new(3, None).next(&mut cursor, 4), [0, 1, 2, 0]);
    assert_eq!(cursor, Cursor { epoch: 1, taken: 1 });
}

fn prepared(text: &str, max_length: usize) -> Result<(Prepared, DataReport), DataError> {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("data.jsonl"), folder.path().join("data.bin"));
    std::fs::write(&source, text).unwrap();
    prepare(&source, &encoder(), max_length, &cache)
}

#[test]
fn a_file_is_read_back_as_it_was_encoded() {
    let line =
        |i: usize| json!({"prompt": "p".repeat(i % 7), "completion": "c".repeat(i % 11 + 1)});
    let lines: Vec<String> = (0..3000).map(|i| line(i).to_string()).collect();
    let (prepared, report) = prepared(&(lines.join("\n\n") + "\n"), 64).unwrap();
    assert_eq!((prepared.len(), report.examples, report.dropped), (3000, 3000, 0));
    let mut tokens = 0;
    for (i, line) in lines.iter().enumerate() {
        let encoded = encode(&parse(line).unwrap().1);
        assert_eq!(prepared.get(i).unwrap(), encoded);
        tokens += encoded.tokens.len();
    }
    assert_eq!(report.tokens, tokens as u64);
    assert_eq!(report.digest.len(), 64);
}

#[test]
fn what_is_cut_and_left_out_is_counted() {
    let lines = [
        json!({"prompt": "p".repeat(20), "completion": "c"}),
        json!({"prompt": "pp", "completion": "c".repeat(20)}),
        json!({"prompt": "pp", "completion": "cc"}),
    ];
    let text: Vec<_> = lines.iter().map(ToString::to_string).collect();
    let (prepared, report) = prepared(&text.join("\n"), 10).unwrap();
    assert_eq!(prepared.len(), 2);
    assert_eq!((report.examples, report.truncated, report.dropped), (3, 2, 1));
    assert_eq!((report.tokens, report.trained_tokens, report.longest), (15, 11, 23));
}

#[test]
fn bad_files_are_refused_with_their_lines() {
    let good = r#"{"prompt": "a", "completion": "b"}"#;
    let error = |text: &str| prepared(text, 8).err().expect("it is refused").to_string();
    let found = error(&format!("{good}\n\n{{\n{good}\n[]\n"));
    assert!(found.contains("line 3: it is not JSON") && found.contains("line 5: "), "{found}");
    assert!(error(&"x\n".repeat(29)).ends_with("and 9 more bad lines"));
    assert_eq!(error("\n \n"), "the file has no examples");
    let found = error(&format!("{good}\n{{\"text\": \"a\"}}"));
    assert!(found.contains("line 2: it is of another format (`text`) than line 1"), "{found}");
    let long = json!({"prompt": "p".repeat(20), "completion": "c"}).to_string();
    assert!(error(&long).contains("max_length"));
}

#[test]
fn pairs_are_whole_or_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("pairs.jsonl"), folder.path().join("cache"));
    let line = |prompt: &str, chosen: &str, rejected: &str| {
        json!({"prompt": [{"role": "user", "content": prompt}], "chosen": chosen,
               "rejected": rejected, "margin": 2.0})
        .to_string()
    };
    let long = "x".repeat(200);
    let lines = [line("a", "b", "cc"), line("a", "same", "same"), line("a", &long, "b")];
    std::fs::write(&source, lines.join("\n")).unwrap();
    let (pairs, report) = prepare_pairs(&source, &encoder(), 120, &cache).unwrap();
    assert_eq!((pairs.len(), report.examples, report.dropped, report.truncated), (1, 3, 2, 0));
    let pair = pairs.get(0).unwrap();
    assert_eq!(pair.facts, PairFacts { margin: Some(2.0), label: 1.0 });
    let [chosen, rejected] = pair.answers;
    assert_eq!(chosen.tokens.last(), Some(&257), "it ends with the end of the turn");
    assert_eq!((chosen.targets(), rejected.targets()), (2, 3));
    let error = prepare_pairs(&source, &encoder(), 8, &cache).err().unwrap().to_string();
    assert!(error.contains("max_length"), "{error}");
    let error = prepare(&source, &encoder(), 99, &cache).err().unwrap().to_string();
    assert!(error.contains("line 1") && error.contains("pair of answers"), "{error}");
    assert_eq!(check(&source, DatasetKind::Preference, 3).unwrap(), 3);
    assert!(check(&source, DatasetKind::PromptCompletion, 1).is_err());
}
