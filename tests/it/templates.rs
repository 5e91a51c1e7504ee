//! Every chat template that llama.cpp ships, compared with jinja2's rendering.
//!
//! `scripts/templates.sh` fetches the templates and writes jinja2's output; `INGOT_TEST_TEMPLATES`
//! names the folder.

#[path = "../templates/check.rs"]
mod check;

use check::check;
use ingot::template::{ChatTemplate, ControlTokens, RenderInput, TemplateError};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn folder() -> Option<PathBuf> {
    let folder = std::env::var_os("INGOT_TEST_TEMPLATES").map(PathBuf::from);
    if folder.is_none() {
        let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
        assert!(!ci, "INGOT_TEST_TEMPLATES must name the folder that scripts/templates.sh makes");
        eprintln!("SKIPPED: run scripts/templates.sh and set INGOT_TEST_TEMPLATES to its folder");
    }
    folder
}

/// All templates, by name.
fn templates(folder: &Path) -> Vec<(String, ChatTemplate)> {
    let files = std::fs::read_dir(folder).expect("the folder is readable").flatten();
    let mut templates: Vec<_> = files
        .filter(|file| file.path().extension().is_some_and(|end| end == "jinja"))
        .filter_map(|file| {
            let source = std::fs::read_to_string(file.path()).expect("a template is text");
            let template = ChatTemplate::compile(&source, None, "<s>", "</s>").ok()?;
            Some((file.file_name().to_string_lossy().into_owned(), template))
        })
        .collect();
    templates.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(templates.len() >= 50, "some fifty templates, not {}", templates.len());
    templates
}

fn input(messages: Value) -> RenderInput {
    RenderInput {
        messages: messages.as_array().cloned().expect("a list"),
        add_generation_prompt: true,
        now: Some(1_767_369_600),
        ..RenderInput::default()
    }
}

#[test]
fn texts_are_rendered_or_the_message_is_named() {
    let Some(folder) = folder() else { return };
    let user = |text: &str| json!({"role": "user", "content": text});
    let assistant = json!({"role": "assistant", "content": "Answer-A"});
    for (name, template) in templates(&folder) {
        let plain = template.render(&input(json!([user("Question-Q")])));
        if plain.is_err() {
            // The template needs tools or other inputs.
            continue;
        }
        let role = |role: &str| json!({"role": role, "content": "Instruction-I"});
        let system = template.render(&input(json!([role("system"), user("Question-Q")])));
        let developer = template.render(&input(json!([role("developer"), user("Question-Q")])));
        if let Ok(system) = &system {
            assert!(system.contains("Instruction-I") && system.contains("Question-Q"), "{name}");
            let developer = developer.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(developer.contains("Instruction-I"), "{name}: {developer}");
        }
        let middle = json!([user("Q1"), assistant, role("system"), user("Q2")]);
        match template.render(&input(middle)) {
            Ok(prompt) => assert!(prompt.contains("Instruction-I"), "{name}: {prompt}"),
            Err(TemplateError::Dropped { index, .. }) => assert_eq!(index, 2, "{name}"),
            Err(TemplateError::Refused(_) | TemplateError::Failed(_)) => {}
            Err(error) => panic!("{name}: {error}"),
        }
    }
}

#[test]
fn final_messages_are_continued_where_their_text_ends() {
    let Some(folder) = folder() else { return };
    const TEXTS: [&str; 17] = [
        "The answer",
        "end",
        "im",
        ">",
        "n",
        "|",
        "<",
        "s",
        "a",
        "user",
        "assistant",
        "model",
        "\n-",
        "1 ",
        "start",
        "think",
        "}",
    ];
    let mut continued = 0;
    for (name, template) in templates(&folder) {
        let conversation = |text: &str| {
            input(json!([
                {"role": "user", "content": "Go on > end | n"},
                {"role": "assistant", "content": text},
            ]))
        };
        if template.render(&conversation("A text")).is_err() {
            continue;
        }
        for text in TEXTS {
            let input = RenderInput { continue_final_message: true, ..conversation(text) };
            let prompt = template.render(&input).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(prompt.ends_with(text.trim_start()), "{name}, {text:?}: {prompt:?}");
            let open = RenderInput { continue_final_message: true, ..conversation("") };
            let open = template.render(&open).unwrap_or_else(|error| panic!("{name}: {error}"));
            // The same turn without its text.
            let before = prompt[..prompt.len() - text.trim_start().len()].trim_end();
            assert_eq!(open.trim_end(), before, "{name}, {text:?}");
            continued += 1;
        }
    }
    assert!(continued >= 40 * TEXTS.len(), "most templates can go on: {continued}");
}

#[test]
fn no_template_lets_users_spell_control_tokens() {
    let Some(folder) = folder() else { return };
    let spelled =
        ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "[/INST]", "<|END_OF_TURN_TOKEN|>"];
    let tokens = ControlTokens::new(spelled);
    for (name, template) in templates(&folder) {
        let text = spelled.map(|token| format!("a{token}b")).concat();
        let mut input = input(json!([{"role": "user", "content": text}]));
        input.tools = Some(vec![json!({"type": "function", "function": {
            "name": "f", "description": text, "parameters": {"type": "object", "properties": {
                "p": {"type": "string", "description": text, "enum": [text]},
            }},
        }})]);
        let Ok(prompt) = template.render_guarded(&input, Some(&tokens)) else { continue };
        assert_eq!(prompt.text, template.render(&input).expect("it renders"), "{name}");
        for token in spelled {
            let whole = format!("a{token}b");
            for (at, _) in prompt.text.match_indices(&whole) {
                let inside = at + 2..at + 1 + token.len();
                let broken = prompt.barriers.iter().any(|barrier| inside.contains(barrier));
                assert!(broken, "{name}: {token} at {at}");
            }
        }
    }
}

#[test]
fn templates_render_as_jinja2_does() {
    let Some(folder) = folder() else { return };
    let conversations =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/templates/conversations.json");
    let report = check(&[&folder], &conversations, &folder.join("reference.json"));
    eprintln!(
        "{} templates, {} rows: {} equal, {} refused by both ({} with the same message), {} \
         different, {} lenient, {} rescued",
        report.templates,
        report.rows,
        report.equal,
        report.both_raise,
        report.same_refusal,
        report.different.len(),
        report.lenient.len(),
        report.rescued,
    );
    assert!(report.templates >= 50, "some fifty templates, not {}", report.templates);
    assert!(report.equal >= 1000, "most rows are equal: {}", report.equal);
    for difference in report.unexplained() {
        let check::Difference { template, conversation, expected, found } = difference;
        eprintln!("{template}, {conversation}:\n expected {expected:?}\n found    {found:?}");
    }
    assert!(report.unexplained().is_empty(), "every difference is explained in check.rs");
}

/// One case of llama.cpp's own test of chat templates.
#[derive(serde::Deserialize)]
struct Case {
    name: String,
    template: String,
    bos: String,
    eos: String,
    messages: Vec<Value>,
    expected: String,
}

#[test]
fn templates_render_as_llama_cpp_expects() {
    let Some(folder) = folder() else { return };
    let text =
        std::fs::read_to_string(folder.join("llama_cases.json")).expect("templates.sh made it");
    let cases: Vec<Case> = serde_json::from_str(&text).expect("a list of cases");
    assert!(cases.len() >= 30, "{}", cases.len());
    let mut wrong = Vec::new();
    for case in cases {
        let template = ChatTemplate::compile(&case.template, None, &case.bos, &case.eos)
            .unwrap_or_else(|error| panic!("{}: {error}", case.name));
        let input = RenderInput {
            messages: case.messages,
            add_generation_prompt: true,
            ..RenderInput::default()
        };
        let found = template.render(&input).unwrap_or_else(|error| format!("error: {error}"));
        // llama.cpp takes one BOS away, which its tokenizer adds.
        let without = |text: &str| text.strip_prefix(&case.bos).unwrap_or(text).to_owned();
        if without(&found) != without(&case.expected) {
            wrong.push(format!(
                "{}:\n expected {:?}\n found    {found:?}",
                case.name, case.expected
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
