//! Lines with two completions of one prompt.

use super::format::{Example, Pair, PairFacts};
use super::keys::{METADATA, check_keys, without_nulls};
use super::messages::{Turn, answer, asked, chat, text, tools, turns, with_prompt};
use serde_json::{Map, Value};

/// The prefix of a turn in hh-rlhf's transcripts, and the role of the turn.
const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];

/// A line in OpenAI's format.
///
/// # Errors
/// What is wrong with the line.
pub(super) fn preferred(line: &Map<String, Value>) -> Result<Pair, String> {
    let Some(Value::Object(input)) = line.get("input") else {
        return Err("`input` is no object with `messages`".into());
    };
    let input = without_nulls(input.clone());
    check_keys(&input, &["messages", "tools", "parallel_tool_calls"], METADATA)
        .map_err(|what| format!("input: {what}"))?;
    let Some(Value::Array(asked)) = input.get("messages") else {
        return Err("`input.messages` is no list".into());
    };
    let prompt = turns(asked, "input.messages")?;
    let output = |key: &str| match line.get(key) {
        Some(Value::Array(list)) => turns(list, key),
        _ => Err(format!("`{key}` is no list of messages")),
    };
    let keys = ["preferred_output", "non_preferred_output"];
    let answers = [output(keys[0])?, output(keys[1])?];
    let [chosen, rejected] = answered(&prompt, answers, keys, &tools(&input)?)?;
    Ok(Pair { chosen, rejected, facts: facts(line)? })
}

/// A line with `chosen` and `rejected`, with or without a `prompt`.
///
/// If the prompt and the completions are texts, the completions continue the prompt unchanged, as
/// in TRL. If a conversation begins with the prompt (HF's ultrafeedback_binarized), the prompt is
/// used once. A prompt that is only a part of the first message is put before the messages.
///
/// # Errors
/// What is wrong with the line.
pub(super) fn chosen(line: &Map<String, Value>) -> Result<Pair, String> {
    let facts = facts(line)?;
    // In HF's ultrafeedback_binarized, `messages` repeats the chosen conversation.
    if line.get("messages").is_some_and(|messages| *messages != line["chosen"]) {
        return Err("`messages` stands beside `chosen` and is not the same: remove it".into());
    }
    let keys = ["chosen", "rejected"];
    let [chosen, rejected] = match line.get("prompt") {
        Some(Value::String(prompt)) if line["chosen"].is_string() => {
            let plain = |key: &str| {
                let completion = text(line, key)?.to_owned();
                Ok::<_, String>(Example::Completion { prompt: prompt.clone(), completion })
            };
            if line.contains_key("tools") {
                return Err("`tools` need messages: `prompt` and `chosen` are texts".into());
            }
            [plain("chosen")?, plain("rejected")?]
        }
        Some(_) => {
            let prompt = asked(line, "prompt")?;
            let answers = [answer(line, keys[0])?, answer(line, keys[1])?];
            answered(&prompt, answers, keys, &tools(line)?)?
        }
        None => {
            let whole = |key: &str| match &line[key] {
                Value::String(transcript) => spoken(transcript, key),
                Value::Array(list) => turns(list, key),
                _ => Err(format!("`{key}` is neither a transcript nor a list of messages")),
            };
            parted([whole(keys[0])?, whole(keys[1])?], keys, &tools(line)?)?
        }
    };
    Ok(Pair { chosen, rejected, facts })
}

/// A pair from a prompt and two completions, which may repeat the prompt.
fn answered(
    prompt: &[Turn],
    answers: [Vec<Turn>; 2],
    keys: [&str; 2],
    tools: &Option<Vec<Value>>,
) -> Result<[Example; 2], String> {
    let [chosen, rejected] = &answers;
    match (with_prompt(prompt, chosen), with_prompt(prompt, rejected)) {
        (Some((chosen, _)), Some((rejected, _))) => parted([chosen, rejected], keys, tools),
        (None, None) => {
            let each = |answer, key| continued(prompt, answer, key, tools);
            Ok([each(chosen, keys[0])?, each(rejected, keys[1])?])
        }
        (found, _) => {
            let (with, without) =
                if found.is_some() { (keys[0], keys[1]) } else { (keys[1], keys[0]) };
            Err(format!(
                "`{with}` begins with the messages of the prompt and `{without}` does not: remove \
                 them from `{with}`"
            ))
        }
    }
}

/// A pair from two conversations; their common beginning is the prompt.
fn parted(
    [chosen, rejected]: [Vec<Turn>; 2],
    keys: [&str; 2],
    tools: &Option<Vec<Value>>,
) -> Result<[Example; 2], String> {
    let both = chosen.iter().zip(&rejected);
    let same = both.take_while(|(a, b)| a.message == b.message).count();
    // If both conversations are equal, the last message is the completion.
    let same = same.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1));
    let prompt = &chosen[..same];
    Ok([
        continued(prompt, &chosen[same..], keys[0], tools)?,
        continued(prompt, &rejected[same..], keys[1], tools)?,
    ])
}

/// An example from a prompt and a completion; the assistant messages of the completion are trained.
fn continued(
    prompt: &[Turn],
    answer: &[Turn],
    key: &str,
    tools: &Option<Vec<Value>>,
) -> Result<Example, String> {
    if !answer.last().is_some_and(|last| last.trained) {
        return Err(format!("`{key}` does not end with a message of the assistant"));
    }
    let prompt = prompt.iter().map(|turn| Turn { trained: false, ..turn.clone() });
    let turns = prompt.chain(answer.iter().cloned()).collect();
    Ok(Example::Chat(chat(turns, tools.clone())))
}

/// The turns of a transcript.
fn spoken(transcript: &str, key: &str) -> Result<Vec<Turn>, String> {
    let next = |text: &str| {
        let found = TURNS.iter().filter_map(|(mark, role)| Some((text.find(mark)?, *mark, *role)));
        found.min()
    };
    let mut messages = Vec::new();
    let mut rest = transcript;
    let Some((0, ..)) = next(rest) else {
        return Err(format!(
            "without a `prompt`, `{key}` is a list of messages or a transcript that begins with \
             `\\n\\nHuman:`"
        ));
    };
    while let Some((0, mark, role)) = next(rest) {
        rest = &rest[mark.len()..];
        let end = next(rest).map_or(rest.len(), |(at, ..)| at);
        messages.push(Turn::new(role, rest[..end].trim()));
        rest = &rest[end..];
    }
    Ok(messages)
}

fn facts(line: &Map<String, Value>) -> Result<PairFacts, String> {
    let number = |key: &str, least: f64, most: f64| match line.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if (least..=most).contains(&number) => Ok(Some(number)),
            _ => Err(format!("`{key}` is no number from {least} to {most}")),
        },
    };
    let margin = number("margin", -1e6, 1e6)?;
    let label = number("label", 0.0, 1.0)?.unwrap_or(1.0);
    Ok(PairFacts { margin, label })
}

#[cfg(test)]
mod tests {
    use super::super::format::{DatasetKind, Format, Line, parse};
    use super::*;

    fn read(line: &str) -> Result<(Format, Pair), String> {
        match parse(line, DatasetKind::Preference)? {
            (format, Line::Pair(pair)) => Ok((format, *pair)),
            (_, other) => panic!("{other:?}"),
        }
    }

    fn chat(example: &Example) -> (Vec<(&str, &str)>, &[bool]) {
        let Example::Chat(chat) = example else { panic!("{example:?}") };
        let mut turns = Vec::new();
        for message in &chat.messages {
            let of = |key: &str| message[key].as_str().unwrap();
            turns.push((of("role"), of("content")));
        }
        (turns, &chat.trained)
    }

    #[test]
    fn openai_pairs() {
        let line = r#"{"input": {"messages": [{"role": "user", "content": "a"}]},
            "preferred_output": [{"role": "assistant", "content": "b"}],
            "non_preferred_output": [{"role": "assistant", "content": "c"}]}"#;
        let (format, pair) = read(line).unwrap();
        assert_eq!(format, Format::Preferred);
        let (turns, trained) = chat(&pair.chosen);
        assert_eq!(turns, [("user", "a"), ("assistant", "b")]);
        assert_eq!(trained, [false, true]);
        assert_eq!(chat(&pair.rejected).0[1], ("assistant", "c"));
        assert_eq!(pair.facts, PairFacts { margin: None, label: 1.0 });
    }

    #[test]
    fn prompts_are_texts_or_messages() {
        let (_, pair) =
            read(r#"{"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": 0.5}"#).unwrap();
        let expected = Example::Completion { prompt: "1+1=".into(), completion: "2".into() };
        assert_eq!((pair.chosen, pair.facts.margin), (expected, Some(0.5)));
        let line = r#"{"prompt": [{"role": "user", "content": "a"}], "chosen": "b",
            "rejected": [{"role": "assistant", "content": "c"}], "label": 0.8}"#;
        let (_, pair) = read(line).unwrap();
        assert_eq!(chat(&pair.chosen).0, [("user", "a"), ("assistant", "b")]);
        assert_eq!(chat(&pair.rejected).0, [("user", "a"), ("assistant", "c")]);
        assert_eq!(pair.facts.label, 0.8);
    }

    #[test]
    fn transcripts_share_their_beginning() {
        let line = r#"{"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e\n\nf"}"#;
        let (format, pair) = read(line).unwrap();
        assert_eq!(format, Format::Chosen);
        let (turns, trained) = chat(&pair.rejected);
        assert_eq!(
            turns,
            [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "e\n\nf")]
        );
        assert_eq!(trained, [false, false, false, true]);
        // If the conversations differ earlier, everything from the first difference on is the
        // completion.
        let line = r#"{"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: x"}"#;
        let (_, pair) = read(line).unwrap();
        assert_eq!(chat(&pair.chosen).1, [false, true, false, true]);
        assert_eq!(chat(&pair.rejected).1, [false, true]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, why) in [
            (r#"{"messages": []}"#, "one answer"),
            (r#"{"chosen": "a", "rejected": "b"}"#, "Human"),
            (r#"{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}"#, "end with"),
            (r#"{"prompt": 1, "chosen": "a", "rejected": "b"}"#, "`prompt`"),
            (r#"{"prompt": "p", "chosen": "a", "rejected": 2}"#, "`rejected`"),
            (r#"{"prompt": "p", "chosen": "a", "rejected": "b", "label": 2}"#, "`label`"),
            (r#"{"preferred_output": [], "non_preferred_output": []}"#, "`input`"),
            (r#"{"a": 1}"#, "preferred_output"),
        ] {
            let found = read(line).unwrap_err();
            assert!(found.contains(why), "{line}: {found}");
        }
        let pair = r#"{"prompt": "p", "chosen": "a", "rejected": "b"}"#;
        assert!(parse(pair, DatasetKind::PromptCompletion).unwrap_err().contains("`dpo`"));
    }
}
