//! `response_format`: the required form of the output.

use super::fields::{Fields, wrong};
use crate::gateway::error::ApiError;
use crate::ipc::Grammar;
use crate::template::close_objects;
use serde_json::{Value, json};

/// Maximum size of a schema or Lark grammar, in bytes of text.
const MAX_GRAMMAR: usize = 256 << 10;
const MAX_REGEX: usize = 16 << 10;

/// Takes `response_format`; `None` means free text.
///
/// Besides OpenAI's `text`, `json_object` and `json_schema` there are
/// `{"type": "regex", "regex": "…"}` and `{"type": "grammar", "grammar": "…"}` (Lark).
pub(in crate::gateway::api) fn take_response_format(
    fields: &mut Fields,
) -> Result<Option<Grammar>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let kind = format.string("type", 64)?.ok_or_else(|| format.missing("type"))?;
    let grammar = match kind.as_str() {
        "text" => None,
        // llama-server accepts a schema here too.
        "json_object" => Some(match format.take("schema") {
            None => Grammar::JsonObject,
            Some(schema) => json_schema(&format.name("schema"), &schema)?,
        }),
        "json_schema" => {
            let inner = format.object("json_schema")?;
            Some(take_json_schema(inner.ok_or_else(|| format.missing("json_schema"))?)?)
        }
        "regex" => {
            let regex = format.string("regex", MAX_REGEX)?;
            Some(Grammar::Regex(regex.ok_or_else(|| format.missing("regex"))?))
        }
        "grammar" => {
            let syntax = format.string("syntax", 16)?;
            if syntax.is_some_and(|syntax| syntax != "lark") {
                let name = format.name("syntax");
                return Err(ApiError::invalid(&name, format!("{name} must be \"lark\"")));
            }
            let lark = format.string("grammar", MAX_GRAMMAR)?;
            Some(Grammar::Lark(lark.ok_or_else(|| format.missing("grammar"))?))
        }
        _ => {
            let expected =
                "one of \"text\", \"json_object\", \"json_schema\", \"regex\" and \"grammar\"";
            return Err(wrong(&format.name("type"), expected, &Value::from(kind)));
        }
    };
    format.finish()?;
    Ok(grammar)
}

/// Reads a response format that is no part of a request; `name` is its name in errors.
///
/// # Errors
/// 400 if it is none.
pub fn response_format(name: &str, format: &Value) -> Result<Option<Grammar>, ApiError> {
    let read =
        take_response_format(&mut Fields::of(String::new(), json!({"response_format": format}))?);
    read.map_err(|error| {
        match error.param.as_deref().map(|param| param.strip_prefix("response_format")) {
            Some(Some(rest)) => {
                let param = format!("{name}{rest}");
                ApiError { message: error.message.replace("response_format", name), ..error }
                    .with_param(&param)
            }
            _ => error.with_param(name),
        }
    })
}

/// Takes `{"name", "description", "strict", "schema"}`. The schema is enforced whether or not
/// `strict` is set.
fn take_json_schema(mut fields: Fields) -> Result<Grammar, ApiError> {
    fields.string("name", 256)?;
    fields.string("description", MAX_GRAMMAR)?;
    fields.boolean("strict")?;
    let schema = fields.take("schema").ok_or_else(|| fields.missing("schema"))?;
    let grammar = json_schema(&fields.name("schema"), &schema)?;
    fields.finish()?;
    Ok(grammar)
}

/// Serializes a schema for the engine, which decides whether the schema can be enforced.
pub(in crate::gateway::api) fn json_schema(
    name: &str,
    schema: &Value,
) -> Result<Grammar, ApiError> {
    if !schema.is_object() {
        return Err(wrong(name, "a JSON schema (an object)", schema));
    }
    let mut schema = schema.clone();
    close_objects(&mut schema);
    let text = schema.to_string();
    if text.len() > MAX_GRAMMAR {
        let message =
            format!("{name} must be at most {MAX_GRAMMAR} bytes long, got {}", text.len());
        return Err(ApiError::invalid(name, message));
    }
    Ok(Grammar::JsonSchema(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn take(format: Value) -> Result<Option<Grammar>, ApiError> {
        let mut fields = Fields::of(String::new(), json!({ "response_format": format })).unwrap();
        take_response_format(&mut fields)
    }

    #[test]
    fn every_kind_of_format() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let closed = json!({"type": "object", "properties": {"a": {"type": "integer"}},
            "additionalProperties": false});
        let strict = json!({"name": "x", "strict": true, "schema": schema});
        let cases = [
            (json!(null), None),
            (json!({"type": "text"}), None),
            (json!({"type": "json_object"}), Some(Grammar::JsonObject)),
            (
                json!({"type": "json_object", "schema": schema}),
                Some(Grammar::JsonSchema(closed.to_string())),
            ),
            (
                json!({"type": "json_schema", "json_schema": strict}),
                Some(Grammar::JsonSchema(closed.to_string())),
            ),
            (json!({"type": "regex", "regex": "[a-z]+"}), Some(Grammar::Regex("[a-z]+".into()))),
            (
                json!({"type": "grammar", "syntax": "lark", "grammar": "start: \"a\""}),
                Some(Grammar::Lark("start: \"a\"".into())),
            ),
        ];
        for (format, expected) in cases {
            assert_eq!(take(format.clone()).unwrap(), expected, "{format}");
        }
    }

    #[test]
    fn bad_formats_are_named() {
        let cases = [
            (json!("json"), "response_format"),
            (json!({}), "response_format.type"),
            (json!({"type": 1}), "response_format.type"),
            (json!({"type": "xml"}), "response_format.type"),
            (json!({"type": "json_schema"}), "response_format.json_schema"),
            (
                json!({"type": "json_schema", "json_schema": {"name": "x"}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"type": "json_schema", "json_schema": {"schema": true}}),
                "response_format.json_schema.schema",
            ),
            (
                json!({"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}),
                "response_format.json_schema.x",
            ),
            (json!({"type": "regex", "regex": 1}), "response_format.regex"),
            (
                json!({"type": "grammar", "grammar": "a", "syntax": "ebnf"}),
                "response_format.syntax",
            ),
            (json!({"type": "text", "more": 1}), "response_format.more"),
            (json!({"type": "regex", "regex": "a".repeat(20_000)}), "response_format.regex"),
        ];
        for (format, param) in cases {
            let error = take(format.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{format}");
            assert_eq!(error.status, 400);
        }
    }
}
