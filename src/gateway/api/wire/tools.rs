//! `tools` and `tool_choice`.

use super::fields::{Fields, wrong};
use super::messages::NOTES;
use crate::gateway::error::ApiError;
use serde_json::{Value, json};
use std::collections::HashSet;

const MAX_TOOLS: usize = 128;
const MAX_NAME: usize = 64;
const MAX_DESCRIPTION: usize = 64 << 10;

/// The tools that the model may call, as the client defined them; not empty.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::gateway::api) struct Tools {
    /// OpenAI's definitions: `{"type": "function", "function": {"name", …}}`.
    pub definitions: Vec<Value>,
    pub choice: Choice,
    /// Whether one response may contain several calls.
    pub parallel: bool,
}

/// Which tools must or may be called. For `none` there is no [`Tools`] at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::gateway::api) enum Choice {
    Auto,
    Required,
    Named(String),
}

/// Takes `tools`, `tool_choice` and `parallel_tool_calls`; `None` if no tool may be called.
pub(in crate::gateway::api) fn take_tools(fields: &mut Fields) -> Result<Option<Tools>, ApiError> {
    for (old, new) in [("functions", "tools"), ("function_call", "tool_choice")] {
        if fields.take(old).is_some_and(|value| value != json!("none") && value != json!([])) {
            let message = format!("{old} is deprecated and not supported: use {new} instead.");
            return Err(ApiError::invalid(old, message).with_code("unsupported_parameter"));
        }
    }
    let parallel = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
    let definitions = fields
        .list("tools", MAX_TOOLS)?
        .unwrap_or_default()
        .into_iter()
        .enumerate()
        .map(|(index, tool)| definition(Fields::of(format!("tools[{index}]"), tool)?))
        .collect::<Result<Vec<_>, _>>()?;
    let Some(choice) = take_choice(fields)? else { return Ok(None) };
    if definitions.is_empty() {
        if choice != Choice::Auto {
            let message = "tool_choice is only allowed when tools are specified";
            return Err(ApiError::invalid("tool_choice", message));
        }
        return Ok(None);
    }
    let names = definitions.iter().map(|tool| tool["function"]["name"].as_str());
    let mut seen = HashSet::new();
    if let Some(index) = names.clone().position(|name| !seen.insert(name)) {
        let name = names.clone().nth(index).flatten().unwrap_or_default();
        let message = format!("tools[{index}] is the second tool named `{name}`: rename one.");
        return Err(ApiError::invalid(format!("tools[{index}].function.name"), message));
    }
    if let Choice::Named(name) = &choice
        && !names.clone().any(|known| known == Some(name))
    {
        let message = format!("tool_choice names `{name}`, which is not among the tools");
        return Err(ApiError::invalid("tool_choice", message));
    }
    Ok(Some(Tools { definitions, choice, parallel }))
}

/// Takes `tool_choice`; `None` for `"none"`.
fn take_choice(fields: &mut Fields) -> Result<Option<Choice>, ApiError> {
    const EXPECTED: &str = "\"none\", \"auto\", \"required\" or \
                            {\"type\": \"function\", \"function\": {\"name\": …}}";
    match fields.take("tool_choice") {
        None => Ok(Some(Choice::Auto)),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Ok(None),
            "auto" => Ok(Some(Choice::Auto)),
            "required" => Ok(Some(Choice::Required)),
            _ => Err(wrong("tool_choice", EXPECTED, &json!(word))),
        },
        Some(object @ Value::Object(_)) => {
            let mut object = Fields::of("tool_choice".into(), object)?;
            let kind = object.string("type", MAX_NAME)?;
            if kind.as_deref() != Some("function") {
                return Err(wrong("tool_choice.type", "\"function\"", &json!(kind)));
            }
            let mut function =
                object.object("function")?.ok_or_else(|| object.missing("function"))?;
            let name = function.string("name", MAX_NAME)?;
            let name = name.ok_or_else(|| function.missing("name"))?;
            function.finish()?;
            object.finish()?;
            Ok(Some(Choice::Named(name)))
        }
        Some(other) => Err(wrong("tool_choice", EXPECTED, &other)),
    }
}

/// Checks one tool definition; its parameters, a JSON schema, are kept unchanged.
fn definition(mut fields: Fields) -> Result<Value, ApiError> {
    let kind = fields.string("type", MAX_NAME)?.ok_or_else(|| fields.missing("type"))?;
    if kind != "function" {
        return Err(wrong(&fields.name("type"), "\"function\"", &json!(kind)));
    }
    let mut function = fields.object("function")?.ok_or_else(|| fields.missing("function"))?;
    let name = function.string("name", MAX_NAME)?.ok_or_else(|| function.missing("name"))?;
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || !name.bytes().all(known) {
        let expected = "1 to 64 letters, digits, underscores, dashes or dots";
        return Err(wrong(&function.name("name"), expected, &json!(name)));
    }
    let mut out = json!({"name": name});
    if let Some(description) = function.string("description", MAX_DESCRIPTION)? {
        out["description"] = json!(description);
    }
    match function.take("parameters") {
        None => {}
        Some(schema @ Value::Object(_)) => out["parameters"] = schema,
        Some(other) => {
            return Err(function.wrong("parameters", "a JSON schema (an object)", &other));
        }
    }
    if let Some(strict) = function.boolean("strict")? {
        out["strict"] = json!(strict);
    }
    function.ignore(&NOTES);
    function.finish()?;
    fields.ignore(&NOTES);
    fields.finish()?;
    Ok(json!({"type": "function", "function": out}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(body: Value) -> Result<Option<Tools>, ApiError> {
        take_tools(&mut Fields::of(String::new(), body).unwrap())
    }

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    }

    #[test]
    fn choices() {
        let named = json!({"type": "function", "function": {"name": "f"}});
        let cases = [
            (json!(null), Some(Choice::Auto)),
            (json!("auto"), Some(Choice::Auto)),
            (json!("required"), Some(Choice::Required)),
            (json!("none"), None),
            (named, Some(Choice::Named("f".into()))),
        ];
        for (choice, expected) in cases {
            let got = take(json!({"tools": [tool("f")], "tool_choice": choice})).unwrap();
            assert_eq!(got.as_ref().map(|tools| &tools.choice), expected.as_ref(), "{choice}");
            assert!(got.is_none_or(|tools| tools.definitions == [tool("f")] && tools.parallel));
        }
        assert_eq!(take(json!({"tools": [], "tool_choice": "auto"})).unwrap(), None);
        assert_eq!(take(json!({"tools": null, "tool_choice": "none"})).unwrap(), None);
        assert_eq!(take(json!({"functions": [], "function_call": "none"})).unwrap(), None);
    }

    #[test]
    fn bad_tools_are_named() {
        let cases = [
            (json!({"tools": {}}), "tools"),
            (json!({"tools": [1]}), "tools[0]"),
            (json!({"tools": [{"type": "custom"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].function"),
            (json!({"tools": [tool("")]}), "tools[0].function.name"),
            (json!({"tools": [tool("f"), tool("a b")]}), "tools[1].function.name"),
            (json!({"tools": [tool("f"), tool("g"), tool("f")]}), "tools[2].function.name"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [tool("f")], "tool_choice": "maybe"}), "tool_choice"),
            (json!({"tools": [tool("f")], "tool_choice": {"type": "x"}}), "tool_choice.type"),
            (
                json!({"tools": [tool("f")],
                    "tool_choice": {"type": "function", "function": {"name": "g"}}}),
                "tool_choice",
            ),
            (json!({"functions": [{"name": "f"}]}), "functions"),
            (json!({"function_call": "auto"}), "function_call"),
            (json!({"parallel_tool_calls": 1}), "parallel_tool_calls"),
            (
                json!({"tools": [{"type": "function",
                    "function": {"name": "f", "parameters": "x"}}]}),
                "tools[0].function.parameters",
            ),
        ];
        for (body, param) in cases {
            let error = take(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        }
    }
}
