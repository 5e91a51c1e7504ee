//! Marks in the texts of a conversation: inserted before rendering, searched for afterwards.
//!
//! A mark is a word that occurs nowhere in the conversation. Marks have three uses:
//!
//! * `continue_final_message` cuts the prompt after the final message's text, wherever the template
//!   puts that text and whatever it contains.
//! * A control token that is spelled inside a user's or a tool's text, a name, a call or the
//!   definition of a tool is broken by a mark. The mark becomes a *barrier*: the tokenizer
//!   recognizes no control token that spans a barrier, so that the author of a text cannot forge
//!   turns.
//! * A text that the template leaves out is detected: the mark at its end is missing in the prompt.

use super::{RenderInput, TemplateError};
use aho_corasick::AhoCorasick;
use serde_json::{Value, json};

/// The texts of a vocabulary's control tokens.
#[derive(Clone, Debug)]
pub struct ControlTokens(Option<AhoCorasick>);

impl ControlTokens {
    /// Texts of a single character cannot be broken by a mark and are ignored.
    pub fn new<'t>(texts: impl IntoIterator<Item = &'t str>) -> Self {
        let texts = texts.into_iter().filter(|text| text.chars().nth(1).is_some());
        Self(AhoCorasick::new(texts).ok().filter(|finder| finder.patterns_len() > 0))
    }

    /// Byte offsets after the first character of every control token that is spelled in `text`.
    fn breaks(&self, text: &str) -> Vec<usize> {
        let found = self.0.iter().flat_map(|finder| finder.find_overlapping_iter(text));
        let behind_first = |start: usize| {
            let first = text[start..].chars().next().map_or(1, char::len_utf8);
            start + first
        };
        let mut breaks: Vec<usize> = found.map(|found| behind_first(found.start())).collect();
        breaks.sort_unstable();
        breaks.dedup();
        breaks
    }
}

/// A rendered prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RenderedPrompt {
    pub text: String,
    /// Ascending byte offsets in `text` that no control token may span.
    pub barriers: Vec<usize>,
}

/// The marks of one conversation.
pub(super) struct Marks {
    word: String,
}

impl Marks {
    /// Chooses a word that does not occur in the conversation, its tools or variables.
    pub(super) fn new(input: &RenderInput) -> Self {
        let occurs = |word: &str| {
            let texts = input.messages.iter().chain(input.tools.iter().flatten());
            let mut texts = texts.chain(input.chat_template_kwargs.values());
            texts.any(|value| contains(value, word))
        };
        let word = (0u64..).map(|n| format!("imark{n}q")).find(|word| !occurs(word));
        Self { word: word.expect("a conversation has finitely many words") }
    }

    fn barrier(&self) -> String {
        format!("{}b", self.word)
    }

    fn end(&self) -> String {
        format!("{}e", self.word)
    }

    fn message(&self, index: usize) -> String {
        format!("{}m{index}x", self.word)
    }

    /// Breaks every control token that is spelled in a user's or a tool's text, also across the
    /// parts of a text; in names of participants; in calls, whose arguments repeat text of users;
    /// and in definitions of tools, which come from other servers.
    pub(super) fn guard(&self, input: &mut RenderInput, tokens: &ControlTokens) {
        let barrier = self.barrier();
        for tool in input.tools.iter_mut().flatten() {
            break_all(tool, tokens, &barrier);
        }
        for message in &mut input.messages {
            for key in ["name", "tool_calls"] {
                if let Some(value) = message.get_mut(key) {
                    break_all(value, tokens, &barrier);
                }
            }
            if !matches!(message["role"].as_str(), Some("user" | "tool")) {
                continue;
            }
            let mut texts = texts_mut(&mut message["content"]);
            let whole: String = texts.iter().map(|text| text.as_str()).collect();
            let mut breaks = tokens.breaks(&whole);
            if breaks.is_empty() {
                continue;
            }
            let mut end = whole.len();
            for text in texts.iter_mut().rev() {
                let start = end - text.len();
                // A break at the boundary of two parts is placed at the end of the first.
                while let Some(at) = breaks.pop_if(|at| *at > start) {
                    text.insert_str(at - start, &barrier);
                }
                end = start;
            }
        }
    }

    /// Marks the end of the final message's text.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] if the final message cannot be continued.
    pub(super) fn mark_end(&self, input: &mut RenderInput) -> Result<(), TemplateError> {
        let refuse = |why: &str| {
            Err(TemplateError::Refused(format!("continue_final_message is set, but {why}")))
        };
        let Some(message) = input.messages.last_mut() else {
            return refuse("there is no message");
        };
        if message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty()) {
            return refuse("the final message has tool calls, which end a turn");
        }
        if message["content"].is_null() {
            message["content"] = json!("");
        }
        match texts_mut(&mut message["content"]).pop() {
            Some(text) => text.push_str(&self.end()),
            None => return refuse("the final message has no text"),
        }
        Ok(())
    }

    /// Marks every text and, with `names`, the names of called functions. Returns the number of
    /// marks per message that the prompt should contain.
    pub(super) fn mark_messages(&self, input: &mut RenderInput, names: bool) -> Vec<usize> {
        let mark = |(index, message): (usize, &mut Value)| {
            let mark = self.message(index);
            let mut marked = 0;
            for text in texts_mut(&mut message["content"]) {
                if !text.trim().is_empty() {
                    text.push_str(&mark);
                    marked += 1;
                }
            }
            let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
            for call in calls.into_iter().flatten().filter(|_| names) {
                if let Value::String(name) = &mut call["function"]["name"] {
                    name.push_str(&mark);
                    marked += 1;
                }
            }
            marked
        };
        input.messages.iter_mut().enumerate().map(mark).collect()
    }

    /// The first message with fewer marks in the prompt than expected.
    pub(super) fn missing(&self, prompt: &str, wanted: &[usize]) -> Option<usize> {
        let mut found = vec![0; wanted.len()];
        for behind in prompt.split(&format!("{}m", self.word)).skip(1) {
            let index = behind.split('x').next().and_then(|digits| digits.parse::<usize>().ok());
            if let Some(found) = index.and_then(|index| found.get_mut(index)) {
                *found += 1;
            }
        }
        found.iter().zip(wanted).position(|(found, wanted)| found < wanted)
    }

    /// Cuts a prompt after the final message's text.
    ///
    /// # Errors
    /// [`TemplateError::Failed`] if the template left out that text.
    pub(super) fn cut_at_end(&self, mut prompt: String) -> Result<String, TemplateError> {
        match prompt.rfind(&self.end()) {
            Some(at) => {
                prompt.truncate(at);
                Ok(prompt)
            }
            None => Err(TemplateError::Failed(
                "continue_final_message is set, but the template leaves the final message out"
                    .into(),
            )),
        }
    }

    /// Removes the marks of broken control tokens from a prompt and returns their positions.
    pub(super) fn take_barriers(&self, prompt: &str) -> RenderedPrompt {
        let mut rendered = RenderedPrompt::default();
        for (number, text) in prompt.split(&self.barrier()).enumerate() {
            if number > 0 {
                rendered.barriers.push(rendered.text.len());
            }
            rendered.text.push_str(text);
        }
        rendered.barriers.dedup();
        rendered
    }
}

/// Breaks the control tokens in all keys and texts of a value.
fn break_all(value: &mut Value, tokens: &ControlTokens, barrier: &str) {
    let broken = |text: &mut String| {
        for at in tokens.breaks(text).into_iter().rev() {
            text.insert_str(at, barrier);
        }
    };
    match value {
        Value::String(text) => broken(text),
        Value::Array(items) => {
            items.iter_mut().for_each(|item| break_all(item, tokens, barrier));
        }
        Value::Object(map) => {
            *map = std::mem::take(map)
                .into_iter()
                .map(|(mut key, mut item)| {
                    broken(&mut key);
                    break_all(&mut item, tokens, barrier);
                    (key, item)
                })
                .collect();
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The text of a message's content, or of its parts.
fn texts_mut(content: &mut Value) -> Vec<&mut String> {
    match content {
        Value::String(text) => vec![text],
        Value::Array(parts) => parts.iter_mut().filter_map(as_text).collect(),
        _ => Vec::new(),
    }
}

fn as_text(part: &mut Value) -> Option<&mut String> {
    match part {
        Value::String(text) => Some(text),
        Value::Object(part) => match part.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        },
        _ => None,
    }
}

fn contains(value: &Value, word: &str) -> bool {
    match value {
        Value::String(text) => text.contains(word),
        Value::Array(items) => items.iter().any(|item| contains(item, word)),
        Value::Object(map) => {
            map.iter().any(|(key, item)| key.contains(word) || contains(item, word))
        }
        _ => false,
    }
}
