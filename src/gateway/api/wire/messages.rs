//! `messages`: the structure is checked, then the messages are passed to the template unchanged.

use super::fields::{Fields, wrong};
use crate::gateway::error::ApiError;
use serde_json::{Map, Value, json};

const MAX_MESSAGES: usize = 4096;
const MAX_PARTS: usize = 1024;
const MAX_CALLS: usize = 128;
/// The body limit bounds text; this value only has to be larger.
const ANY_LENGTH: usize = usize::MAX;
pub(in crate::gateway::api) const MAX_NAME: usize = 512;
/// Fields that agents and other servers add to messages, their parts and calls: data about caching,
/// signatures and earlier responses, which do not change the prompt. They are ignored.
pub(in crate::gateway::api) const NOTES: [&str; 10] = [
    "annotations",
    "cache_control",
    "extra_content",
    "id",
    "phase",
    "provider_specific_fields",
    "reasoning_details",
    "status",
    "thinking_blocks",
    "token_ids",
];

/// Takes `messages`: at least one message, each with a role and the fields that the role allows.
///
/// Every resulting message has `role`, `content` (string, list of text parts, or null) and, if
/// given, `name`, `tool_calls`, `tool_call_id` and `reasoning_content`. The order of roles is
/// checked by the template.
pub(in crate::gateway::api) fn take_messages(fields: &mut Fields) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("messages", MAX_MESSAGES)?.ok_or_else(|| fields.missing("messages"))?;
    checked("messages", list)
}

/// Checks the messages in `list` as [`take_messages`] does; `name` is the field's name in errors.
pub(in crate::gateway::api) fn checked(
    name: &str,
    list: Vec<Value>,
) -> Result<Vec<Value>, ApiError> {
    if !(1..=MAX_MESSAGES).contains(&list.len()) {
        let message = format!("{name} must hold at least one message, and at most {MAX_MESSAGES}");
        return Err(ApiError::invalid(name, message));
    }
    let messages = list
        .into_iter()
        .enumerate()
        .map(|(index, value)| message(Fields::of(format!("{name}[{index}]"), value)?));
    messages.collect()
}

fn message(mut fields: Fields) -> Result<Value, ApiError> {
    let role = fields.string("role", MAX_NAME)?.ok_or_else(|| fields.missing("role"))?;
    let mut out = Map::new();
    out.insert("role".into(), json!(role));
    match role.as_str() {
        "system" | "developer" | "user" => {
            let content = take_content(&mut fields, &role)?;
            out.insert("content".into(), content.ok_or_else(|| fields.missing("content"))?);
        }
        "assistant" => assistant(&mut fields, &mut out)?,
        "tool" => {
            let content = take_content(&mut fields, &role)?;
            out.insert("content".into(), content.ok_or_else(|| fields.missing("content"))?);
            let id = fields.string("tool_call_id", MAX_NAME)?;
            let id = id.ok_or_else(|| fields.missing("tool_call_id"))?;
            out.insert("tool_call_id".into(), json!(id));
        }
        "function" => {
            return Err(ApiError::invalid(
                fields.name("role"),
                "The role \"function\" is deprecated and not supported: use tools and the role \
                 \"tool\".",
            ));
        }
        _ => {
            let expected = "one of \"system\", \"developer\", \"user\", \"assistant\" and \"tool\"";
            return Err(wrong(&fields.name("role"), expected, &json!(role)));
        }
    }
    if let Some(name) = fields.string("name", MAX_NAME)? {
        out.insert("name".into(), json!(name));
    }
    fields.ignore(&NOTES);
    fields.finish()?;
    Ok(Value::Object(out))
}

fn assistant(fields: &mut Fields, out: &mut Map<String, Value>) -> Result<(), ApiError> {
    let calls = fields.list("tool_calls", MAX_CALLS)?.filter(|calls| !calls.is_empty());
    let refusal = fields.string("refusal", ANY_LENGTH)?;
    // Both names are in use; clients send back the field that they received.
    let reasoning = fields.string("reasoning_content", ANY_LENGTH)?;
    let reasoning = reasoning.or(fields.string("reasoning", ANY_LENGTH)?);
    let content = take_content(fields, "assistant")?.or(refusal.map(Value::String));
    if content.is_none() && calls.is_none() && reasoning.is_none() {
        return Err(fields.missing("content"));
    }
    if fields.object("function_call")?.is_some() {
        return Err(ApiError::invalid(
            fields.name("function_call"),
            "function_call is deprecated and not supported: use tool_calls.",
        ));
    }
    out.insert("content".into(), content.unwrap_or(Value::Null));
    if let Some(reasoning) = reasoning {
        out.insert("reasoning_content".into(), json!(reasoning));
    }
    if let Some(calls) = calls {
        let path = fields.name("tool_calls");
        let calls = calls
            .into_iter()
            .enumerate()
            .map(|(index, call)| tool_call(Fields::of(format!("{path}[{index}]"), call)?));
        out.insert("tool_calls".into(), calls.collect::<Result<_, _>>()?);
    }
    Ok(())
}

/// Checks one tool call of the assistant. Arguments may be text (as OpenAI sends them) or an
/// object.
fn tool_call(mut fields: Fields) -> Result<Value, ApiError> {
    let id = fields.string("id", MAX_NAME)?.ok_or_else(|| fields.missing("id"))?;
    let kind = fields.string("type", 64)?.unwrap_or_else(|| "function".into());
    if kind != "function" {
        return Err(wrong(&fields.name("type"), "\"function\"", &json!(kind)));
    }
    // Position of a streamed delta, which some clients keep.
    fields.integer("index", 0..=i64::from(i32::MAX))?;
    let mut function = fields.object("function")?.ok_or_else(|| fields.missing("function"))?;
    let name = function.string("name", MAX_NAME)?.ok_or_else(|| function.missing("name"))?;
    let arguments = match function.take("arguments") {
        None => json!("{}"),
        Some(text @ (Value::String(_) | Value::Object(_))) => text,
        Some(other) => return Err(function.wrong("arguments", "JSON text", &other)),
    };
    function.ignore(&NOTES);
    function.finish()?;
    fields.ignore(&NOTES);
    fields.finish()?;
    Ok(json!({
        "id": id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }))
}

/// Takes `content`: a string, or a list of text parts.
fn take_content(fields: &mut Fields, role: &str) -> Result<Option<Value>, ApiError> {
    let path = fields.name("content");
    match fields.take("content") {
        None => Ok(None),
        Some(text @ Value::String(_)) => Ok(Some(text)),
        Some(Value::Array(parts)) if parts.is_empty() => {
            Err(ApiError::invalid(&path, format!("{path} must not be an empty list")))
        }
        Some(Value::Array(parts)) if parts.len() <= MAX_PARTS => {
            let parts = parts.into_iter().enumerate().map(|(index, part)| {
                text_part(Fields::of(format!("{path}[{index}]"), part)?, role)
            });
            Ok(Some(Value::Array(parts.collect::<Result<_, _>>()?)))
        }
        Some(Value::Array(parts)) => Err(ApiError::invalid(
            &path,
            format!("{path} may have at most {MAX_PARTS} parts, got {}", parts.len()),
        )),
        Some(other) => Err(wrong(&path, "a string or a list of text parts", &other)),
    }
}

fn text_part(mut fields: Fields, role: &str) -> Result<Value, ApiError> {
    let kind = fields.string("type", 64)?.ok_or_else(|| fields.missing("type"))?;
    let key = match kind.as_str() {
        "text" => "text",
        "refusal" if role == "assistant" => "refusal",
        _ => {
            return Err(ApiError::invalid(
                fields.name("type"),
                format!(
                    "{} is {}: this server reads text only, so every part must be of type \"text\".",
                    fields.name("type"),
                    Value::from(kind)
                ),
            ));
        }
    };
    let text = fields.string(key, ANY_LENGTH)?;
    let text = text.ok_or_else(|| fields.missing(key))?;
    fields.ignore(&NOTES);
    fields.finish()?;
    Ok(json!({"type": "text", "text": text}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(messages: Value) -> Result<Vec<Value>, ApiError> {
        let mut fields = Fields::of(String::new(), json!({ "messages": messages })).unwrap();
        take_messages(&mut fields)
    }

    #[test]
    fn conversations_pass_as_they_are() {
        let call = json!({
            "id": "call_1",
            "type": "function",
            "function": {"name": "f", "arguments": "{\"a\":1}"},
        });
        let messages = json!([
            {"role": "system", "content": "s"},
            {"role": "developer", "content": [{"type": "text", "text": "d"}]},
            {"role": "user", "content": "u", "name": "ann"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "a", "reasoning_content": "r"},
            {"role": "user", "content": ""},
        ]);
        assert_eq!(Value::Array(take(messages.clone()).unwrap()), messages);
    }

    #[test]
    fn what_official_clients_replay_passes() {
        // The output of ChatCompletionMessage.model_dump() in the Python client.
        let replayed = json!([{
            "content": "hi", "refusal": null, "role": "assistant", "annotations": [],
            "audio": null, "function_call": null, "tool_calls": null,
        }]);
        assert_eq!(take(replayed).unwrap(), [json!({"role": "assistant", "content": "hi"})]);
    }

    #[test]
    fn what_agents_add_passes() {
        let plain = json!({"role": "assistant", "content": "hi"});
        for (key, value) in [
            ("provider_specific_fields", json!({"refusal": null})),
            ("provider_specific_fields", json!({"citations": ["x"]})),
            ("reasoning_details", json!([{"type": "reasoning.text", "text": "hm"}])),
            ("phase", json!("final_answer")),
            ("annotations", json!([{"type": "url_citation"}])),
            ("whatever", json!({"a": null, "b": {"c": null}})),
        ] {
            let mut message = plain.clone();
            message[key] = value;
            assert_eq!(take(json!([message])).unwrap(), std::slice::from_ref(&plain), "{key}");
        }
        let part = json!({"type": "text", "text": "u", "cache_control": {"type": "ephemeral"}});
        let call = json!({"id": "c", "type": "function", "extra_content": {"google": {}},
            "function": {"name": "f", "arguments": "{}"}});
        let taken = take(json!([
            {"role": "user", "content": [part], "cache_control": {"type": "ephemeral"}},
            {"role": "assistant", "content": null, "tool_calls": [call]},
        ]));
        let taken = taken.unwrap();
        assert_eq!(taken[0]["content"], json!([{"type": "text", "text": "u"}]));
        assert_eq!(taken[1]["tool_calls"][0].get("extra_content"), None);
        // Fields that would change the prompt are refused.
        for (key, value) in [("whatever", json!({"a": 1})), ("prefix", json!(false))] {
            let mut message = plain.clone();
            message[key] = value;
            let error = take(json!([message])).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(&*format!("messages[0].{key}")));
        }
    }

    #[test]
    fn bad_messages_are_named() {
        let cases = [
            (json!(null), "messages"),
            (json!([]), "messages"),
            (json!("hi"), "messages"),
            (json!([1]), "messages[0]"),
            (json!([{}]), "messages[0].role"),
            (json!([{"role": "king", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "function", "content": "x"}]), "messages[0].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "user", "content": null}]), "messages[0].content"),
            (json!([{"role": "user", "content": 1}]), "messages[0].content"),
            (json!([{"role": "user", "content": []}]), "messages[0].content"),
            (json!([{"role": "user", "content": ["x"]}]), "messages[0].content[0]"),
            (
                json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
                "messages[0].content[0].type",
            ),
            (
                json!([{"role": "user", "content": [{"type": "text"}]}]),
                "messages[0].content[0].text",
            ),
            (json!([{"role": "user", "content": "x", "mood": 1}]), "messages[0].mood"),
            (json!([{"role": "assistant"}]), "messages[0].content"),
            (
                json!([{"role": "assistant", "tool_calls": [{"id": "x"}]}]),
                "messages[0].tool_calls[0].function",
            ),
            (
                json!([{"role": "assistant", "tool_calls": [
                    {"id": "x", "function": {"name": "f", "arguments": 1}},
                ]}]),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (json!([{"role": "tool", "content": "x"}]), "messages[0].tool_call_id"),
        ];
        for (messages, param) in cases {
            let error = take(messages.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{messages}: {error}");
        }
        let error =
            take(json!([{"role": "user", "content": [{"type": "image_url"}]}])).unwrap_err();
        assert!(error.message.contains("text only"));
    }
}
