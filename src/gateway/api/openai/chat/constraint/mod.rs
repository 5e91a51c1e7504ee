//! Constraints on the output of a chat: tool calls, formats, and the reasoning before them.
//!
//! | reasoning | constraint begins |
//! |---|---|
//! | none, or the prompt has closed it | at once |
//! | the prompt has opened it | after its end |
//! | optional for the model | at once; the grammar allows a reasoning block in front |

use super::ChatRequest;
use crate::gateway::api::wire::tools::Choice;
use crate::gateway::error::ApiError;
use crate::ipc::{Grammar, GrammarSpec, GrammarTrigger, ModelInfo};
use crate::template::{
    ChatTemplate, ReasoningFormat, ToolChoice, ToolFamily, ToolGrammar, close_objects,
};
use serde_json::{Value, json};

/// White space between JSON tokens. llguidance's default is unbounded, and models can generate
/// white space forever.
const JSON_WHITESPACE: &str = r"[ ]{1,2}|\r?\n[ \t]{0,48}";

/// How the output is constrained and read.
#[derive(Debug)]
pub(in crate::gateway::api) struct Constraint {
    pub grammar: Option<GrammarSpec>,
    /// Parts of the grammar, each with the parameter that it comes from. If the grammar is refused,
    /// every part is compiled alone to find the parameter at fault.
    pub parts: Vec<Part>,
    pub family: Option<ToolFamily>,
    pub reasoning: Option<ReasoningFormat>,
}

/// A part of a grammar as the client wrote it.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::gateway::api) struct Part {
    pub param: String,
    /// Description of the part for a message: "the parameters of the tool `f`".
    pub what: Option<String>,
    pub grammar: Grammar,
}

/// Builds the constraint that `request` asks for, for the output that follows `prompt`.
///
/// # Errors
/// 400 for tools or formats that the model, or their combination, does not allow.
pub(in crate::gateway::api) fn build(
    template: &ChatTemplate,
    info: &ModelInfo,
    prompt: &str,
    request: &ChatRequest,
) -> Result<Constraint, ApiError> {
    let reasoning = template.reasoning(prompt);
    let mut constraint =
        Constraint { grammar: None, parts: Vec::new(), family: None, reasoning: reasoning.clone() };
    if let Some(format) = &request.format {
        let (param, grammar) = ("response_format".into(), format.clone());
        constraint.parts.push(Part { param, what: None, grammar });
    }
    let marker = |text: &str| token(info, text);
    let before = Before::new(reasoning.as_ref(), prompt);
    let Some(tools) = &request.tools else {
        if let Some(format) = request.format.clone() {
            constraint.grammar = Some(before.wrap_format(format, &marker));
        }
        return Ok(constraint);
    };
    let family = template.family();
    constraint.family = Some(family);
    constraint.parts.extend(tool_parts(&tools.definitions));
    let choice = match &tools.choice {
        Choice::Auto => ToolChoice::Auto,
        Choice::Required => ToolChoice::Required,
        Choice::Named(name) => ToolChoice::Named(name.clone()),
    };
    let grammar = family
        .grammar(&tools.definitions, &choice, tools.parallel, marker)
        .map_err(|error| ApiError::invalid("tools", error.to_string()))?;
    constraint.grammar = match (&request.format, choice) {
        // The output is either a call or follows the format.
        (Some(format), ToolChoice::Auto) => {
            Some(before.wrap_lark(either(&grammar.lark, format)?, has_json(format), &marker))
        }
        (None, ToolChoice::Auto) => on_trigger(grammar, reasoning.is_some()),
        // The output is a call, whatever format other outputs have.
        _ => Some(before.wrap_lark(grammar.lark, true, &marker)),
    };
    Ok(constraint)
}

/// The parameter schemas of the tools, which constrain the calls.
fn tool_parts(definitions: &[Value]) -> impl Iterator<Item = Part> + '_ {
    definitions.iter().enumerate().filter_map(|(index, tool)| {
        let function = &tool["function"];
        let mut schema = function.get("parameters")?.clone();
        close_objects(&mut schema);
        let text = schema.to_string();
        let name = function["name"].as_str().unwrap_or_default();
        Some(Part {
            param: format!("tools[{index}].function.parameters"),
            what: Some(format!("the parameters of the tool `{name}`")),
            grammar: match function["strict"] == true {
                true => Grammar::JsonSchema(text),
                false => Grammar::LenientJsonSchema(text),
            },
        })
    })
}

fn has_json(format: &Grammar) -> bool {
    matches!(format, Grammar::JsonObject | Grammar::JsonSchema(_))
}

fn token(info: &ModelInfo, text: &str) -> Option<u32> {
    info.special_tokens.iter().find(|(known, _)| known == text).map(|(_, token)| *token)
}

/// A grammar that constrains a call once its trigger has been generated.
fn on_trigger(grammar: ToolGrammar, reasons: bool) -> Option<GrammarSpec> {
    let trigger = grammar.trigger?;
    if reasons && trigger.at_start_only {
        // The engine would start at the reasoning, not at the answer: calls stay unconstrained.
        return None;
    }
    Some(GrammarSpec {
        grammar: Grammar::JsonLark { lark: grammar.lark, reasoning: None },
        trigger: Some(GrammarTrigger {
            texts: trigger.text,
            at_start_only: trigger.at_start_only,
            inclusive: true,
        }),
    })
}

/// Text that may or must come before the constrained part.
enum Before<'a> {
    Nothing,
    /// Reasoning that the prompt has opened: unconstrained until this text.
    Until(&'a str),
    /// Optional reasoning.
    Maybe(&'a ReasoningFormat),
}

impl<'a> Before<'a> {
    fn new(reasoning: Option<&'a ReasoningFormat>, prompt: &str) -> Self {
        match reasoning {
            None => Self::Nothing,
            Some(format) if format.starts_open => Self::Until(&format.close),
            // Thinking is disabled: the template wrote an empty block.
            Some(format) if prompt.trim_end().ends_with(&format.close) => Self::Nothing,
            Some(format) => Self::Maybe(format),
        }
    }

    fn wrap_format(&self, format: Grammar, marker: &dyn Fn(&str) -> Option<u32>) -> GrammarSpec {
        let grammar = match (self, body(&format)) {
            // A client's own Lark grammar has its own rule names, so no reasoning is added to it.
            (Self::Nothing | Self::Until(_), _) | (Self::Maybe(_), None) => format,
            (Self::Maybe(_), Some(body)) => {
                let json = has_json(&format);
                return self.wrap_lark(format!("start: form\n{body}"), json, marker);
            }
        };
        GrammarSpec { grammar, trigger: self.trigger() }
    }

    /// Adds the reasoning to `lark`, which begins with the rule `start`. `json` says that the
    /// grammar consists only of JSON and markers.
    fn wrap_lark(
        &self,
        lark: String,
        json: bool,
        marker: &dyn Fn(&str) -> Option<u32>,
    ) -> GrammarSpec {
        let lark = match self {
            Self::Nothing | Self::Until(_) => lark,
            Self::Maybe(format) => {
                format!("{}{}", thoughts(format, marker), rename_start(&lark, "answer"))
            }
        };
        let reasoning = match self {
            Self::Maybe(format) => Some((format.open.clone(), format.close.clone())),
            Self::Nothing | Self::Until(_) => None,
        };
        let grammar = match json {
            true => Grammar::JsonLark { lark, reasoning },
            false => Grammar::Lark(lark),
        };
        GrammarSpec { grammar, trigger: self.trigger() }
    }

    fn trigger(&self) -> Option<GrammarTrigger> {
        match self {
            Self::Until(close) => Some(GrammarTrigger {
                texts: vec![(*close).to_owned()],
                at_start_only: false,
                inclusive: false,
            }),
            Self::Nothing | Self::Maybe(_) => None,
        }
    }
}

/// `start: think answer | answer`, and the rules of `think`.
fn thoughts(format: &ReasoningFormat, marker: &dyn Fn(&str) -> Option<u32>) -> String {
    let literal = |text: &str| Value::from(text).to_string();
    let open = marker(&format.open).map_or(literal(&format.open), |id| format!("<[{id}]>"));
    let (tail, rules) = match marker(&format.close) {
        Some(id) => (format!("THOUGHT <[{id}]>"), "THOUGHT: /(?s:.*)/\n".to_owned()),
        None => (
            "thought".to_owned(),
            format!("thought[suffix={}]: /(?s:.*)/\n", literal(&format.close)),
        ),
    };
    format!(
        "start: think answer | answer\nthink: {open} {tail} AFTER_THOUGHT?\n{rules}\
         AFTER_THOUGHT: /[ \\n]{{1,4}}/\n"
    )
}

/// A grammar for either a tool call by the grammar `calls`, or the format.
fn either(calls: &str, format: &Grammar) -> Result<String, ApiError> {
    let Some(body) = body(format) else {
        let message = "a Lark grammar cannot be combined with tools unless tool_choice is \"none\"";
        return Err(ApiError::invalid("response_format", message));
    };
    Ok(format!("start: calling | form\n{}{body}", rename_start(calls, "calling")))
}

/// Renames the first rule of a grammar that this module wrote.
fn rename_start(lark: &str, name: &str) -> String {
    lark.replacen("start:", &format!("{name}:"), 1)
}

/// Writes a format as the rule `form`; `None` for a client's own Lark grammar.
fn body(format: &Grammar) -> Option<String> {
    let mut schema = match format {
        Grammar::Lark(_) | Grammar::JsonLark { .. } => return None,
        Grammar::Regex(regex) => return Some(format!("form: FORM\nFORM: /{}/\n", slashes(regex))),
        Grammar::JsonObject => json!({"type": "object"}),
        // serde_json wrote this text.
        Grammar::JsonSchema(text) | Grammar::LenientJsonSchema(text) => {
            serde_json::from_str(text).unwrap_or_else(|_| json!({}))
        }
    };
    schema["x-guidance"] = json!({"whitespace_pattern": JSON_WHITESPACE});
    Some(format!("form: %json {schema}\n"))
}

/// A regular expression between slashes; slashes and line breaks in it are escaped.
fn slashes(regex: &str) -> String {
    let mut out = String::with_capacity(regex.len());
    let mut escaped = false;
    for character in regex.chars() {
        match character {
            '/' if !escaped => out.push_str("\\/"),
            // A backslash before a line break means a line break.
            '\n' => out.push_str(if escaped { "n" } else { "\\n" }),
            other => out.push(other),
        }
        escaped = character == '\\' && !escaped;
    }
    out
}

#[cfg(test)]
mod tests;
