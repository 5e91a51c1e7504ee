//! Formats of JSONL lines in common use.
//!
//! Each format has a closed set of keys (see `keys.rs`); a key whose value is null counts as
//! absent. Content of a file that the model would not see is an error; it is never dropped
//! silently:
//!
//! | format | decision |
//! |---|---|
//! | prompt and completion | messages or texts; `label: true` (KTO) trains, `label: false` is rejected |
//! | Alpaca | `system` is the system message; the completions in `history` are trained, as in LLaMA-Factory; `text` may repeat the example |
//! | ShareGPT | `system` and `tools` apply to the conversation; a turn may have a `weight` |
//! | messages | `prompt` may repeat the first user message (HF's ultrachat_200k) |

use super::keys::{METADATA, check_keys, nearest, without_nulls};
use super::messages::{Turn, answer, asked, chat, text, tools, turns, weighted, with_prompt};
use super::prompts::Prompt;
use serde_json::{Map, Value};

/// The format of a file's lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `{"messages": [{"role", "content", "weight"?}], "tools"?}` (OpenAI).
    Messages,
    /// `{"prompt", "completion", "label"?, "tools"?}`: texts, where the completion continues the
    /// prompt, or lists of messages (TRL).
    Completion,
    /// `{"instruction", "input"?, "output", "system"?, "history"?}` (Alpaca).
    Alpaca,
    /// `{"conversations": [{"from", "value", "weight"?}], "system"?, "tools"?}` (ShareGPT).
    ShareGpt,
    /// `{"text"}`.
    Text,
    /// `{"input": {"messages"}, "preferred_output", "non_preferred_output"}` (OpenAI).
    Preferred,
    /// `{"prompt"?, "chosen", "rejected"}`: messages, texts, or transcripts in the format of
    /// hh-rlhf.
    Chosen,
    /// `{"messages", …}` or `{"prompt", …}`: a prompt, and further keys for graders.
    Asked,
}

/// The kind of examples in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatasetKind {
    /// Prompts with completions, conversations, or texts.
    PromptCompletion,
    /// Pairs of completions, a chosen and a rejected one.
    Preference,
    /// Prompts whose completions are sampled.
    PromptOnly,
}

/// A parsed line.
#[derive(Debug, Clone, PartialEq)]
pub enum Line {
    One(Example),
    Pair(Box<Pair>),
    Prompt(Box<Prompt>),
}

/// Two completions of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    pub chosen: Example,
    pub rejected: Example,
    pub facts: PairFacts,
}

/// Optional data of a pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairFacts {
    /// Required difference between the scores of the two completions.
    pub margin: Option<f64>,
    /// Probability that the chosen completion is better.
    pub label: f64,
}

/// One example.
#[derive(Debug, Clone, PartialEq)]
pub enum Example {
    Chat(Chat),
    Completion { prompt: String, completion: String },
    Text(String),
}

/// A conversation as the chat template takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    pub messages: Vec<Value>,
    /// (messages) whether the message is trained: assistant messages are, unless their `weight` is
    /// 0.
    pub trained: Vec<bool>,
    pub tools: Option<Vec<Value>>,
}

const ANSWERS: &str =
    "messages; prompt and completion; instruction and output; conversations; text";
const PROMPTS: &str =
    "messages that end with the user's; prompt (beside them any keys for graders)";
const PREFERENCES: &str = "input, preferred_output and non_preferred_output; prompt, chosen and \
                           rejected; chosen and rejected";
/// The keys from which formats are recognised.
const RECOGNISED: &[&str] = &[
    "messages",
    "prompt",
    "completion",
    "instruction",
    "output",
    "conversations",
    "text",
    "input",
    "preferred_output",
    "non_preferred_output",
    "chosen",
    "rejected",
];

impl Format {
    /// The format of a line. If several formats fit, the first one that suits the dataset.
    fn of(line: &Map<String, Value>, dataset: DatasetKind) -> Option<Self> {
        let has = |key: &str| line.contains_key(key);
        let answers = || match () {
            () if has("messages") => Some(Self::Messages),
            () if has("conversations") => Some(Self::ShareGpt),
            () if has("instruction") && has("output") => Some(Self::Alpaca),
            () if has("prompt") && has("completion") => Some(Self::Completion),
            () => None,
        };
        let pairs = || match () {
            () if has("chosen") && has("rejected") => Some(Self::Chosen),
            () if has("preferred_output") => Some(Self::Preferred),
            () => None,
        };
        let text = || has("text").then_some(Self::Text);
        match dataset {
            DatasetKind::PromptCompletion => answers().or_else(pairs).or_else(text),
            DatasetKind::Preference => pairs().or_else(answers).or_else(text),
            // Lines of other formats are accepted too: all other keys are for the graders.
            DatasetKind::PromptOnly => (has("messages") || has("prompt")).then_some(Self::Asked),
        }
    }

    fn dataset(self) -> DatasetKind {
        match self {
            Self::Preferred | Self::Chosen => DatasetKind::Preference,
            Self::Asked => DatasetKind::PromptOnly,
            _ => DatasetKind::PromptCompletion,
        }
    }

    /// The keys of the format; `None` if any key is allowed.
    fn keys(self) -> Option<&'static [&'static str]> {
        Some(match self {
            Self::Messages => &["messages", "tools", "parallel_tool_calls", "prompt"],
            Self::Completion => &["prompt", "completion", "label", "tools"],
            Self::Alpaca => &["instruction", "input", "output", "system", "history", "text"],
            Self::ShareGpt => &["conversations", "system", "tools"],
            Self::Text => &["text"],
            Self::Preferred => {
                &["input", "preferred_output", "non_preferred_output", "margin", "label"]
            }
            Self::Chosen => {
                &["prompt", "chosen", "rejected", "margin", "label", "tools", "messages"]
            }
            Self::Asked => return None,
        })
    }

    /// The name in error messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages => "`messages`",
            Self::Completion => "`prompt` and `completion`",
            Self::Alpaca => "`instruction` and `output`",
            Self::ShareGpt => "`conversations`",
            Self::Text => "`text`",
            Self::Preferred => "`preferred_output` and `non_preferred_output`",
            Self::Chosen => "`chosen` and `rejected`",
            Self::Asked => "prompts",
        }
    }
}

impl DatasetKind {
    fn known(self) -> &'static str {
        match self {
            Self::PromptCompletion => ANSWERS,
            Self::Preference => PREFERENCES,
            Self::PromptOnly => PROMPTS,
        }
    }
}

/// Parses a line of a file of this kind.
///
/// # Errors
/// What is wrong with the line.
pub fn parse(line: &str, dataset: DatasetKind) -> Result<(Format, Line), String> {
    let value: Value =
        serde_json::from_str(line).map_err(|error| format!("it is not JSON: {error}"))?;
    let Value::Object(whole) = value else { return Err("it is no JSON object".into()) };
    let line = without_nulls(whole.clone());
    let Some(format) = Format::of(&line, dataset) else {
        return Err(unrecognised(&line, dataset));
    };
    if format.dataset() != dataset {
        let (is, wanted) = match dataset {
            DatasetKind::PromptCompletion => {
                ("a pair of answers, for `dpo` and `reward`", "an example of one")
            }
            DatasetKind::Preference | DatasetKind::PromptOnly => ("one answer", "a pair of them"),
        };
        return Err(format!("it is {is}, where {wanted} is wanted: {}", dataset.known()));
    }
    if let Some(keys) = format.keys() {
        check_keys(&line, keys, METADATA)?;
    }
    let line = match format {
        Format::Messages => Line::One(Example::Chat(messages(&line)?)),
        Format::ShareGpt => Line::One(Example::Chat(share_gpt(&line)?)),
        Format::Alpaca => Line::One(Example::Chat(alpaca(&line)?)),
        Format::Completion => Line::One(completion(&line)?),
        Format::Text => Line::One(Example::Text(filled(&line, "text")?.into())),
        Format::Preferred => Line::Pair(Box::new(super::pairs::preferred(&line)?)),
        Format::Chosen => Line::Pair(Box::new(super::pairs::chosen(&line)?)),
        Format::Asked => Line::Prompt(Box::new(super::prompts::prompt(&line, whole)?)),
    };
    Ok((format, line))
}

fn unrecognised(line: &Map<String, Value>, dataset: DatasetKind) -> String {
    let name = |key: &String| match nearest(key, RECOGNISED).filter(|meant| key != meant) {
        Some(meant) => format!("`{key}`, did you mean `{meant}`?"),
        None => format!("`{key}`"),
    };
    let keys: Vec<_> = line.keys().map(name).take(8).collect();
    let found = if keys.is_empty() { "none".into() } else { keys.join(", ") };
    format!("its keys ({found}) are of no known format: {}", dataset.known())
}

fn filled<'a>(object: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    let text = text(object, key)?;
    if text.is_empty() { Err(format!("`{key}` is empty")) } else { Ok(text) }
}

fn messages(line: &Map<String, Value>) -> Result<Chat, String> {
    let Some(Value::Array(list)) = line.get("messages") else {
        return Err("`messages` is no list".into());
    };
    let turns = turns(list, "messages")?;
    if line.contains_key("prompt") {
        let repeated = with_prompt(&asked(line, "prompt")?, &turns);
        if repeated.is_none() {
            return Err(
                "`prompt` stands beside `messages` and is not their beginning: remove it, \
                        or make it the first message"
                    .into(),
            );
        }
    }
    if !turns.iter().any(|turn| turn.trained) {
        return Err("no message of the assistant is trained".into());
    }
    Ok(chat(turns, tools(line)?))
}

/// A line with texts, or with messages in TRL's format.
fn completion(line: &Map<String, Value>) -> Result<Example, String> {
    match line.get("label") {
        None | Some(Value::Bool(true)) => {}
        Some(Value::Bool(false)) => {
            return Err("`label` is false: `sft` would train a completion that is not wanted; \
                        remove the line, or train pairs of answers with `dpo`"
                .into());
        }
        Some(_) => return Err("`label` is neither true nor false".into()),
    }
    let is_text = |key: &str| line.get(key).is_some_and(Value::is_string);
    if is_text("prompt") && is_text("completion") {
        if line.contains_key("tools") {
            return Err("`tools` need messages: `prompt` and `completion` are texts".into());
        }
        return Ok(Example::Completion {
            prompt: text(line, "prompt")?.into(),
            completion: filled(line, "completion")?.into(),
        });
    }
    let (asked, answer) = (asked(line, "prompt")?, answer(line, "completion")?);
    let turns = match with_prompt(&asked, &answer) {
        Some((mut whole, prompt)) => {
            whole[..prompt].iter_mut().for_each(|turn| turn.trained = false);
            whole
        }
        None => asked.into_iter().chain(answer).collect(),
    };
    if !turns.iter().any(|turn| turn.trained) {
        return Err("`completion` has no message of the assistant that is trained".into());
    }
    Ok(Example::Chat(chat(turns, tools(line)?)))
}

/// The text of an optional key; empty if it is missing.
fn optional<'a>(line: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    line.get(key).map_or(Ok(""), |_| text(line, key))
}

fn alpaca(line: &Map<String, Value>) -> Result<Chat, String> {
    let (instruction, output) = (filled(line, "instruction")?, filled(line, "output")?);
    let question = match optional(line, "input")? {
        "" => instruction.to_owned(),
        input => format!("{instruction}\n\n{input}"),
    };
    // Stanford's Alpaca file also contains the whole example as `text`.
    let repeated = optional(line, "text")?;
    let repeats = repeated.contains(instruction) && repeated.contains(output);
    if !repeated.is_empty() && !repeats {
        return Err("`text` stands beside `output` and does not repeat it: remove one".into());
    }
    let mut turns = Vec::new();
    match optional(line, "system")? {
        "" => {}
        system => turns.push(Turn::new("system", system)),
    }
    let rounds = match line.get("history") {
        None => &[][..],
        Some(Value::Array(rounds)) => rounds,
        Some(_) => return Err("`history` is no list of pairs [question, answer]".into()),
    };
    for (number, round) in rounds.iter().enumerate() {
        let texts = round.as_array().map(|pair| pair.iter().map(Value::as_str).collect::<Vec<_>>());
        let Some([Some(asked), Some(answered)]) = texts.as_deref() else {
            return Err(format!("history[{number}] is no pair of texts [question, answer]"));
        };
        turns.extend([Turn::new("user", asked), Turn::new("assistant", answered)]);
    }
    turns.extend([Turn::new("user", &question), Turn::new("assistant", output)]);
    Ok(chat(turns, None))
}

fn share_gpt(line: &Map<String, Value>) -> Result<Chat, String> {
    let Some(Value::Array(list)) = line.get("conversations") else {
        return Err("`conversations` is no list".into());
    };
    let mut turns = Vec::new();
    for (number, turn) in list.iter().enumerate() {
        let turn = share_gpt_turn(turn);
        turns.push(turn.map_err(|what| format!("conversations[{number}]: {what}"))?);
    }
    if !turns.iter().any(|turn| turn.role() == "assistant") {
        return Err("nothing is from the assistant (`gpt`)".into());
    }
    if !turns.iter().any(|turn| turn.trained) {
        return Err("no message of the assistant is trained".into());
    }
    let system = optional(line, "system")?;
    if !system.is_empty() {
        let system = Turn::new("system", system);
        match turns.first().filter(|first| first.role() == "system") {
            Some(first) if *first == system => {}
            Some(_) => {
                return Err("`system` differs from the system message in `conversations`: remove \
                            one"
                .into());
            }
            None => turns.insert(0, system),
        }
    }
    Ok(chat(turns, tools(line)?))
}

fn share_gpt_turn(turn: &Value) -> Result<Turn, String> {
    let Value::Object(turn) = turn else { return Err("it is no object".into()) };
    let turn = without_nulls(turn.clone());
    check_keys(&turn, &["from", "value", "weight"], &["id"])?;
    let role = match text(&turn, "from")? {
        "human" | "user" => "user",
        "gpt" | "assistant" | "chatgpt" | "bing" | "bard" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        other => return Err(format!("`from` is `{other}`, which is unknown")),
    };
    let trained = weighted(turn.get("weight"), role == "assistant")?;
    Ok(Turn { trained, ..Turn::new(role, text(&turn, "value")?) })
}
