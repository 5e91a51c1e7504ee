//! Lines of JSONL files, in the formats that people have.

use super::prompts::Prompt;
use serde_json::{Map, Value, json};

/// What a file's lines are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `{"messages": [{"role", "content", "weight"?}], "tools"?}` (OpenAI).
    Messages,
    /// `{"prompt", "completion"}`: plain text that goes on.
    Completion,
    /// `{"instruction", "input"?, "output"}` (Alpaca).
    Alpaca,
    /// `{"conversations": [{"from", "value"}]}` (ShareGPT).
    ShareGpt,
    /// `{"text"}`.
    Text,
    /// `{"input": {"messages"}, "preferred_output", "non_preferred_output"}` (OpenAI).
    Preferred,
    /// `{"prompt"?, "chosen", "rejected"}`: messages, texts, or transcripts as hh-rlhf has them.
    Chosen,
    /// `{"messages", …}` or `{"prompt", …}`: what is to be answered, and keys for graders.
    Asked,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Examples of what to write.
    Answers,
    /// Pairs of answers, one better than the other.
    Preferences,
    /// Prompts, whose answers are sampled.
    Prompts,
}

/// What a line says.
#[derive(Debug, Clone, PartialEq)]
pub enum Line {
    One(Example),
    Pair(Box<Pair>),
    Prompt(Box<Prompt>),
}

/// Two answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub chosen: Example,
    pub rejected: Example,
    pub facts: PairFacts,
}

/// What is known of a pair besides its texts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairFacts {
    /// How far apart the answers ought to be.
    pub margin: Option<f64>,
    /// How likely the chosen one is the better one.
    pub label: f64,
}

/// One example.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    Chat(Chat),
    Completion { prompt: String, completion: String },
    Text(String),
}

/// A conversation as its template takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    pub messages: Vec<Value>,
    /// (messages) whether the message is trained: the assistant's, unless its `weight` is 0.
    pub trained: Vec<bool>,
    pub tools: Option<Vec<Value>>,
}

const ANSWERS: &str =
    "messages; prompt and completion; instruction and output; conversations; text";
const PROMPTS: &str =
    "messages that end with the user's; prompt (beside them any keys for graders)";
const PREFERENCES: &str = "input, preferred_output and non_preferred_output; prompt, chosen and \
                           rejected; chosen and rejected";

impl Format {
    /// What a line looks like.
    pub fn of(line: &Map<String, Value>) -> Option<Self> {
        let has = |key: &str| line.contains_key(key);
        match () {
            () if has("messages") => Some(Self::Messages),
            () if has("conversations") => Some(Self::ShareGpt),
            () if has("instruction") && has("output") => Some(Self::Alpaca),
            () if has("chosen") && has("rejected") => Some(Self::Chosen),
            () if has("preferred_output") => Some(Self::Preferred),
            () if has("prompt") && has("completion") => Some(Self::Completion),
            () if has("text") => Some(Self::Text),
            () => None,
        }
    }

    fn purpose(self) -> Purpose {
        match self {
            Self::Preferred | Self::Chosen => Purpose::Preferences,
            Self::Asked => Purpose::Prompts,
            _ => Purpose::Answers,
        }
    }
}

impl Purpose {
    fn known(self) -> &'static str {
        match self {
            Self::Answers => ANSWERS,
            Self::Preferences => PREFERENCES,
            Self::Prompts => PROMPTS,
        }
    }
}

/// Reads a line of a file that is for something.
///
/// # Errors
/// What is wrong with it, in words.
pub fn parse(line: &str, purpose: Purpose) -> Result<(Format, Line), String> {
    let value: Value =
        serde_json::from_str(line).map_err(|error| format!("it is not JSON: {error}"))?;
    let Value::Object(line) = value else { return Err("it is no JSON object".into()) };
    let format = match purpose {
        // Of other formats too: what else stands in a line is the graders'.
        Purpose::Prompts => {
            let asks = line.contains_key("messages") || line.contains_key("prompt");
            asks.then_some(Format::Asked)
        }
        Purpose::Answers | Purpose::Preferences => Format::of(&line),
    };
    let Some(format) = format else {
        let keys: Vec<_> = line.keys().map(|key| format!("`{key}`")).take(8).collect();
        let found = if keys.is_empty() { "none".into() } else { keys.join(", ") };
        return Err(format!("its keys ({found}) are of no known format: {}", purpose.known()));
    };
    if format.purpose() != purpose {
        let (is, wanted) = match purpose {
            Purpose::Answers => ("a pair of answers, for `dpo` and `reward`", "an example of one"),
            Purpose::Preferences | Purpose::Prompts => ("one answer", "a pair of them"),
        };
        return Err(format!("it is {is}, where {wanted} is wanted: {}", purpose.known()));
    }
    let line = match format {
        Format::Messages => Line::One(Example::Chat(messages(&line)?)),
        Format::ShareGpt => Line::One(Example::Chat(share_gpt(&line)?)),
        Format::Alpaca => Line::One(Example::Chat(alpaca(&line)?)),
        Format::Completion => Line::One(Example::Completion {
            prompt: text(&line, "prompt")?.into(),
            completion: filled(&line, "completion")?.into(),
        }),
        Format::Text => Line::One(Example::Text(filled(&line, "text")?.into())),
        Format::Preferred => Line::Pair(Box::new(super::pairs::preferred(&line)?)),
        Format::Chosen => Line::Pair(Box::new(super::pairs::chosen(&line)?)),
        Format::Asked => Line::Prompt(Box::new(super::prompts::prompt(&line)?)),
    };
    Ok((format, line))
}

pub(super) fn text<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("`{key}` is no string")),
        None => Err(format!("`{key}` is missing")),
    }
}

fn filled<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    let text = text(object, key)?;
    if text.is_empty() { Err(format!("`{key}` is empty")) } else { Ok(text) }
}

fn messages(line: &Map<String, Value>) -> Result<Chat, String> {
    let Some(Value::Array(list)) = line.get("messages") else {
        return Err("`messages` is no list".into());
    };
    let (messages, trained) = turns(list, "messages")?;
    if !trained.contains(&true) {
        return Err("no message of the assistant is trained".into());
    }
    Ok(Chat { messages, trained, tools: tools(line)? })
}

pub(super) fn tools(line: &Map<String, Value>) -> Result<Option<Vec<Value>>, String> {
    match line.get("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(tools)) => Ok(Some(tools.clone())),
        Some(_) => Err("`tools` is no list".into()),
    }
}

/// Messages as a template takes them, and which of them are trained. `key` is where they stand.
pub(super) fn turns(list: &[Value], key: &str) -> Result<(Vec<Value>, Vec<bool>), String> {
    let (mut messages, mut trained) = (Vec::new(), Vec::new());
    for (number, message) in list.iter().enumerate() {
        let at = |what: String| format!("{key}[{number}]: {what}");
        let Value::Object(message) = message else { return Err(at("it is no object".into())) };
        let mut message = message.clone();
        let weight = message.remove("weight");
        let role = text(&message, "role").map_err(at)?;
        let role = match role {
            // OpenAI's newer name.
            "developer" => "system",
            "system" | "user" | "assistant" | "tool" => role,
            other => return Err(at(format!("the role `{other}` is unknown"))),
        };
        let assistant = role == "assistant";
        message["role"] = json!(role);
        let weight = match weight.as_ref() {
            None | Some(Value::Null) => assistant,
            Some(_) if !assistant => {
                return Err(at("only the assistant's messages have a `weight`".into()));
            }
            Some(weight) => match weight.as_f64() {
                Some(0.0) => false,
                Some(1.0) => true,
                _ => return Err(at("`weight` is neither 0 nor 1".into())),
            },
        };
        let calls = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
        match message.get("content") {
            Some(Value::String(_)) => {}
            Some(Value::Array(parts)) => {
                let text = joined(parts).map_err(at)?;
                message["content"] = json!(text);
            }
            None | Some(Value::Null) if assistant && calls => {
                message.insert("content".into(), Value::Null);
            }
            None => return Err(at("`content` is missing".into())),
            Some(_) => return Err(at("`content` is neither a string nor a list of parts".into())),
        }
        messages.push(Value::Object(message));
        trained.push(weight);
    }
    Ok((messages, trained))
}

fn joined(parts: &[Value]) -> Result<String, String> {
    let each = parts.iter().map(|part| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (kind, _) => Err(format!("a part of type `{}` is no text", kind.unwrap_or("?"))),
    });
    each.collect()
}

fn plain_chat(turns: Vec<(&str, String)>) -> Chat {
    let trained = turns.iter().map(|(role, _)| *role == "assistant").collect();
    let message = |(role, content)| json!({"role": role, "content": content});
    Chat { messages: turns.into_iter().map(message).collect(), trained, tools: None }
}

fn alpaca(line: &Map<String, Value>) -> Result<Chat, String> {
    let (instruction, output) = (filled(line, "instruction")?, filled(line, "output")?);
    let input = match line.get("input") {
        None | Some(Value::Null) => "",
        Some(_) => text(line, "input")?,
    };
    let asked = match input {
        "" => instruction.to_owned(),
        input => format!("{instruction}\n\n{input}"),
    };
    Ok(plain_chat(vec![("user", asked), ("assistant", output.to_owned())]))
}

fn share_gpt(line: &Map<String, Value>) -> Result<Chat, String> {
    let Some(Value::Array(list)) = line.get("conversations") else {
        return Err("`conversations` is no list".into());
    };
    let mut turns = Vec::new();
    for (number, turn) in list.iter().enumerate() {
        let at = |what: String| format!("conversations[{number}]: {what}");
        let Value::Object(turn) = turn else { return Err(at("it is no object".into())) };
        let role = match text(turn, "from").map_err(at)? {
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "bing" | "bard" => "assistant",
            "system" => "system",
            "tool" | "observation" => "tool",
            other => return Err(at(format!("`from` is `{other}`, which is unknown"))),
        };
        turns.push((role, text(turn, "value").map_err(at)?.to_owned()));
    }
    if !turns.iter().any(|(role, _)| *role == "assistant") {
        return Err("nothing is from the assistant (`gpt`)".into());
    }
    Ok(plain_chat(turns))
}
