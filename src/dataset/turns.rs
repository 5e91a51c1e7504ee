//! Renders examples as text, with the parts that are trained.
//!
//! A chat template does not mark who wrote which part of its output. So a conversation is rendered
//! turn by turn: the text after the template's prompt for a completion is the completion. The
//! template does not need `{% generation %}` marks.
//!
//! Each completion is trained after the prompt that a served model would receive. Templates of
//! reasoning models render a completion differently once another user message follows (without its
//! reasoning block), so a later prompt does not contain the text that was trained before. Such a
//! conversation becomes several sequences: a completion is appended to the sequence that its prompt
//! continues, or starts a new sequence.

use super::format::{Chat, Example};
use crate::template::{ChatTemplate, ControlTokens, ReasoningFormat, RenderInput, RenderedPrompt};
use serde_json::Value;

/// A piece of text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    /// Ascending byte offsets that no control token spans (see [`RenderedPrompt`]).
    pub barriers: Vec<usize>,
    pub trained: bool,
}

/// How conversations of a model are rendered as text.
#[derive(Clone, Copy)]
pub struct Rendering<'a> {
    pub template: &'a ChatTemplate,
    /// Text of the BOS token.
    pub bos: Option<&'a str>,
    /// Control tokens that are treated as plain text where user and tool messages spell them out.
    pub control: Option<&'a ControlTokens>,
    /// The time that the template sees, in seconds since 1970; `None` reads the system clock.
    pub now: Option<i64>,
}

impl<'a> Rendering<'a> {
    /// Rendering with a template only.
    pub fn plain(template: &'a ChatTemplate) -> Self {
        Self { template, bos: None, control: None, now: Some(0) }
    }
}

/// An example, or a part of a conversation, as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    pub pieces: Vec<Piece>,
    /// The text begins a document: a BOS token is prepended if the vocabulary asks for one.
    pub add_special: bool,
    /// Special tokens spelled in the text are parsed.
    pub parse_special: bool,
    /// An end-of-text token is appended, and is trained.
    pub ends: bool,
}

/// Renders an example to one sequence.
///
/// # Errors
/// What the template cannot render, or a conversation that needs several sequences.
pub fn render(example: &Example, rendering: Rendering<'_>) -> Result<Rendered, String> {
    let mut sequences = render_all(example, rendering)?;
    match (sequences.pop(), sequences.len()) {
        (Some(rendered), 0) => Ok(rendered),
        _ => {
            Err("the chat template shows an answer otherwise when another message follows it, so \
                  that its answers are not one text: keep the last answer only as the answer, and \
                  the messages before it as the prompt"
                .into())
        }
    }
}

/// Renders an example to the sequences that train all its completions. There is one sequence,
/// unless the template renders earlier completions differently.
///
/// # Errors
/// What the template cannot render.
pub fn render_all(example: &Example, rendering: Rendering<'_>) -> Result<Vec<Rendered>, String> {
    let plain =
        |pieces| vec![Rendered { pieces, add_special: true, parse_special: false, ends: true }];
    let piece =
        |text: &str, trained| Piece { text: text.to_owned(), barriers: Vec::new(), trained };
    match example {
        Example::Text(text) => Ok(plain(vec![piece(text, true)])),
        Example::Completion { prompt, completion } => {
            Ok(plain(vec![piece(prompt, false), piece(completion, true)]))
        }
        Example::Chat(chat) => {
            let rendered = |pieces: Vec<Piece>| {
                let begins = |bos: &&str| {
                    !bos.is_empty()
                        && pieces.first().is_some_and(|first| first.text.starts_with(*bos))
                };
                let add_special = rendering.bos.filter(begins).is_none();
                Rendered { pieces, add_special, parse_special: true, ends: false }
            };
            Ok(turns(chat, rendering)?.into_iter().map(rendered).collect())
        }
    }
}

/// A conversation up to the beginning of the assistant's turn.
///
/// # Errors
/// What the template cannot render.
pub fn prompt(chat: &Chat, rendering: Rendering<'_>) -> Result<RenderedPrompt, String> {
    rendered(chat, &chat.messages, true, rendering)
}

fn rendered(
    chat: &Chat,
    messages: &[Value],
    add_generation_prompt: bool,
    rendering: Rendering<'_>,
) -> Result<RenderedPrompt, String> {
    let input = RenderInput {
        messages: messages.to_vec(),
        tools: chat.tools.clone(),
        add_generation_prompt,
        now: rendering.now,
        ..RenderInput::default()
    };
    let prompt = rendering.template.render_guarded(&input, rendering.control);
    prompt.map_err(|error| error.to_string())
}

/// The pieces of each sequence.
fn turns(chat: &Chat, rendering: Rendering<'_>) -> Result<Vec<Vec<Piece>>, String> {
    struct Sequence {
        pieces: Vec<Piece>,
        /// The text of all pieces so far.
        text: String,
    }
    let mut sequences: Vec<Sequence> = Vec::new();
    for (number, _) in chat.trained.iter().enumerate().filter(|(_, trained)| **trained) {
        let at = |what: String| format!("messages[{number}]: {what}");
        let message = &chat.messages[number];
        let RenderedPrompt { text: prompt, barriers } =
            rendered(chat, &chat.messages[..number], true, rendering)?;
        let whole = rendered(chat, &chat.messages[..=number], false, rendering)?.text;
        let format = rendering.template.reasoning(&prompt);
        let answer = answer(&prompt, &whole, message, format.as_ref()).ok_or_else(|| {
            at("the chat template renders this answer otherwise than it prompts for it: set its \
                `weight` to 0, or use another chat template"
                .into())
        })?;
        // Text after the end of the turn belongs to the template, not to the completion.
        let answer = answer.trim_end_matches(['\n', ' ']).to_owned();
        all_is_trained(message, &answer, format.as_ref()).map_err(at)?;
        let open = sequences.iter().rposition(|sequence| prompt.starts_with(&sequence.text));
        let at = open.unwrap_or_else(|| {
            sequences.push(Sequence { pieces: Vec::new(), text: String::new() });
            sequences.len() - 1
        });
        let sequence = &mut sequences[at];
        let done = sequence.text.len();
        let context = prompt[done..].to_owned();
        let barriers = barriers.into_iter().filter(|at| *at > done).map(|at| at - done).collect();
        sequence.text = prompt + &answer;
        sequence.pieces.push(Piece { text: context, barriers, trained: false });
        sequence.pieces.push(Piece { text: answer, barriers: Vec::new(), trained: true });
    }
    let pieces = sequences.into_iter().map(|mut sequence| {
        // The first piece marks the beginning of a text and is kept even if it is empty.
        let mut first = true;
        sequence.pieces.retain(|piece| std::mem::take(&mut first) || !piece.text.is_empty());
        sequence.pieces
    });
    Ok(pieces.collect())
}

/// The completion that the model should generate after `prompt`, where `whole` is the rendered
/// conversation including the completion. `None` if the two renderings contradict each other.
///
/// Prompts may end with a reasoning block, or with the beginning of one, that `whole` does not
/// have. An empty block belongs to the prompt, and the rest is the completion. A block that the
/// prompt leaves open must be closed by the completion.
fn answer(
    prompt: &str,
    whole: &str,
    message: &Value,
    format: Option<&ReasoningFormat>,
) -> Option<String> {
    if let Some(answer) = whole.strip_prefix(prompt) {
        return Some(answer.to_owned());
    }
    let ReasoningFormat { open, close, .. } = format?;
    let at = prompt.rfind(open.as_str())?;
    let answer = whole.strip_prefix(&prompt[..at])?;
    let block = prompt[at + open.len()..].trim();
    let (reasoning, rest) = match answer.trim_start().strip_prefix(open.as_str()) {
        Some(inside) => inside.split_once(close.as_str())?,
        None => ("", answer),
    };
    match (block, reasoning.trim()) {
        ("", reasoning) => {
            let reasoning = match reasoning {
                "" => given_reasoning(message, open, close),
                reasoning => reasoning,
            };
            let line = if prompt.ends_with('\n') { "" } else { "\n" };
            Some(format!("{line}{reasoning}\n{close}\n\n{}", rest.trim_start()))
        }
        (block, "") if block == close => Some(rest.trim_start().to_owned()),
        _ => None,
    }
}

/// The reasoning of a message: in its own key, or in a block at the beginning of the content.
fn given_reasoning<'m>(message: &'m Value, open: &str, close: &str) -> &'m str {
    let beside = message["reasoning_content"].as_str();
    let content = || {
        let (before, _) = message["content"].as_str()?.split_once(close)?;
        Some(before.trim_start().strip_prefix(open).unwrap_or(before))
    };
    beside.or_else(content).unwrap_or_default().trim()
}

/// Rejects a message if the template omits a part of it.
fn all_is_trained(
    message: &Value,
    answer: &str,
    format: Option<&ReasoningFormat>,
) -> Result<(), String> {
    let missing = |text: &str| !text.trim().is_empty() && !answer.contains(text.trim());
    if message["reasoning_content"].as_str().is_some_and(missing) {
        return Err("the chat template does not render `reasoning_content`, which would not be \
                    trained: remove it, or write it into `content` as the model should write it"
            .into());
    }
    let content = message["content"].as_str().unwrap_or_default();
    // Templates split reasoning blocks off the content, and put their own line breaks around them.
    let parts: Vec<&str> = match format {
        Some(ReasoningFormat { open, close, .. }) => {
            content.split(open.as_str()).flat_map(|part| part.split(close.as_str())).collect()
        }
        None => vec![content],
    };
    if let Some(part) = parts.into_iter().find(|part| missing(part)) {
        let part: String = part.trim().chars().take(40).collect();
        return Err(format!(
            "the chat template does not render all of `content`, which would not be trained (\
             {part:?} is missing): remove it, or use another chat template"
        ));
    }
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let mut names = calls.filter_map(|call| call["function"]["name"].as_str());
    match names.find(|name| missing(name)) {
        Some(name) => Err(format!(
            "the chat template does not render the call of `{name}`, which would not be trained: \
             remove it, or use another chat template"
        )),
        None => Ok(()),
    }
}
