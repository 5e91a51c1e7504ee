//! Lines that ask for an answer: what reinforcement learning samples and grades.

use super::format::{Chat, text, tools, turns};
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
/// messages.
pub(super) fn prompt(line: &Map<String, Value>) -> Result<Prompt, String> {
    let (list, key) = match (line.get("messages"), line.get("prompt")) {
        (Some(Value::Array(list)), _) => (list.clone(), "messages"),
        (Some(_), _) => return Err("`messages` is no list".into()),
        (None, Some(Value::Array(list))) => (list.clone(), "prompt"),
        (None, _) => {
            let prompt = text(line, "prompt")?;
            (vec![json!({"role": "user", "content": prompt})], "prompt")
        }
    };
    let (messages, _) = turns(&list, key)?;
    match messages.last().map(|last| &last["role"]) {
        None => return Err(format!("`{key}` is empty")),
        Some(role) if role == "assistant" || role == "system" => {
            return Err(format!(
                "{key}[{}]: the last message is the {}'s: an answer is sampled to the user's",
                messages.len() - 1,
                role.as_str().unwrap_or_default()
            ));
        }
        Some(_) => {}
    }
    let trained = vec![false; messages.len()];
    let mut item = line.clone();
    // As graders that show a conversation take it.
    item.insert("messages".into(), json!(messages));
    Ok(Prompt { chat: Chat { messages, trained, tools: tools(line)? }, item })
}
