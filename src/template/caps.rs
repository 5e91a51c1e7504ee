//! Features of a template, detected by rendering probes with marked words.

use serde_json::{Value, json};

use super::{ChatTemplate, RenderInput, TemplateError};

/// Features of a template. The default has every feature; the probes are rendered with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Definitions of tools appear in the prompt.
    pub tools: bool,
    /// Tool calls and tool results of earlier turns appear in the prompt.
    pub tool_calls: bool,
    /// Tool-call arguments must be JSON text; the template fails on an object.
    pub string_arguments: bool,
    /// Tool-call ids must be nine alphanumerics (Mistral).
    pub short_ids: bool,
    /// A system message appears in the prompt.
    pub system: bool,
    /// The template has a role `developer` of its own, which appears in the prompt; otherwise the
    /// role is rendered as `system`.
    pub developer: bool,
    /// Content must be a list of parts; a string does not appear.
    pub typed_content: bool,
    /// Content may be a list of text parts; otherwise the parts are joined by line breaks.
    pub content_parts: bool,
    /// Content may be null beside tool calls; otherwise the template fails, or prints it as "None".
    pub null_content: bool,
    /// The template supports reasoning: it mentions `enable_thinking` or a marker.
    pub thinking: bool,
    /// Some text follows an answer and ends the turn. Without it a model that is trained with the
    /// template does not learn to stop.
    pub ends_turns: bool,
    /// The generation prompt ends inside an open reasoning block by default.
    pub opens_reasoning: bool,
}

impl Default for Caps {
    fn default() -> Self {
        Caps {
            tools: true,
            tool_calls: true,
            string_arguments: false,
            short_ids: false,
            system: true,
            developer: true,
            typed_content: false,
            content_parts: true,
            null_content: true,
            thinking: false,
            ends_turns: true,
            opens_reasoning: false,
        }
    }
}

/// Known markers of reasoning blocks, the most specific first.
const REASONING: [(&str, &str); 6] = [
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<think>", "</think>"),
];

/// The markers that a template's source mentions.
pub(super) fn reasoning_markers(source: &str) -> Option<(&'static str, &'static str)> {
    let mentioned = REASONING.into_iter().find(|(_, close)| source.contains(close));
    let switch = || source.contains("enable_thinking").then_some(("<think>", "</think>"));
    mentioned.or_else(switch)
}

/// Words that occur in no template.
const SYSTEM: &str = "ingot-probe-system";
const USER: &str = "ingot-probe-user";
const TOOL: &str = "ingot_probe_tool";
const ARGUMENT: &str = "ingot_probe_argument";
const RESULT: &str = "ingot-probe-result";
const VALUE: &str = "ingot-probe-value";
const SHORT_ID: &str = "probe0000";
const LONG_ID: &str = "call_probe0000000000000000000";

pub(super) fn probe(template: &ChatTemplate, source: &str) -> Caps {
    let content_parts = Probe { template, typed: true }.shows_parts_as_text();
    let plain = Probe { template, typed: false };
    let typed_content = content_parts && !shows(&plain.render(vec![plain.user()], None), &[USER]);
    let probe = Probe { template, typed: typed_content };

    let system = probe.message("system", SYSTEM);
    let system = shows(&probe.render(vec![system, probe.user()], None), &[SYSTEM, USER]);
    // A template that prints any role also prints this one, although its model does not know it.
    let developer = source.contains("developer") && {
        let message = probe.message("developer", SYSTEM);
        shows(&probe.render(vec![message, probe.user()], None), &[SYSTEM, USER])
    };
    let tools = shows(&probe.render(vec![probe.user()], Some(vec![tool()])), &[TOOL]);

    let arguments = json!({ARGUMENT: VALUE});
    let text = Value::String(arguments.to_string());
    let with_object = probe.tool_call(SHORT_ID, probe.content(""), &arguments);
    let with_string = match with_object {
        Some(_) => None,
        None => probe.tool_call(SHORT_ID, probe.content(""), &text),
    };
    let string_arguments = with_string.is_some();
    let arguments = if string_arguments { text } else { arguments };
    let with_long_id = probe.tool_call(LONG_ID, probe.content(""), &arguments);
    let with_null = probe.tool_call(SHORT_ID, Value::Null, &arguments);
    let tool_calls = with_object.or(with_string);
    let nones = |prompt: &Option<String>| prompt.as_ref().map(|p| p.matches("None").count());
    Caps {
        tools,
        tool_calls: tools && tool_calls.is_some(),
        string_arguments,
        short_ids: tool_calls.is_some() && with_long_id.is_none(),
        system,
        developer,
        typed_content,
        content_parts,
        null_content: with_null.is_some() && nones(&with_null) <= nones(&tool_calls),
        thinking: reasoning_markers(source).is_some() || source.contains("reasoning_content"),
        ends_turns: probe.ends_turns(),
        opens_reasoning: probe.opens_reasoning(),
    }
}

/// Whether a prompt contains all of the words; a template that refuses shows nothing.
fn shows(prompt: &Result<String, TemplateError>, words: &[&str]) -> bool {
    prompt.as_ref().is_ok_and(|prompt| words.iter().all(|word| prompt.contains(word)))
}

fn tool() -> Value {
    json!({"type": "function", "function": {
        "name": TOOL,
        "description": "probe",
        "parameters": {
            "type": "object",
            "properties": {ARGUMENT: {"type": "string", "description": "probe"}},
            "required": [ARGUMENT],
        },
    }})
}

/// Renders conversations with a template.
struct Probe<'a> {
    template: &'a ChatTemplate,
    /// Content is written as a list of parts.
    typed: bool,
}

impl Probe<'_> {
    fn content(&self, text: &str) -> Value {
        match self.typed {
            true => json!([{"type": "text", "text": text}]),
            false => json!(text),
        }
    }

    fn message(&self, role: &str, text: &str) -> Value {
        json!({"role": role, "content": self.content(text)})
    }

    fn user(&self) -> Value {
        self.message("user", USER)
    }

    fn render(
        &self,
        messages: Vec<Value>,
        tools: Option<Vec<Value>>,
    ) -> Result<String, TemplateError> {
        let mut input = RenderInput {
            messages,
            tools,
            add_generation_prompt: true,
            now: Some(0),
            ..RenderInput::default()
        };
        self.template.add_variables(&mut input);
        self.template.render_raw(&input)
    }

    /// Whether the text of content in several parts is shown, and not the list itself with the keys
    /// of its parts.
    fn shows_parts_as_text(&self) -> bool {
        let part = |text: &str| json!({"type": "text", "text": text});
        let message = json!({"role": "user", "content": [part(USER), part(RESULT)]});
        let prompt = self.render(vec![message], None);
        shows(&prompt, &[USER, RESULT])
            && !shows(&prompt, &[&format!("'{USER}'")])
            && !shows(&prompt, &[&format!("\"{USER}\"")])
    }

    /// The prompt of a conversation with a tool call and its result, if it shows both.
    fn tool_call(&self, id: &str, content_beside: Value, arguments: &Value) -> Option<String> {
        let call = json!({
            "id": id,
            "type": "function",
            "function": {"name": TOOL, "arguments": arguments},
        });
        let messages = vec![
            self.user(),
            json!({"role": "assistant", "content": content_beside, "tool_calls": [call]}),
            json!({
                "role": "tool",
                "tool_call_id": id,
                "name": TOOL,
                "content": self.content(RESULT),
            }),
        ];
        let prompt = self.render(messages, Some(vec![tool()]));
        shows(&prompt, &[TOOL, RESULT, VALUE]).then_some(prompt.ok()).flatten()
    }

    fn ends_turns(&self) -> bool {
        let mut input = RenderInput {
            messages: vec![self.user(), self.message("assistant", RESULT)],
            now: Some(0),
            ..RenderInput::default()
        };
        self.template.add_variables(&mut input);
        // If the template refuses the conversation, nothing is known about this feature.
        self.template.render_raw(&input).map_or(true, |prompt| {
            prompt.rsplit_once(RESULT).is_none_or(|(_, behind)| !behind.trim().is_empty())
        })
    }

    fn opens_reasoning(&self) -> bool {
        self.render(vec![self.user()], None).is_ok_and(|prompt| {
            self.template.reasoning(&prompt).is_some_and(|format| format.starts_open)
        })
    }
}
