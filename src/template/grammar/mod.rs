//! Grammars that constrain a model to well-formed tool calls, in llguidance's Lark dialect.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::family::ToolFamily;
use super::schema::close_objects;

/// OpenAI's `tool_choice`, except `none`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model may call a tool; once begun, a call is well-formed.
    Auto,
    /// The model must call one of the tools.
    Required,
    /// The model must call this tool.
    Named(String),
}

/// Condition for the start of a grammar in text that is unconstrained before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trigger {
    /// Texts that begin a call. The grammar includes them: it applies from the first of their
    /// bytes.
    pub text: Vec<String>,
    /// Whether a trigger counts only at the start of the answer (after reasoning and white space).
    pub at_start_only: bool,
}

/// A grammar of tool calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolGrammar {
    /// Lark, for llguidance. Its language ends where the model's answer ends.
    pub lark: String,
    /// `None`: the grammar applies from the first token of the answer.
    pub trigger: Option<Trigger>,
}

/// Reason why there is no grammar for the tools: a 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    #[error("there are no tools to call")]
    NoTools,
    #[error("tool_choice names '{0}', which is not among the tools")]
    UnknownTool(String),
    #[error("the parameters of tool '{0}' are not a JSON schema of an object")]
    BadParameters(String),
}

/// A function in the `tools` of a request.
struct Tool<'t> {
    name: &'t str,
    schema: Value,
}

impl ToolFamily {
    /// The grammar of calls of `tools` (OpenAI's definitions, validated) in the format of this
    /// family.
    ///
    /// `marker_token` returns the id of a marker that is a special token of the engine's vocabulary
    /// (as the tool-calling markers of most models are); other markers are plain text. The schema
    /// of a `strict` tool is used unchanged; for other tools, keywords that llguidance does not
    /// implement are ignored instead of refused.
    ///
    /// # Errors
    /// See [`GrammarError`].
    pub fn grammar(
        self,
        tools: &[Value],
        choice: &ToolChoice,
        parallel: bool,
        marker_token: impl Fn(&str) -> Option<u32>,
    ) -> Result<ToolGrammar, GrammarError> {
        let mut tools: Vec<Tool> = tools.iter().map(tool).collect::<Result<_, _>>()?;
        let named = match choice {
            ToolChoice::Named(name) => {
                tools.retain(|tool| tool.name == name);
                if tools.is_empty() {
                    return Err(GrammarError::UnknownTool(name.clone()));
                }
                true
            }
            ToolChoice::Auto | ToolChoice::Required => false,
        };
        if tools.is_empty() {
            return Err(GrammarError::NoTools);
        }
        let marker = |text: &str| match marker_token(text) {
            Some(id) => format!("<[{id}]>"),
            None => literal(text),
        };
        // A named choice is a single call of that tool.
        let lark = self.lark(&tools, parallel && !named, &marker);
        let trigger = (*choice == ToolChoice::Auto).then(|| self.trigger());
        Ok(ToolGrammar { lark, trigger })
    }

    fn trigger(self) -> Trigger {
        let text: &[&str] = match self {
            ToolFamily::Hermes => &["<tool_call>"],
            ToolFamily::Mistral => &["[TOOL_CALLS]"],
            ToolFamily::Llama3 => &["<|python_tag|>", "{\"name\"", "{ \"name\""],
            ToolFamily::Json => &["{\"name\"", "{ \"name\"", "[{\"name\"", "[{ \"name\""],
        };
        Trigger {
            text: text.iter().map(|text| (*text).to_owned()).collect(),
            at_start_only: self.bare(),
        }
    }

    fn lark(self, tools: &[Tool], parallel: bool, marker: &dyn Fn(&str) -> String) -> String {
        let calls = |separator: &str| match parallel {
            true => format!("call ({separator} call)*"),
            false => "call".to_owned(),
        };
        // White space after a call must not lead to another call.
        let end = if parallel { " w" } else { "" };
        let start = match self {
            ToolFamily::Hermes => {
                let (open, close) = (marker("<tool_call>"), marker("</tool_call>"));
                let more = if parallel { "(w block)*" } else { "" };
                format!("start: block {more}{end}\nblock: {open} w call w {close}\n")
            }
            ToolFamily::Llama3 => {
                let tag = marker("<|python_tag|>");
                // The tag is an alternative, not an option: an optional token would be ambiguous
                // with the white space that may precede the text form.
                format!("start: {tag} calls | calls\ncalls: {}{end}\n", calls("w \";\" w"))
            }
            ToolFamily::Mistral => {
                let (tag, arguments) = (marker("[TOOL_CALLS]"), marker("[ARGS]"));
                let more = if parallel { "(w named)*" } else { "" };
                let mut text = format!(
                    "start: list{end} | named {more}{end}\nlist: {tag} w \"[\" w {} w \"]\"\nnamed: ",
                    calls("w \",\" w")
                );
                for (index, tool) in tools.iter().enumerate() {
                    let or = if index > 0 { "\n  | " } else { "" };
                    let name = literal(tool.name);
                    let _ = write!(text, "{or}{tag} {name} {arguments} args_{index}");
                }
                text + "\n"
            }
            ToolFamily::Json => {
                let list = calls("w \",\" w");
                format!("start: call{end} | \"[\" w {list} w \"]\"{end}\n")
            }
        };
        let key = if self == ToolFamily::Llama3 { "parameters" } else { "arguments" };
        let mut lark = start + "call: ";
        for (index, tool) in tools.iter().enumerate() {
            let or = if index > 0 { "\n  | " } else { "" };
            let _ = write!(
                lark,
                "{or}\"{{\" w {} w \":\" w {} w \",\" w {} w \":\" w args_{index} w \"}}\"",
                literal("\"name\""),
                // First the name as JSON text in the call, then that text as a literal of the
                // grammar.
                literal(&literal(tool.name)),
                literal(&literal(key)),
            );
        }
        lark.push('\n');
        for (index, tool) in tools.iter().enumerate() {
            let _ = writeln!(lark, "args_{index}: %json {}", tool.schema);
        }
        // At most one character: with unbounded white space a model may never stop.
        lark + "w: SPACE?\nSPACE: /[ \\n]/\n"
    }
}

/// A text as a JSON string, which is also a literal of Lark.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

fn tool(tool: &Value) -> Result<Tool<'_>, GrammarError> {
    let function = &tool["function"];
    let name = function["name"].as_str().unwrap_or_default();
    let bad = || GrammarError::BadParameters(name.to_owned());
    let mut schema = match function.get("parameters").cloned() {
        // OpenAI: a function without `parameters` has an empty parameter list.
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(Value::Object(schema)) if schema.is_empty() => {
            json!({"type": "object", "properties": {}})
        }
        Some(schema @ Value::Object(_)) => schema,
        Some(_) => return Err(bad()),
    };
    close_objects(&mut schema);
    let Value::Object(mut schema) = schema else { return Err(bad()) };
    match schema.get("type") {
        None => {
            schema.insert("type".into(), json!("object"));
        }
        Some(kind) if kind == "object" => {}
        Some(_) => return Err(bad()),
    }
    let strict = function["strict"] == true;
    // Options of llguidance's JSON compiler. This replaces a client's own, which could be refused.
    schema.insert(
        "x-guidance".into(),
        json!({"whitespace_pattern": "[ \\n]{0,1}", "lenient": !strict}),
    );
    Ok(Tool { name, schema: Value::Object(schema) })
}

#[cfg(test)]
mod tests;
