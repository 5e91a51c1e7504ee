//! Lines that hold two answers to one prompt.

use super::format::{Chat, Example, Pair, PairFacts, text, tools, turns};
use serde_json::{Map, Value, json};

/// What hh-rlhf's transcripts put before a turn, and whose turn it is.
const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];

/// OpenAI's form.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn preferred(line: &Map<String, Value>) -> Result<Pair, String> {
    let Some(Value::Object(input)) = line.get("input") else {
        return Err("`input` is no object with `messages`".into());
    };
    let Some(Value::Array(asked)) = input.get("messages") else {
        return Err("`input.messages` is no list".into());
    };
    let prompt = turns(asked, "input.messages")?.0;
    let tools = tools(input)?;
    let answer = |key: &str| match line.get(key) {
        Some(Value::Array(list)) => continued(&prompt, list, key, tools.clone()),
        _ => Err(format!("`{key}` is no list of messages")),
    };
    let (chosen, rejected) = (answer("preferred_output")?, answer("non_preferred_output")?);
    Ok(Pair { chosen, rejected, facts: facts(line)? })
}

/// `chosen` and `rejected`, with or without a `prompt`.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn chosen(line: &Map<String, Value>) -> Result<Pair, String> {
    let facts = facts(line)?;
    let pair = |chosen, rejected| Ok(Pair { chosen, rejected, facts });
    match line.get("prompt") {
        Some(Value::String(prompt)) if line["chosen"].is_string() => {
            let plain = |key: &str| {
                let completion = text(line, key)?.to_owned();
                Ok::<_, String>(Example::Completion { prompt: prompt.clone(), completion })
            };
            pair(plain("chosen")?, plain("rejected")?)
        }
        Some(prompt) => {
            let asked = match prompt {
                Value::String(prompt) => vec![json!({"role": "user", "content": prompt})],
                Value::Array(list) => turns(list, "prompt")?.0,
                _ => return Err("`prompt` is neither a string nor a list of messages".into()),
            };
            let tools = tools(line)?;
            let answer = |key: &str| match &line[key] {
                Value::String(answer) => {
                    let answer = json!({"role": "assistant", "content": answer});
                    continued(&asked, &[answer], key, tools.clone())
                }
                Value::Array(list) => continued(&asked, list, key, tools.clone()),
                _ => Err(format!("`{key}` is neither a string nor a list of messages")),
            };
            pair(answer("chosen")?, answer("rejected")?)
        }
        None => {
            let whole = |key: &str| match &line[key] {
                Value::String(transcript) => spoken(transcript, key),
                Value::Array(list) => Ok(turns(list, key)?.0),
                _ => Err(format!("`{key}` is neither a transcript nor a list of messages")),
            };
            let (chosen, rejected) = (whole("chosen")?, whole("rejected")?);
            let same = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
            // Of two that are the same something has to be the answer.
            let same = same.min(chosen.len() - 1).min(rejected.len() - 1);
            let (asked, tools) = (&chosen[..same], tools(line)?);
            let chosen = continued(asked, &chosen[same..], "chosen", tools.clone())?;
            pair(chosen, continued(asked, &rejected[same..], "rejected", tools)?)
        }
    }
}

/// A prompt and an answer to it: what the assistant says there is trained.
fn continued(
    asked: &[Value],
    answer: &[Value],
    key: &str,
    tools: Option<Vec<Value>>,
) -> Result<Example, String> {
    let (answer, said) = turns(answer, key)?;
    if said.last() != Some(&true) {
        return Err(format!("`{key}` does not end with a message of the assistant"));
    }
    let trained = asked.iter().map(|_| false).chain(said).collect();
    let messages = asked.iter().cloned().chain(answer).collect();
    Ok(Example::Chat(Chat { messages, trained, tools }))
}

/// The turns of a transcript.
fn spoken(transcript: &str, key: &str) -> Result<Vec<Value>, String> {
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
        messages.push(json!({"role": role, "content": rest[..end].trim()}));
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
    use super::super::format::{Format, Line, Purpose, parse};
    use super::*;

    fn read(line: &str) -> Result<(Format, Pair), String> {
        match parse(line, Purpose::Preferences)? {
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
        // Where they part earlier, all from there on is an answer.
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
        assert!(parse(pair, Purpose::Answers).unwrap_err().contains("`dpo`"));
    }
}
