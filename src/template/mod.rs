//! Chat templates, and the way back: from a model's text to messages and tool calls.
//!
//! * [`ChatTemplate`] renders a conversation to the prompt, as transformers' `apply_chat_template`
//!   does, with adaptations for templates that lack a system role or tools.
//! * [`ToolFamily`] knows how a model writes tool calls, and the grammar that makes it do so.
//! * [`OutputParser`] turns streamed text into reasoning, content and tool-call deltas.
//!
//! Templates come inside model files and are untrusted: source, work, output and nesting are
//! bounded. One hole is minijinja's: comparing or concatenating (`~`) values that share parts
//! exponentially is not metered.

mod adapt;
mod caps;
mod clock;
mod engine;
mod family;
mod grammar;
mod json_scan;
mod message;
mod methods;
mod parser;
mod python;
mod scan;

use crate::gguf::{SpecialToken, TokenizerFacts};
use minijinja::value::Value as Jinja;
use serde_json::{Map, Value};

pub use caps::Caps;
pub use family::ToolFamily;
pub use grammar::{GrammarError, ToolChoice, ToolGrammar, Trigger};
pub use message::{CallIds, Delta, ParsedCall, ParsedMessage, ReasoningFormat};
pub use parser::OutputParser;

/// The template of a model that brings none: ChatML.
pub const CHATML: &str = "{%- for message in messages -%}\
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' -}}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Why there is no prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template itself refused the conversation (`raise_exception`): a 400 with its message.
    #[error("{0}")]
    Refused(String),
    /// The template does not compile, or is too large.
    #[error("the chat template is invalid: {0}")]
    Invalid(String),
    /// The template broke on this conversation (an undefined value, a wrong type): also a 400.
    #[error("the chat template cannot render this conversation: {0}")]
    Failed(String),
    /// The template used up its work, nesting or output limit.
    #[error("the chat template exceeded a limit: {0}")]
    Exhausted(String),
}

/// What a prompt is rendered from. Messages are validated before.
#[derive(Clone, Debug, Default)]
pub struct RenderInput {
    /// Objects with `role`, and `content` (string, null, or a list of text parts), `tool_calls`,
    /// `tool_call_id`, `name`, `reasoning_content`.
    pub messages: Vec<Value>,
    /// OpenAI tool definitions: `{"type": "function", "function": {…}}`.
    pub tools: Option<Vec<Value>>,
    /// Ends the prompt where the assistant's turn begins.
    pub add_generation_prompt: bool,
    /// Ends the prompt inside the last message, for the model to go on with it.
    pub continue_final_message: bool,
    /// Further variables of the template, such as `enable_thinking`. They do not replace ours.
    pub chat_template_kwargs: Map<String, Value>,
    /// The clock of `strftime_now`, in seconds since 1970 (UTC); `None` reads the system's.
    pub now: Option<i64>,
}

/// A model's compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    engine: engine::Engine,
    has_tool_use: bool,
    bos: String,
    eos: String,
    caps: Caps,
    /// The family of the template's own tool calls.
    family: Option<ToolFamily>,
    reasoning: Option<(&'static str, &'static str)>,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// The template that a model's file brings, or [`CHATML`].
    ///
    /// # Errors
    /// As [`ChatTemplate::compile`].
    pub fn of(facts: &TokenizerFacts) -> Result<ChatTemplate, TemplateError> {
        let text = |token: &Option<SpecialToken>| {
            token.as_ref().map_or_else(String::new, |token| token.text.clone())
        };
        let tool_use = facts.named_templates.iter().find(|(name, _)| name == "tool_use");
        Self::compile(
            facts.chat_template.as_deref().unwrap_or_default(),
            tool_use.map(|(_, source)| source.as_str()),
            &text(&facts.bos),
            &text(&facts.eos),
        )
    }

    /// Compiles a template, and the one a model may carry for conversations with tools; an empty
    /// `source` means [`CHATML`]. `bos` and `eos` are the texts of the special tokens.
    ///
    /// # Errors
    /// [`TemplateError::Invalid`] if a source does not parse or is larger than 1 MiB.
    pub fn compile(
        source: &str,
        tool_use: Option<&str>,
        bos: &str,
        eos: &str,
    ) -> Result<ChatTemplate, TemplateError> {
        let source = if source.trim().is_empty() { CHATML } else { source };
        let mut sources = vec![(DEFAULT, source)];
        sources.extend(tool_use.map(|source| (TOOL_USE, source)));
        let mut template = ChatTemplate {
            engine: engine::Engine::compile(&sources)?,
            has_tool_use: tool_use.is_some(),
            bos: bos.to_owned(),
            eos: eos.to_owned(),
            caps: Caps::default(),
            family: None,
            reasoning: caps::reasoning_markers(source),
        };
        template.caps = caps::probe(&template, source);
        if template.caps.tools {
            template.family = ToolFamily::detect(tool_use.unwrap_or(source));
        }
        Ok(template)
    }

    /// What the template can do by itself.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// How the model writes tool calls when [`render`](Self::render) offers it tools.
    pub fn family(&self) -> ToolFamily {
        self.family.unwrap_or(ToolFamily::Hermes)
    }

    /// Whether tools are offered in the template's own words. Otherwise (it ignores them, or asks
    /// for calls in a form that [`OutputParser`] cannot read) they are offered by an instruction
    /// in the system prompt, in Hermes' form.
    pub fn native_tools(&self) -> bool {
        self.family.is_some()
    }

    /// The markers around reasoning in the output that follows `prompt`, if the model reasons.
    ///
    /// `starts_open` says that the prompt itself ends inside an open block (`…<think>\n`).
    pub fn reasoning(&self, prompt: &str) -> Option<ReasoningFormat> {
        let (open, close) = self.reasoning?;
        let starts_open = prompt.trim_end().ends_with(open);
        Some(ReasoningFormat { open: open.to_owned(), close: close.to_owned(), starts_open })
    }

    /// Renders the prompt, adapting the conversation to what the template can express: a missing
    /// system role, ignored tools, tool-call arguments as text, typed or non-null content.
    ///
    /// Where the template needs none of these this equals [`render_exact`](Self::render_exact).
    ///
    /// # Errors
    /// See [`TemplateError`]; a `Refused` is the template's own message.
    pub fn render(&self, input: &RenderInput) -> Result<String, TemplateError> {
        let adapted = adapt::adapt(&self.caps, self.native_tools(), input);
        let result = self.render_raw(&adapted);
        match &result {
            // Templates that concatenate content break on the null beside tool calls, which
            // OpenAI's clients send and vLLM passes as an empty string.
            Err(TemplateError::Failed(_)) => match adapt::without_nulls(&adapted) {
                Some(adapted) => self.render_raw(&adapted).or(result),
                None => result,
            },
            _ => result,
        }
    }

    /// Renders exactly as transformers would, with tool-call arguments parsed into objects.
    ///
    /// # Errors
    /// See [`TemplateError`].
    pub fn render_exact(&self, input: &RenderInput) -> Result<String, TemplateError> {
        self.render_raw(&adapt::plain(input))
    }

    fn render_raw(&self, input: &RenderInput) -> Result<String, TemplateError> {
        let with_tools = input.tools.as_ref().is_some_and(|tools| !tools.is_empty());
        let name = if with_tools && self.has_tool_use { TOOL_USE } else { DEFAULT };
        let bytes = input.messages.iter().map(text_bytes).sum::<usize>()
            + input.tools.iter().flatten().map(text_bytes).sum::<usize>();
        let prompt = self.engine.render(name, bytes, || self.context(input))?;
        if input.continue_final_message { cut_after_final(prompt, input) } else { Ok(prompt) }
    }

    fn context(&self, input: &RenderInput) -> Jinja {
        let now = input.now.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(0, |now| now.as_secs() as i64)
        });
        let list = |items: &[Value]| items.iter().map(python::from_json).collect::<Jinja>();
        let generate = input.add_generation_prompt && !input.continue_final_message;
        let ours = [
            ("messages", list(&input.messages)),
            ("tools", input.tools.as_deref().map_or(Jinja::from(()), list)),
            ("documents", Jinja::from(())),
            ("add_generation_prompt", Jinja::from(generate)),
            ("bos_token", Jinja::from(self.bos.as_str())),
            ("eos_token", Jinja::from(self.eos.as_str())),
        ];
        let reserved =
            |name: &str| name != "documents" && ours.iter().any(|(our_name, _)| *our_name == name);
        let theirs = input
            .chat_template_kwargs
            .iter()
            .filter(|(name, _)| !reserved(name))
            .map(|(name, value)| (name.clone(), python::from_json(value)));
        let now = (engine::NOW.to_owned(), Jinja::from(now));
        let ours = ours.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        Jinja::from_pairs(ours.chain(theirs).chain([now]))
    }
}

/// The bytes of text in a value, to scale the work a render may do.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(|item| text_bytes(item) + 8).sum(),
        Value::Object(map) => map.iter().map(|(key, item)| key.len() + text_bytes(item) + 8).sum(),
        _ => 8,
    }
}

/// Cuts the prompt after the last message's text, as transformers' `continue_final_message`.
fn cut_after_final(mut prompt: String, input: &RenderInput) -> Result<String, TemplateError> {
    let message = input.messages.last().map(|message| &message["content"]);
    let text = message.and_then(Value::as_str).unwrap_or_default();
    let Some(at) = prompt.rfind(text.trim()).filter(|_| !text.trim().is_empty()) else {
        return Err(TemplateError::Failed(
            "continue_final_message is set, but the final message does not appear in the prompt"
                .into(),
        ));
    };
    let kept = text.trim_start();
    let end = if prompt[at..].starts_with(kept) { kept.len() } else { text.trim().len() };
    prompt.truncate(at + end);
    Ok(prompt)
}

#[cfg(test)]
mod tests;
