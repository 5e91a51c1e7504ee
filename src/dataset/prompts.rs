//! Lines with prompts for which reinforcement learning samples and grades completions.

use super::format::Chat;
use super::messages::{asked, tools};
use serde_json::{Map, Value, json};

/// A prompt, and the data that a grader may use.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// The messages of the prompt; the assistant's turn comes next.
    pub chat: Chat,
    /// The whole line, for `{{item.…}}` in grader templates.
    pub item: Map<String, Value>,
}

/// `{"messages": [… ends with a user message], "tools"?, …}` (OpenAI), or `{"prompt", …}` with a
/// text or messages. `item` is the line including keys whose value is null.
pub(super) fn prompt(
    line: &Map<String, Value>,
    mut item: Map<String, Value>,
) -> Result<Prompt, String> {
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
    // Graders that show a conversation expect it under this key.
    item.insert("messages".into(), json!(chat.messages));
    Ok(Prompt { chat, item })
}
