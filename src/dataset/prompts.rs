//! Lines that ask for an answer: what reinforcement learning samples and grades.

use super::format::Chat;
use super::messages::{asked, tools};
use serde_json::{Map, Value, json};

/// A prompt, and what a grader may want to know of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Ends where the assistant's turn begins.
    pub chat: Chat,
    /// The whole line: `{{item.…}}` of graders.
    pub item: Map<String, Value>,
}

/// `{"messages": [… ends with the user's], "tools"?, …}` (OpenAI), or `{"prompt", …}` with a text or
/// messages. `item` is the line with its nulls.
pub fn prompt(line: &Map<String, Value>, mut item: Map<String, Value>) -> Result<Prompt, String> {
    let key = if line.contains_key("messages") { "messages" } else { "prompt" };
    if key == "messages" && !line["messages"].is_array() {
        return Err("`messages` is no list".into());
    }
    let turns = asked(line, key)?;
    match turns.last().map(|last| last.role()) {
        None => return Err(format!("`{key}` is empty")),
        Some(role @ ("assistant" | "system")) => {
            return Err(format!(
                "{key}[{}]: the last message is the {role}'s: an answer is sampled to the user's",
                turns.len() - 1,
            ));
        }
        Some(_) => {}
    }
    let chat = super::messages::chat(turns, tools(line)?);
    // As graders that show a conversation take it.
    item.insert("messages".into(), json!(chat.messages));
    Ok(Prompt { chat, item })
}
