//! Tests of the keys of each format: each key is read, or rejected by name.

use super::{chat, encoder, parse, prepared};
use crate::dataset::{DatasetKind, Example, Line, parse as parse_for};
use crate::train::data::prepare_pairs;
use serde_json::{Value, json};

/// The roles and texts of a conversation.
fn texts(line: Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let messages = chat(line).messages;
    messages.iter().map(|message| (text(&message["role"]), text(&message["content"]))).collect()
}

fn turns(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(role, text)| ((*role).to_owned(), (*text).to_owned())).collect()
}

fn refused(line: Value, reasons: &[&str]) {
    let error = parse(&line.to_string()).unwrap_err();
    for reason in reasons {
        assert!(error.contains(reason), "{line}: {error}");
    }
}

#[test]
fn share_gpt_has_a_system_message_tools_and_weights() {
    let turn = |from: &str, value: &str| json!({"from": from, "value": value});
    let talk = [turn("human", "U"), turn("gpt", "A")];
    let expected = turns(&[("system", "S"), ("user", "U"), ("assistant", "A")]);
    assert_eq!(texts(json!({"conversations": talk, "system": "S", "id": 1})), expected);
    let beside = json!({"conversations": [turn("system", "S"), talk[0], talk[1]], "system": "S"});
    assert_eq!(texts(beside), expected, "the same twice stands once");
    for system in [json!(""), Value::Null] {
        let found = texts(json!({"conversations": talk, "system": system}));
        assert_eq!(found, turns(&[("user", "U"), ("assistant", "A")]));
    }
    let other = json!({"conversations": [turn("system", "T"), talk[0], talk[1]], "system": "S"});
    refused(other, &["`system` differs"]);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for given in [tools.clone(), json!(tools.to_string())] {
        let found = chat(json!({"conversations": talk, "tools": given}));
        assert_eq!(found.tools.map(Value::from), Some(tools.clone()));
    }
    refused(json!({"conversations": talk, "tools": "f"}), &["`tools`", "JSON list"]);
    let weighted = json!({"conversations": [
        {"from": "human", "value": "U", "weight": 0}, {"from": "gpt", "value": "A", "weight": 0},
        {"from": "human", "value": "V", "weight": null}, {"from": "gpt", "value": "B", "weight": 1}
    ]});
    assert_eq!(chat(weighted).trained, [false, false, false, true]);
    let mood = json!({"conversations": [talk[0], {"from": "gpt", "value": "A", "mood": "x"}]});
    refused(mood, &["conversations[1]", "`mood`"]);
}

#[test]
fn alpaca_has_a_system_message_and_a_history_whose_answers_are_trained() {
    let line = json!({"instruction": "I", "output": "O", "system": "S",
                      "history": [["q", "a"], ["r", "b"]]});
    let found = chat(line.clone());
    assert_eq!(found.trained, [false, false, true, false, true, false, true]);
    let expected = turns(&[
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
        ("user", "I"),
        ("assistant", "O"),
    ]);
    assert_eq!(texts(line), expected);
    let empty = json!({"instruction": "I", "output": "O", "system": "", "history": []});
    assert_eq!(texts(empty), turns(&[("user", "I"), ("assistant", "O")]));
    refused(json!({"instruction": "I", "output": "O", "history": [["q"]]}), &["history[0]"]);
    refused(json!({"instruction": "I", "output": "O", "history": "q"}), &["`history`"]);
    refused(
        json!({"instruction": "I", "output": "O", "histroy": []}),
        &["`histroy`", "did you mean `history`?"],
    );
    // The `text` of Stanford's Alpaca file repeats the example.
    let line = json!({"instruction": "I", "output": "O", "text": "### I\n### O"});
    assert_eq!(texts(line).len(), 2);
    refused(json!({"instruction": "I", "output": "O", "text": "other"}), &["`text`"]);
}

#[test]
fn labels_of_completions_are_heeded() {
    let line = |label: Value| json!({"prompt": "p", "completion": "c", "label": label});
    let expected = Example::Completion { prompt: "p".into(), completion: "c".into() };
    for label in [json!(true), Value::Null] {
        assert_eq!(parse(&line(label).to_string()).unwrap().1, expected);
    }
    refused(line(json!(false)), &["`label` is false", "dpo"]);
    refused(line(json!(1)), &["`label` is neither"]);
    refused(json!({"text": "a", "label": true}), &["`label` is unknown"]);
}

#[test]
fn unknown_keys_are_refused_and_metadata_is_not() {
    let user = json!({"role": "user", "content": "U"});
    let answer = json!({"role": "assistant", "content": "A"});
    let fine = json!({"messages": [user, answer], "id": 1, "source": "s", "metadata": {"k": 1},
                      "score": 0.5, "other": null, "parallel_tool_calls": false});
    assert_eq!(texts(fine).len(), 2);
    // In HF's ultrachat_200k, `prompt` repeats the first user message.
    let repeated = json!({"messages": [user, answer], "prompt": "U", "prompt_id": "x"});
    assert_eq!(texts(repeated).len(), 2);
    refused(json!({"messages": [user, answer], "prompt": "V"}), &["`prompt`"]);
    refused(
        json!({"messages": [user, answer], "tool": [], "mood": 1}),
        &["`tool` is unknown: did you mean `tools`?", "`mood` is unknown"],
    );
    let message = |key: &str, value: Value| {
        let mut answer = answer.clone();
        answer[key] = value;
        json!({"messages": [user, answer]})
    };
    refused(message("wieght", json!(0)), &["messages[1]", "did you mean `weight`?"]);
    refused(message("refusal", json!("no")), &["messages[1]", "`refusal`"]);
    refused(message("reasoning", json!(1)), &["messages[1]", "`reasoning` is not a string"]);
    for (key, value) in [
        ("refusal", Value::Null),
        ("annotations", json!([])),
        ("tool_calls", json!([])),
        ("reasoning_content", json!("")),
        ("extra", Value::Null),
    ] {
        assert_eq!(chat(message(key, value)), chat(json!({"messages": [user, answer]})), "{key}");
    }
    for key in ["reasoning_content", "reasoning", "thinking"] {
        let found = chat(message(key, json!("R")));
        assert_eq!(found.messages[1]["reasoning_content"], "R", "{key}");
    }
    let asks = r#"{"prompt": "p", "answer": 4, "labl": null}"#;
    let (_, Line::Prompt(prompt)) = parse_for(asks, DatasetKind::PromptOnly).unwrap() else {
        panic!()
    };
    assert_eq!((&prompt.item["answer"], &prompt.item["labl"]), (&json!(4), &Value::Null));
    let pair = r#"{"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 9, "margn": 1}"#;
    let error = parse_for(pair, DatasetKind::Preference).unwrap_err();
    assert!(error.contains("did you mean `margin`?") && !error.contains("score_chosen"), "{error}");
}

#[test]
fn prompts_and_completions_may_be_messages() {
    let (user, answer) = (json!({"role": "user", "content": "U"}), "A");
    let said = json!({"role": "assistant", "content": answer});
    let expected = chat(json!({"messages": [user, said]}));
    for (prompt, completion) in [
        (json!([user]), json!([said])),
        (json!([user]), json!(answer)),
        (json!("U"), json!([said])),
        // The prompt is repeated in the completions.
        (json!([user]), json!([user, said])),
    ] {
        let line = json!({"prompt": prompt, "completion": completion});
        assert_eq!(chat(line.clone()), expected, "{line}");
    }
    let before = json!({"prompt": [user, said, user], "completion": [said, user, said]});
    let found = chat(before);
    assert_eq!(found.trained, [false, false, false, true, false, true]);
    refused(json!({"prompt": [user], "completion": [user]}), &["`completion`"]);
    refused(json!({"prompt": 1, "completion": "c"}), &["`prompt` is neither"]);
    refused(json!({"prompt": [{"role": "user"}], "completion": "c"}), &["prompt[0]"]);
    let asks = json!({"prompt": [user], "answer": 4}).to_string();
    let (_, Line::Prompt(prompt)) = parse_for(&asks, DatasetKind::PromptOnly).unwrap() else {
        panic!()
    };
    assert_eq!((prompt.chat.messages, prompt.chat.trained), (vec![user], vec![false]));
}

#[test]
fn all_kinds_of_bad_lines_are_named_at_once() {
    let good = r#"{"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]}"#;
    let lines = [
        good,
        "{",
        r#"{"text": "another format"}"#,
        r#"{"messages": [], "mood": 1}"#,
        // The template does not render the reasoning.
        r#"{"messages": [{"role": "assistant", "content": "A", "reasoning_content": "R"}]}"#,
        good,
        r#"{"messages": [{"role": "user", "content": "U"}]}"#,
    ];
    let error = prepared(&lines.join("\n"), 99).err().unwrap().to_string();
    for expected in [
        "line 2: it is not JSON",
        "line 3: it is of another format (`text`) than line 1 (`messages`)",
        "line 4: the key `mood` is unknown",
        "line 5: messages[0]: the chat template does not render `reasoning_content`",
        "line 7: no message of the assistant",
    ] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
    assert!(!error.contains("line 1:") && !error.contains("line 6"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("data.jsonl"), folder.path().join("cache"));
    std::fs::write(&source, b"\xff\n{}\n{\"prompt\": \"p\", \"chosen\": 1, \"rejected\": 2}")
        .unwrap();
    let error = prepare_pairs(&source, &encoder(), 9, &cache).err().unwrap().to_string();
    for expected in ["line 1: it is not UTF-8", "line 2: its keys (none)", "line 3: `chosen`"] {
        assert!(error.contains(expected), "{expected}: {error}");
    }
}
