//! Examples as text, and which parts of it are trained.
//!
//! A template says nothing of who wrote what, so a conversation is rendered turn by turn: what
//! follows the prompt that the template makes for an answer is the answer. Marks around it
//! (`{% generation %}`) need not be there.

use super::format::{Chat, Example};
use crate::template::{ChatTemplate, RenderInput};
use serde_json::Value;

/// A piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    pub trained: bool,
}

/// An example as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub pieces: Vec<Piece>,
    /// The text begins a document: a BOS token belongs in front where the vocabulary asks for one.
    pub add_special: bool,
    /// Special tokens are spelled in the text.
    pub parse_special: bool,
    /// An end-of-text token follows, and is trained.
    pub ends: bool,
}

/// Renders an example. `bos` is the text of the token that texts begin with.
///
/// # Errors
/// What the template does not render, in words.
pub fn render(
    example: &Example,
    template: &ChatTemplate,
    bos: Option<&str>,
) -> Result<Rendered, String> {
    let plain = |pieces| Rendered { pieces, add_special: true, parse_special: false, ends: true };
    let piece = |text: &str, trained| Piece { text: text.to_owned(), trained };
    match example {
        Example::Text(text) => Ok(plain(vec![piece(text, true)])),
        Example::Completion { prompt, completion } => {
            Ok(plain(vec![piece(prompt, false), piece(completion, true)]))
        }
        Example::Chat(chat) => {
            let pieces = turns(chat, template)?;
            let begins = |bos: &&str| !bos.is_empty() && pieces[0].text.starts_with(*bos);
            let add_special = bos.filter(begins).is_none();
            Ok(Rendered { pieces, add_special, parse_special: true, ends: false })
        }
    }
}

/// A conversation up to where the assistant's turn begins.
///
/// # Errors
/// What the template does not render, in words.
pub fn prompt(chat: &Chat, template: &ChatTemplate) -> Result<String, String> {
    let input = RenderInput {
        messages: chat.messages.clone(),
        tools: chat.tools.clone(),
        add_generation_prompt: true,
        now: Some(0),
        ..RenderInput::default()
    };
    template.render(&input).map_err(|error| error.to_string())
}

fn turns(chat: &Chat, template: &ChatTemplate) -> Result<Vec<Piece>, String> {
    // One clock for all renderings of a conversation.
    let now = Some(0);
    let rendered = |messages: &[Value], add_generation_prompt: bool| {
        let input = RenderInput {
            messages: messages.to_vec(),
            tools: chat.tools.clone(),
            add_generation_prompt,
            now,
            ..RenderInput::default()
        };
        template.render(&input).map_err(|error| error.to_string())
    };
    let whole = rendered(&chat.messages, false)?;
    let (mut pieces, mut done) = (Vec::new(), 0);
    for (number, _) in chat.trained.iter().enumerate().filter(|(_, trained)| **trained) {
        let prompt = rendered(&chat.messages[..number], true)?;
        // Later turns may hide what an answer once held (its reasoning): then all that comes before
        // them, and only that, is as the model would have seen it.
        let answered = match number + 1 == chat.messages.len() {
            true => whole.clone(),
            false => rendered(&chat.messages[..=number], false)?,
        };
        let fits =
            answered.starts_with(&prompt) && whole.starts_with(&answered) && prompt.len() >= done;
        if !fits {
            return Err(format!(
                "messages[{number}]: the chat template renders this answer otherwise than it prompts \
                 for it, or than it shows it later; train on the last answer only (`weight` 0 for the \
                 others)"
            ));
        }
        let trained = answered[prompt.len()..].trim_end_matches(['\n', ' ']);
        let end = prompt.len() + trained.len();
        pieces.push(Piece { text: whole[done..prompt.len()].to_owned(), trained: false });
        pieces.push(Piece { text: whole[prompt.len()..end].to_owned(), trained: true });
        done = end;
    }
    pieces.retain(|piece| !piece.text.is_empty());
    // What follows the last answer predicts nothing.
    Ok(pieces)
}
