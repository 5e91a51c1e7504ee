//! Adaptation of conversations to the features of a template.

use serde_json::{Map, Value, json};

use super::{Caps, RenderInput, integers};

/// Offers the tools to a model whose template ignores them, in the words of Hermes.
const TOOL_INSTRUCTION: &str = "# Tools\n\n\
You may call one or more functions to assist with the user query.\n\n\
You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n";
const TOOL_FORMAT: &str = "\n</tools>\n\n\
For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:\n<tool_call>\n\
{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>";

/// Adaptation for all templates: arguments become objects.
pub(super) fn plain(input: &RenderInput) -> RenderInput {
    let mut input = input.clone();
    for message in &mut input.messages {
        each_arguments(message, parse_arguments);
    }
    input
}

/// [`plain`], and the adaptations for missing features; without `native_tools` tools become text.
pub(super) fn adapt(caps: &Caps, native_tools: bool, input: &RenderInput) -> RenderInput {
    let mut input = plain(input);
    if !caps.content_parts {
        input.messages.iter_mut().for_each(join_parts);
    }
    if !caps.null_content {
        input = without_nulls(&input).unwrap_or(input);
    }
    if !caps.developer {
        for message in &mut input.messages {
            if message["role"] == "developer" {
                message["role"] = json!("system");
            }
        }
    }
    input.tools.iter_mut().flatten().for_each(complete_tool);
    if !native_tools && let Some(tools) = input.tools.take_if(|tools| !tools.is_empty()) {
        add_to_system(&mut input.messages, &describe_tools(&tools));
    }
    if !(native_tools && caps.tool_calls) {
        tool_messages_as_text(&mut input.messages);
    } else if caps.string_arguments {
        for message in &mut input.messages {
            each_arguments(message, |arguments| {
                if !arguments.is_string() {
                    *arguments = Value::String(integers::to_text(arguments));
                }
            });
        }
    }
    if caps.short_ids {
        for message in &mut input.messages {
            shorten_ids(message);
        }
    }
    if !caps.system {
        merge_system(&mut input.messages);
    }
    if caps.typed_content {
        for message in &mut input.messages {
            if let Some(text) = message["content"].as_str() {
                message["content"] = json!([{"type": "text", "text": text}]);
            }
        }
    }
    input
}

/// Replaces null or absent content by empty strings; `None` if there is no such content.
pub(super) fn without_nulls(input: &RenderInput) -> Option<RenderInput> {
    let is_null = |message: &Value| message.get("content").is_none_or(Value::is_null);
    if !input.messages.iter().any(is_null) {
        return None;
    }
    let mut input = input.clone();
    for message in input.messages.iter_mut().filter(|message| is_null(message)) {
        if let Some(message) = message.as_object_mut() {
            message.insert("content".into(), json!(""));
        }
    }
    Some(input)
}

/// Adds neutral values for fields that OpenAI lets clients omit from a tool although templates read
/// them. The values are those of transformers' function schemas.
fn complete_tool(tool: &mut Value) {
    let Some(function) = tool.get_mut("function").and_then(Value::as_object_mut) else { return };
    if function.get("description").is_none_or(Value::is_null) {
        function.insert("description".into(), json!(""));
    }
    let parameters = function.entry("parameters").or_insert(Value::Null);
    if parameters.is_null() {
        *parameters = json!({});
    }
    // Other schemas (`$ref`, `anyOf`) are left unchanged.
    if let Value::Object(schema) = parameters
        && schema.keys().all(|key| {
            matches!(
                key.as_str(),
                "type" | "required" | "properties" | "description" | "additionalProperties"
            )
        })
    {
        schema.entry("type").or_insert(json!("object"));
        schema.entry("properties").or_insert(json!({}));
        if let Some(Value::Object(properties)) = schema.get_mut("properties") {
            for property in properties.values_mut().filter_map(Value::as_object_mut) {
                property.entry("description").or_insert(json!(""));
            }
        }
    }
}

/// Moves content beside tool calls into a message of its own before them, for templates that
/// render either one or the other; `None` if there is no such message.
pub(super) fn content_apart(input: &RenderInput) -> Option<RenderInput> {
    let both = |message: &Value| {
        let calls = message["tool_calls"].as_array().is_some_and(|calls| !calls.is_empty());
        calls && !(message["content"].is_null() || message["content"] == "")
    };
    if !input.messages.iter().any(both) {
        return None;
    }
    let mut messages = Vec::with_capacity(input.messages.len() + 1);
    for message in &input.messages {
        let mut calls = message.clone();
        if both(message) {
            let mut text = message.clone();
            if let (Some(text), Some(calls)) = (text.as_object_mut(), calls.as_object_mut()) {
                text.remove("tool_calls");
                calls.insert("content".into(), Value::Null);
                calls.remove("reasoning_content");
            }
            messages.push(text);
        }
        messages.push(calls);
    }
    Some(RenderInput { messages, ..input.clone() })
}

/// Joins a list of text parts with line breaks, as llama.cpp and vLLM do.
fn join_parts(message: &mut Value) {
    let Some(parts) = message.get("content").and_then(Value::as_array) else { return };
    let texts: Option<Vec<&str>> =
        parts.iter().map(|part| part.as_str().or_else(|| part["text"].as_str())).collect();
    if let Some(texts) = texts {
        message["content"] = Value::String(texts.join("\n"));
    }
}

fn parse_arguments(arguments: &mut Value) {
    let parsed = arguments.as_str().and_then(|text| integers::parse(text).ok());
    if let Some(parsed @ Value::Object(_)) = parsed {
        *arguments = parsed;
    }
}

fn each_arguments(message: &mut Value, mut change: impl FnMut(&mut Value)) {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        if let Some(arguments) = call.get_mut("function").and_then(|f| f.get_mut("arguments")) {
            change(arguments);
        }
    }
}

/// Cuts ids to their last nine alphanumerics; the ids that Ingot generates are random there.
fn shorten_ids(message: &mut Value) {
    let shorten = |id: &mut Value| {
        let Some(text) = id.as_str() else { return };
        let kept: Vec<char> = text.chars().filter(char::is_ascii_alphanumeric).collect();
        let start = kept.len().saturating_sub(9);
        let short: String = kept[start..].iter().collect();
        *id = Value::String(format!("{short:0>9}"));
    };
    if let Some(id) = message.get_mut("tool_call_id") {
        shorten(id);
    }
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    calls.into_iter().flatten().filter_map(|call| call.get_mut("id")).for_each(shorten);
}

fn describe_tools(tools: &[Value]) -> String {
    let lines: Vec<String> = tools.iter().map(Value::to_string).collect();
    format!("{TOOL_INSTRUCTION}{}{TOOL_FORMAT}", lines.join("\n"))
}

/// Appends text to the system message, or adds one.
fn add_to_system(messages: &mut Vec<Value>, text: &str) {
    match messages.first_mut().filter(|message| message["role"] == "system") {
        Some(system) => {
            let before = system["content"].as_str().unwrap_or_default().to_owned();
            system["content"] = Value::String(join_nonempty(&before, text));
        }
        None => messages.insert(0, json!({"role": "system", "content": text})),
    }
}

fn join_nonempty(a: &str, b: &str) -> String {
    if a.is_empty() || b.is_empty() { format!("{a}{b}") } else { format!("{a}\n\n{b}") }
}

/// Rewrites tool calls as text of the assistant and tool results as text of the user, and joins
/// adjacent messages of one role (many templates require alternating roles).
fn tool_messages_as_text(messages: &mut Vec<Value>) {
    let has_tools = |m: &Value| m["role"] == "tool" || m.get("tool_calls").is_some();
    if !messages.iter().any(has_tools) {
        return;
    }
    let mut out: Vec<Value> = Vec::with_capacity(messages.len());
    let mut joinable = false;
    for mut message in messages.drain(..) {
        let text = message["content"].as_str().unwrap_or_default().to_owned();
        let is_result = message["role"] == "tool";
        if is_result {
            let text = format!("<tool_response>\n{text}\n</tool_response>");
            message = json!({"role": "user", "content": text});
        } else if let Some(calls) = message.as_object_mut().and_then(|m| m.remove("tool_calls")) {
            let calls = calls.as_array().map(Vec::as_slice).unwrap_or_default();
            let calls: Vec<String> = calls.iter().map(call_text).collect();
            message["content"] = Value::String(join_lines(&text, &calls.join("\n")));
        }
        match out.last_mut().filter(|last| joinable && last["role"] == message["role"]) {
            Some(last) => {
                let before = last["content"].as_str().unwrap_or_default();
                let after = message["content"].as_str().unwrap_or_default();
                last["content"] = Value::String(join_lines(before, after));
            }
            None => out.push(message),
        }
        joinable = is_result;
    }
    *messages = out;
}

fn join_lines(a: &str, b: &str) -> String {
    if a.is_empty() || b.is_empty() { format!("{a}{b}") } else { format!("{a}\n{b}") }
}

fn call_text(call: &Value) -> String {
    let mut text = Map::new();
    text.insert("name".into(), call["function"]["name"].clone());
    text.insert("arguments".into(), call["function"]["arguments"].clone());
    format!("<tool_call>\n{}\n</tool_call>", integers::to_text(&Value::Object(text)))
}

/// Moves the text of system messages to the front of the next user message, as llama-server does: with a
/// line break between them.
fn merge_system(messages: &mut Vec<Value>) {
    let mut pending = String::new();
    let mut out: Vec<Value> = Vec::with_capacity(messages.len());
    for mut message in messages.drain(..) {
        let text = message["content"].as_str().unwrap_or_default();
        if message["role"] == "system" {
            pending = join_lines(&pending, text);
            continue;
        }
        if message["role"] == "user" && !pending.is_empty() {
            message["content"] = Value::String(join_lines(&pending, text));
            pending.clear();
        }
        out.push(message);
    }
    if !pending.is_empty() {
        out.push(json!({"role": "user", "content": pending}));
    }
    *messages = out;
}
