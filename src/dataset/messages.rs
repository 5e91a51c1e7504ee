//! Conversations: lists of messages as a chat template takes them, and which of them are trained.

use super::format::Chat;
use super::keys::{check_keys, without_nulls};
use serde_json::{Map, Value, json};

/// The keys of a message.
const MESSAGE: &[&str] = &[
    "role",
    "content",
    "name",
    "weight",
    "tool_calls",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
];
/// Keys of OpenAI's responses that are allowed in a message if they are null or empty.
const EMPTY: &[&str] = &["refusal", "annotations", "audio", "function_call", "images", "videos"];
/// Key names of reasoning text; templates use the first name.
const REASONING: [&str; 3] = ["reasoning_content", "reasoning", "thinking"];

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Turn {
    pub(super) message: Value,
    /// Assistant messages are trained, unless their `weight` is 0.
    pub(super) trained: bool,
}

impl Turn {
    pub(super) fn new(role: &str, content: &str) -> Self {
        let message = json!({"role": role, "content": content});
        Self { message, trained: role == "assistant" }
    }

    pub(super) fn role(&self) -> &str {
        self.message["role"].as_str().unwrap_or_default()
    }

    /// Whether both messages are equal, except for white space at the ends of their texts.
    fn repeats(&self, other: &Self) -> bool {
        let text = |turn: &Self| turn.message["content"].as_str().map(str::trim).map(str::to_owned);
        let rest = |turn: &Self| {
            let mut message = turn.message.as_object().cloned().unwrap_or_default();
            message.remove("content");
            message
        };
        text(self) == text(other) && rest(self) == rest(other)
    }
}

pub(super) fn chat(turns: Vec<Turn>, tools: Option<Vec<Value>>) -> Chat {
    let (messages, trained) = turns.into_iter().map(|turn| (turn.message, turn.trained)).unzip();
    Chat { messages, trained, tools }
}

/// Parses a list of messages. `key` is the key of the list, for error messages.
///
/// # Errors
/// What is wrong, with the number of the message.
pub(super) fn turns(list: &[Value], key: &str) -> Result<Vec<Turn>, String> {
    let each = list.iter().enumerate().map(|(number, message)| {
        let found = match message {
            Value::Object(message) => turn(message.clone()),
            _ => Err("it is no object".into()),
        };
        found.map_err(|what| format!("{key}[{number}]: {what}"))
    });
    each.collect()
}

fn turn(message: Map<String, Value>) -> Result<Turn, String> {
    let mut message = without_nulls(message);
    for key in EMPTY {
        let nothing = match message.get(*key) {
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::String(text)) => text.is_empty(),
            _ => false,
        };
        if nothing {
            message.remove(*key);
        }
    }
    if let Some(Value::String(_)) = message.get("refusal") {
        return Err("`refusal` is not trained: put its text into `content`".into());
    }
    check_keys(&message, MESSAGE, &[])?;
    let weight = message.remove("weight");
    let role = match text(&message, "role")? {
        // OpenAI's newer name of the system role.
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool") => role,
        other => {
            return Err(format!(
                "the role `{other}` is unknown: use `system`, `user`, `assistant` or `tool`"
            ));
        }
    };
    let assistant = role == "assistant";
    message["role"] = json!(role);
    let trained = weighted(weight.as_ref(), assistant)?;
    reasoning(&mut message, assistant)?;
    let calls = calls(&mut message, assistant)?;
    match message.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let text = joined(parts)?;
            message["content"] = json!(text);
        }
        None if assistant && calls => {
            message.insert("content".into(), Value::Null);
        }
        None => return Err("`content` is missing".into()),
        Some(_) => return Err("`content` is neither a string nor a list of parts".into()),
    }
    Ok(Turn { message: Value::Object(message), trained })
}

/// Whether a message with a `weight` is trained.
pub(super) fn weighted(weight: Option<&Value>, assistant: bool) -> Result<bool, String> {
    match weight.map(|weight| weight.as_f64()) {
        None => Ok(assistant),
        Some(Some(0.0)) => Ok(false),
        Some(Some(1.0)) if assistant => Ok(true),
        Some(Some(1.0)) => {
            Err("only the assistant's messages can have the `weight` 1: remove it".into())
        }
        Some(_) => Err("`weight` is neither 0 nor 1".into()),
    }
}

/// Renames the reasoning key to the name that templates use.
fn reasoning(message: &mut Map<String, Value>, assistant: bool) -> Result<(), String> {
    let mut found = None;
    for key in REASONING {
        match message.remove(key) {
            None => {}
            Some(Value::String(text)) if text.trim().is_empty() => {}
            Some(Value::String(_)) if !assistant => {
                return Err(format!("only the assistant's messages can have `{key}`: remove it"));
            }
            Some(Value::String(text)) => match &found {
                Some(other) if *other != text => {
                    return Err(format!("`{key}` differs from `reasoning_content`: keep one"));
                }
                _ => found = Some(text),
            },
            Some(_) => return Err(format!("`{key}` is not a string")),
        }
    }
    if let Some(text) = found {
        message.insert(REASONING[0].into(), json!(text));
    }
    Ok(())
}

/// Whether the message calls tools.
fn calls(message: &mut Map<String, Value>, assistant: bool) -> Result<bool, String> {
    let Some(calls) = message.get("tool_calls") else { return Ok(false) };
    let Value::Array(calls) = calls else { return Err("`tool_calls` is no list".into()) };
    if calls.is_empty() {
        message.remove("tool_calls");
        return Ok(false);
    }
    if !assistant {
        return Err("only the assistant's messages can have `tool_calls`: remove them".into());
    }
    for (number, call) in calls.iter().enumerate() {
        let at = |what: String| format!("tool_calls[{number}]: {what}");
        let Value::Object(call) = call else { return Err(at("it is no object".into())) };
        check_keys(call, &["id", "type", "function", "index"], &[]).map_err(at)?;
        let Some(Value::Object(function)) = call.get("function") else {
            return Err(at("`function` is no object".into()));
        };
        check_keys(function, &["name", "arguments", "description"], &[]).map_err(at)?;
        text(function, "name").map_err(at)?;
    }
    Ok(true)
}

fn joined(parts: &[Value]) -> Result<String, String> {
    let each = parts.iter().map(|part| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (kind, _) => Err(format!("a part of type `{}` is not text", kind.unwrap_or("?"))),
    });
    each.collect()
}

pub(super) fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("`{key}` is not a string")),
        None => Err(format!("`{key}` is missing")),
    }
}

/// The tools of a conversation: a list, or a list as JSON in a string.
pub(super) fn tools(line: &Map<String, Value>) -> Result<Option<Vec<Value>>, String> {
    match line.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(tools)) => Ok(Some(tools.clone())),
        Some(Value::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Value::String(text)) => match serde_json::from_str(text) {
            Ok(Value::Array(tools)) => Ok(Some(tools)),
            _ => Err("`tools` is a string that is no JSON list".into()),
        },
        Some(_) => Err("`tools` is no list".into()),
    }
}

/// A prompt as messages; a plain text is a user message.
pub(super) fn asked(line: &Map<String, Value>, key: &str) -> Result<Vec<Turn>, String> {
    match line.get(key) {
        Some(Value::String(prompt)) => Ok(vec![Turn::new("user", prompt)]),
        Some(Value::Array(list)) => {
            let mut turns = turns(list, key)?;
            turns.iter_mut().for_each(|turn| turn.trained = false);
            Ok(turns)
        }
        Some(_) => Err(format!("`{key}` is neither a string nor a list of messages")),
        None => Err(format!("`{key}` is missing")),
    }
}

/// A completion as messages; a plain text is an assistant message.
pub(super) fn answer(line: &Map<String, Value>, key: &str) -> Result<Vec<Turn>, String> {
    match line.get(key) {
        Some(Value::String(answer)) => Ok(vec![Turn::new("assistant", answer)]),
        Some(Value::Array(list)) => turns(list, key),
        Some(_) => Err(format!("`{key}` is neither a string nor a list of messages")),
        None => Err(format!("`{key}` is missing")),
    }
}

/// If `answer` is a whole conversation that begins with the prompt, where the system message may be
/// in only one of them: returns the conversation with the system message, and the number of
/// messages that form the prompt. A text that is only a part of a message is not such a prompt.
pub(super) fn with_prompt(asked: &[Turn], answer: &[Turn]) -> Option<(Vec<Turn>, usize)> {
    let system = |turns: &[Turn]| usize::from(turns.first().is_some_and(|t| t.role() == "system"));
    let (asked_system, asked) = asked.split_at(system(asked));
    let (answer_system, answer) = answer.split_at(system(answer));
    let differ = match (asked_system, answer_system) {
        ([one], [other]) => !one.repeats(other),
        _ => false,
    };
    let begun = !asked.is_empty() || (!asked_system.is_empty() && !answer_system.is_empty());
    let repeats = begun
        && answer.len() > asked.len()
        && asked.iter().zip(answer).all(|(one, other)| one.repeats(other));
    if differ || !repeats {
        return None;
    }
    let first = asked_system.first().or(answer_system.first());
    let prompt = usize::from(first.is_some()) + asked.len();
    Some((first.into_iter().chain(answer).cloned().collect(), prompt))
}
