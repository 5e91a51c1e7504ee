//! Compares our rendering with jinja2's, template by template and conversation by conversation.
//!
//! `reference.py` writes the expected text; see its usage. Only the public API is used here.

use std::path::Path;

use ingot::template::{ChatTemplate, RenderInput, TemplateError};
use serde_json::Value;

/// Rows that are not as jinja2's, and why: a template, the beginning of what jinja2 says, a reason.
pub(super) const KNOWN: [(&str, &str, &str); 5] = [
    (
        "meetkai-functionary-medium-v3.1.jinja",
        "",
        "`'…'|safe + x` is markupsafe's addition in jinja2, which HTML-escapes x even without \
         autoescape; we add the text as it is, as the model was trained",
    ),
    (
        "CohereForAI-c4ai-command-r-plus-tool_use.jinja",
        "'NoneType' object is not iterable",
        "a template for conversations with tools, without tools: none iterates as empty",
    ),
    (
        "NousResearch-Hermes-",
        "'NoneType' object is not iterable",
        "a template for conversations with tools, without tools: none iterates as empty",
    ),
    (
        "LFM2.5-8B-A1B.jinja",
        "'NoneType' object is not iterable",
        "a null content iterates as empty",
    ),
    (
        "llama-cpp-deepseek-r1.jinja",
        "Object of type generator is not JSON serializable",
        "`map(…)|tojson` lacks a `|list` in the template; our `map` returns a list",
    ),
];

/// One row that is not as expected.
#[derive(Debug)]
pub(super) struct Difference {
    pub template: String,
    pub conversation: String,
    pub expected: String,
    pub found: String,
}

/// What the comparison found.
#[derive(Debug, Default)]
pub(super) struct Report {
    pub templates: usize,
    pub rows: usize,
    /// jinja2 renders and we render the same text.
    pub equal: usize,
    /// jinja2 raises and so do we.
    pub both_raise: usize,
    /// Of these, `raise_exception` with the same message.
    pub same_refusal: usize,
    /// jinja2 renders; we render something else or raise.
    pub different: Vec<Difference>,
    /// jinja2 raises; we render.
    pub lenient: Vec<Difference>,
    /// Conversations jinja2 cannot render as they are and `render` adapts.
    pub rescued: usize,
    /// `render` departs from `render_exact` although that one renders.
    pub adapted: Vec<(String, String)>,
}

impl Report {
    /// The rows that differ for no reason in [`KNOWN`].
    pub(super) fn unexplained(&self) -> Vec<&Difference> {
        let known = |row: &&Difference| {
            KNOWN.iter().any(|(template, says, _)| {
                row.template.starts_with(template) && row.expected.contains(says)
            })
        };
        self.different.iter().chain(&self.lenient).filter(|row| !known(row)).collect()
    }
}

/// Renders every conversation of `conversations_json` with every template of `reference_json`.
pub(super) fn check(
    templates: &[&Path],
    conversations_json: &Path,
    reference_json: &Path,
) -> Report {
    let read = |path: &Path| -> Value {
        let text = std::fs::read_to_string(path).expect("the file is readable");
        serde_json::from_str(&text).expect("the file is JSON")
    };
    let (spec, reference) = (read(conversations_json), read(reference_json));
    let (bos, eos) = (spec["bos"].as_str().unwrap_or(""), spec["eos"].as_str().unwrap_or(""));
    let mut report = Report::default();
    for (name, rows) in reference.as_object().expect("the reference is an object") {
        let source = templates.iter().find_map(|dir| std::fs::read_to_string(dir.join(name)).ok());
        let source = source.unwrap_or_else(|| panic!("{name} is in a templates folder"));
        report.templates += 1;
        let template = ChatTemplate::compile(&source, None, bos, eos);
        for conversation in spec["conversations"].as_array().into_iter().flatten() {
            let conversation_name = conversation["name"].as_str().unwrap_or_default();
            let expected = match rows.get("*") {
                Some(error) => error,
                None => &rows[conversation_name],
            };
            let input = input(conversation, &spec["now"]);
            let (found, adapted) = match &template {
                Ok(template) => (template.render_exact(&input), template.render(&input)),
                Err(error) => (Err(error.clone()), Err(error.clone())),
            };
            compare(&mut report, (name, conversation_name), expected, found, adapted);
        }
    }
    report
}

fn input(conversation: &Value, now: &Value) -> RenderInput {
    let list = |value: &Value| value.as_array().cloned();
    RenderInput {
        messages: list(&conversation["messages"]).unwrap_or_default(),
        tools: list(&conversation["tools"]),
        add_generation_prompt: conversation["add_generation_prompt"].as_bool().unwrap_or(true),
        continue_final_message: false,
        chat_template_kwargs: conversation["kwargs"].as_object().cloned().unwrap_or_default(),
        now: now.as_i64(),
    }
}

fn compare(
    report: &mut Report,
    (template, conversation): (&str, &str),
    expected: &Value,
    found: Result<String, TemplateError>,
    adapted: Result<String, TemplateError>,
) {
    report.rows += 1;
    let difference = |found: &Result<String, TemplateError>| Difference {
        template: template.to_owned(),
        conversation: conversation.to_owned(),
        expected: expected["ok"].as_str().map_or_else(|| expected.to_string(), str::to_owned),
        found: found.as_ref().map_or_else(|error| format!("{error:?}"), Clone::clone),
    };
    match (expected["ok"].as_str(), &found) {
        (Some(expected), Ok(text)) if text == expected => report.equal += 1,
        (Some(_), _) => report.different.push(difference(&found)),
        (None, Ok(_)) => report.lenient.push(difference(&found)),
        (None, Err(error)) => {
            report.both_raise += 1;
            if let TemplateError::Refused(message) = error {
                report.same_refusal += usize::from(expected["message"] == message.as_str());
            }
        }
    }
    match (&found, &adapted) {
        (Err(_), Ok(_)) => report.rescued += 1,
        (Ok(exact), adapted) if adapted.as_ref() != Ok(exact) => {
            report.adapted.push((template.to_owned(), conversation.to_owned()));
        }
        _ => {}
    }
}
