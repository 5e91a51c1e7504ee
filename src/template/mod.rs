//! Chat templates and the parsing of model output into messages and tool calls.
//!
//! * [`ChatTemplate`] renders a conversation to the prompt, as transformers' `apply_chat_template`
//!   does, with adaptations for templates that lack a system role or tools.
//! * [`ToolFamily`] is a format of tool calls; it makes the grammar that constrains a model to it.
//! * [`OutputParser`] turns streamed text into reasoning, content and tool-call deltas.
//!
//! Templates come inside model files and are untrusted: source, work, output and nesting are
//! bounded. One gap remains in minijinja: comparing or concatenating (`~`) values that share parts
//! exponentially is not metered. exponentially is not metered.

mod adapt;
mod caps;
mod clock;
mod engine;
mod family;
mod grammar;
mod guard;
mod integers;
mod json_scan;
mod message;
mod methods;
mod parser;
mod python;
mod scan;
mod schema;

use crate::gguf::{SpecialToken, TokenizerFacts};
use guard::Marks;
use minijinja::value::Value as Jinja;
use serde_json::{Map, Value, json};

pub use caps::Caps;
pub use family::ToolFamily;
pub use grammar::{GrammarError, ToolChoice, ToolGrammar, Trigger};
pub use guard::{ControlTokens, RenderedPrompt};
pub use message::{CallIds, Delta, ParsedCall, ParsedMessage, ReasoningFormat};
pub use parser::OutputParser;
pub use schema::close_objects;

/// ChatML, the template of a model without one.
pub const CHATML: &str = "{%- for message in messages -%}\
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') + '<|im_end|>\\n' -}}\
{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}";

/// Reason why no prompt could be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template itself refused the conversation (`raise_exception`): a 400 with its message.
    #[error("{0}")]
    Refused(String),
    /// The template does not compile, or is too large.
    #[error("the chat template is invalid: {0}")]
    Invalid(String),
    /// Rendering this conversation failed (an undefined value, a wrong type): also a 400.
    #[error("the chat template cannot render this conversation: {0}")]
    Failed(String),
    /// The template leaves out a text of a message.
    #[error(
        "messages[{index}]: the model's chat template leaves out a text of this {role} message; \
         move the text into a message that the template renders"
    )]
    Dropped { index: usize, role: String },
    /// The template used up its work, nesting or output limit.
    #[error("the chat template exceeded a limit: {0}")]
    Exhausted(String),
}

/// Input of a prompt. Messages must be validated before.
#[derive(Clone, Debug, Default)]
pub struct RenderInput {
    /// Objects with `role`, and `content` (string, null, or a list of text parts), `tool_calls`,
    /// `tool_call_id`, `name`, `reasoning_content`.
    pub messages: Vec<Value>,
    /// OpenAI tool definitions: `{"type": "function", "function": {…}}`.
    pub tools: Option<Vec<Value>>,
    /// End the prompt at the start of the assistant's turn.
    pub add_generation_prompt: bool,
    /// End the prompt inside the last message, so that the model continues it.
    pub continue_final_message: bool,
    /// Further variables of the template, such as `enable_thinking`. They do not replace the
    /// variables that this module sets.
    pub chat_template_kwargs: Map<String, Value>,
    /// Time of `strftime_now`, in seconds since 1970 (UTC); `None` reads the system clock.
    pub now: Option<i64>,
}

/// A date as `2026-01-31`, from seconds since 1970 (UTC).
pub fn date(now: i64) -> String {
    clock::strftime("%Y-%m-%d", now)
}

impl RenderInput {
    fn clock(&self) -> i64 {
        self.now.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(0, |now| now.as_secs() as i64)
        })
    }
}

/// A model's compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    engine: engine::Engine,
    has_tool_use: bool,
    bos: String,
    eos: String,
    caps: Caps,
    /// The family of the template's own tool calls, if it is supported.
    family: Option<ToolFamily>,
    reasoning: Option<(&'static str, &'static str)>,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

impl ChatTemplate {
    /// The template in a model's file, or [`CHATML`].
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

    /// Compiles a template, and the separate template that a model may have for conversations with
    /// tools. An empty `source` means [`CHATML`]. `bos` and `eos` are the texts of the special
    /// tokens.
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

    /// Features that the template itself supports.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Format of the model's tool calls when [`render`](Self::render) offers it tools.
    pub fn family(&self) -> ToolFamily {
        self.family.unwrap_or(ToolFamily::Hermes)
    }

    /// Whether the template itself offers the tools. Otherwise (the template ignores tools, or asks
    /// for calls in a format that [`OutputParser`] cannot read) an instruction in the system prompt
    /// offers them, in the Hermes format.
    pub fn native_tools(&self) -> bool {
        self.family.is_some()
    }

    /// Whether prompts depend on the date.
    pub fn writes_date(&self) -> bool {
        let on = |now| {
            let messages = vec![json!({"role": "user", "content": "Hi."})];
            let input = RenderInput { messages, now: Some(now), ..RenderInput::default() };
            self.render_adapted(&input).ok()
        };
        // A date that differs in day, month, year and day of the week.
        on(0) != on(86_400 * 400)
    }

    /// The markers around reasoning in the output that follows `prompt`, if the model reasons.
    ///
    /// `starts_open` says that the prompt itself ends inside an open block (`…<think>\n`).
    pub fn reasoning(&self, prompt: &str) -> Option<ReasoningFormat> {
        let (open, close) = self.reasoning?;
        let starts_open = prompt.trim_end().ends_with(open);
        Some(ReasoningFormat { open: open.to_owned(), close: close.to_owned(), starts_open })
    }

    /// Renders the prompt and adapts the conversation to the features of the template: a missing
    /// system role, ignored tools, tools without a description, tool-call arguments as text, typed
    /// or non-null content, content beside tool calls. Variables that llama-server defines have its
    /// values, unless the request sets others.
    ///
    /// If the template needs no adaptation, the result equals [`render_exact`](Self::render_exact).
    ///
    /// # Errors
    /// See [`TemplateError`]; a `Refused` is the template's own message. [`TemplateError::Dropped`]
    /// names a message whose text the template leaves out, at least in part; reasoning and the
    /// texts of tools may be left out.
    pub fn render(&self, input: &RenderInput) -> Result<String, TemplateError> {
        self.render_guarded(input, None).map(|prompt| prompt.text)
    }

    /// As [`render`](Self::render), with barriers in the prompt where texts of users and tools
    /// spell control tokens, so that these are tokenized as text.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_guarded(
        &self,
        input: &RenderInput,
        tokens: Option<&ControlTokens>,
    ) -> Result<RenderedPrompt, TemplateError> {
        let marks = Marks::new(input);
        let split;
        let input = match self.dropped(input, &marks) {
            None => input,
            Some(index) => {
                split = adapt::content_apart(input);
                match split.as_ref().filter(|split| self.dropped(split, &marks).is_none()) {
                    Some(split) => split,
                    None => {
                        let role = input.messages[index]["role"].as_str().unwrap_or_default();
                        return Err(TemplateError::Dropped { index, role: role.to_owned() });
                    }
                }
            }
        };
        let mut marked = input.clone();
        if let Some(tokens) = tokens {
            marks.guard(&mut marked, tokens);
        }
        if input.continue_final_message {
            marks.mark_end(&mut marked)?;
        }
        let mut prompt = self.render_adapted(&marked)?;
        if input.continue_final_message {
            prompt = marks.cut_at_end(prompt)?;
        }
        Ok(marks.take_barriers(&prompt))
    }

    /// The first message with a text that is missing in the prompt.
    fn dropped(&self, input: &RenderInput, marks: &Marks) -> Option<usize> {
        // A template may look up called functions by their names. An error of the template itself
        // is reported when the unmarked conversation is rendered.
        [true, false].into_iter().find_map(|names| {
            let mut marked = input.clone();
            let wanted = marks.mark_messages(&mut marked, names);
            let prompt = self.render_adapted(&marked).ok()?;
            Some(marks.missing(&prompt, &wanted))
        })?
    }

    fn render_adapted(&self, input: &RenderInput) -> Result<String, TemplateError> {
        let mut adapted = adapt::adapt(&self.caps, self.native_tools(), input);
        self.add_variables(&mut adapted);
        let result = self.render_raw(&adapted);
        match &result {
            // Templates that concatenate content fail on the null content beside tool calls, which
            // OpenAI's clients send and vLLM passes as an empty string.
            Err(TemplateError::Failed(_)) => match adapt::without_nulls(&adapted) {
                Some(adapted) => self.render_raw(&adapted).or(result),
                None => result,
            },
            _ => result,
        }
    }

    /// Renders exactly as transformers does, with tool-call arguments parsed into objects.
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
        self.engine.render(name, bytes, || self.context(input))
    }

    /// Sets variables that llama-server and transformers define, unless the request sets them:
    /// thinking is on, and templates that ask for the date or for functions as text get them.
    pub(super) fn add_variables(&self, input: &mut RenderInput) {
        let now = input.clock();
        let tools = input.tools.as_ref().filter(|tools| !tools.is_empty());
        let functions = tools.and_then(|tools| serde_json::to_string_pretty(tools).ok());
        for (name, value) in [
            ("enable_thinking", json!(true)),
            ("date_string", json!(clock::strftime("%d %b %Y", now))),
            ("datetime", json!(clock::strftime("%b %d %Y", now))),
            ("functions", json!(functions.unwrap_or_default())),
        ] {
            input.chat_template_kwargs.entry(name).or_insert(value);
        }
    }

    fn context(&self, input: &RenderInput) -> Jinja {
        let now = input.clock();
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

/// Bytes of text in a value, by which the work limit of a render is scaled.
fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(|item| text_bytes(item) + 8).sum(),
        Value::Object(map) => map.iter().map(|(key, item)| key.len() + text_bytes(item) + 8).sum(),
        _ => 8,
    }
}

#[cfg(test)]
mod tests;
