//! Tests of conversations whose template renders a completion differently once another user message
//! follows.

use super::{Bytes, chat};
use crate::dataset::{Example, Rendering, render, render_all};
use crate::job::DataReport;
use crate::template::{CHATML, ChatTemplate};
use crate::train::data::{Encoder, Prepared, prepare, prepare_pairs};
use serde_json::{Value, json};
use std::sync::Arc;

/// As Qwen 3's template: the last completion has a reasoning block, which may be empty; earlier
/// ones have none.
const QWEN3: &str = "{%- set ns = namespace(last = -1) -%}\
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}\
{%- endif -%}{%- endfor -%}\
{%- for message in messages -%}\
{%- if message.role == 'assistant' -%}\
{%- set content = message.content or '' -%}{%- set reasoning = message.reasoning_content or '' -%}\
{%- if '</think>' in content -%}\
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}\
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}\
{{- '<|im_start|>assistant\\n' -}}\
{%- if loop.index0 > ns.last -%}{{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' -}}{%- endif -%}\
{{- content + '<|im_end|>\\n' -}}\
{%- else -%}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}\
{%- endif -%}{%- endfor -%}\
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}PROMPT{%- endif -%}";

/// The Qwen 3 template with this end of the prompt.
fn qwen3(prompt: &str) -> ChatTemplate {
    ChatTemplate::compile(&QWEN3.replace("PROMPT", prompt), None, "", "<|im_end|>").unwrap()
}

/// As DeepSeek R1's template: no rendered completion has a reasoning block, and the prompt opens
/// one.
fn r1(prompt: &str) -> ChatTemplate {
    let source = format!(
        "{{%- for message in messages -%}}{{%- set content = message.content.split('</think>')[-1] -%}}\
         {{{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}}}{{%- endfor -%}}\
         {{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\\n{prompt}' -}}}}{{%- endif -%}}"
    );
    ChatTemplate::compile(&source, None, "", "<|im_end|>").unwrap()
}

fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// The text and the trained text of each sequence.
fn sequences(
    messages: &[Value],
    template: &ChatTemplate,
) -> Result<Vec<(String, Vec<String>)>, String> {
    let example = Example::Chat(chat(json!({"messages": messages})));
    let rendered = render_all(&example, Rendering::plain(template))?;
    let each = rendered.into_iter().map(|rendered| {
        let trained = rendered.pieces.iter().filter(|piece| piece.trained);
        let trained = trained.map(|piece| piece.text.clone()).collect();
        (rendered.pieces.into_iter().map(|piece| piece.text).collect(), trained)
    });
    Ok(each.collect())
}

#[test]
fn each_answer_is_trained_behind_its_own_prompt() {
    let two = [
        message("user", "U"),
        message("assistant", "A"),
        message("user", "V"),
        message("assistant", "B"),
    ];
    let empty = "<think>\n\n</think>\n\n";
    let found = sequences(&two, &qwen3("")).unwrap();
    let first = format!("<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n{empty}A<|im_end|>");
    let second = format!(
        "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV\
         <|im_end|>\n<|im_start|>assistant\n{empty}B<|im_end|>"
    );
    let trained = |answer: &str| vec![format!("{empty}{answer}<|im_end|>")];
    let expected = [(first.clone(), trained("A")), (second.clone(), trained("B"))];
    assert_eq!(found, expected);
    // The same text, where the prompt contains the empty block or its beginning.
    let found = sequences(&two, &qwen3("{{- '<think>\\n\\n</think>\\n\\n' -}}")).unwrap();
    let plain = |answer: &str| vec![format!("{answer}<|im_end|>")];
    assert_eq!(found, [(first.clone(), plain("A")), (second.clone(), plain("B"))]);
    let found = sequences(&two, &qwen3("{{- '<think>\\n' -}}")).unwrap();
    let closed = |answer: &str| vec![format!("\n</think>\n\n{answer}<|im_end|>")];
    assert_eq!(found, [(first, closed("A")), (second.clone(), closed("B"))]);
    // Only the last completion is trained: one sequence.
    let mut last = two.clone();
    last[1]["weight"] = json!(0);
    assert_eq!(sequences(&last, &qwen3("")).unwrap(), [(second, trained("B"))]);
    // With a template that does not change earlier completions, both are in one sequence.
    let chatml = ChatTemplate::compile(CHATML, None, "", "").unwrap();
    let found = sequences(&two, &chatml).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].1, ["A<|im_end|>", "B<|im_end|>"]);
    // Consecutive completions without a user message between them share a sequence.
    let row = [two[0].clone(), two[1].clone(), two[3].clone(), two[2].clone(), two[3].clone()];
    let found = sequences(&row, &qwen3("")).unwrap();
    assert_eq!(found.iter().map(|(_, trained)| trained.len()).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn reasoning_is_trained_or_refused() {
    let with = |content: &str, reasoning: Option<&str>| {
        let mut answer = message("assistant", content);
        answer["reasoning_content"] = json!(reasoning);
        [message("user", "U"), answer]
    };
    let trained = |messages: &[Value], template: &ChatTemplate| {
        sequences(messages, template).map(|found| found[0].1.concat())
    };
    let whole = "<think>\nR\n</think>\n\nA<|im_end|>";
    assert_eq!(trained(&with("A", Some("R")), &qwen3("")).unwrap(), whole);
    assert_eq!(trained(&with("<think>\nR\n</think>\n\nA", None), &qwen3("")).unwrap(), whole);
    // The prompt opens a reasoning block that the completion closes.
    for prompt in ["<think>\\n", "<think>"] {
        let line = if prompt.len() > 7 { "" } else { "\n" };
        let open = format!("{line}R\n</think>\n\nA<|im_end|>");
        assert_eq!(trained(&with("A", Some("R")), &r1(prompt)).unwrap(), open);
        assert_eq!(trained(&with("<think>R</think>A", None), &r1(prompt)).unwrap(), open);
        let empty = format!("{line}\n</think>\n\nA<|im_end|>");
        assert_eq!(trained(&with("A", None), &r1(prompt)).unwrap(), empty);
    }
    // An empty block in the prompt means that there is no reasoning.
    let none = r1("<think>\\n\\n</think>\\n\\n");
    assert_eq!(trained(&with("A", None), &none).unwrap(), "A<|im_end|>");
    let error = trained(&with("A", Some("R")), &none).unwrap_err();
    assert!(error.contains("messages[1]") && error.contains("`reasoning_content`"), "{error}");
    let chatml = ChatTemplate::compile(CHATML, None, "", "").unwrap();
    let error = trained(&with("A", Some("R")), &chatml).unwrap_err();
    assert!(error.contains("`reasoning_content`"), "{error}");
    assert_eq!(trained(&with("A", None), &chatml).unwrap(), "A<|im_end|>");
    // The reasoning of a completion that is not trained is rendered as the template does it.
    let mut earlier = with("A", Some("R")).to_vec();
    earlier[1]["weight"] = json!(0);
    earlier.extend([message("user", "V"), message("assistant", "B")]);
    assert_eq!(trained(&earlier, &chatml).unwrap(), "B<|im_end|>");
    // A template that omits the text of a message with a tool call.
    let source = "{%- for m in messages -%}{{ m.role }}: {% if m.tool_calls %}call{% else %}\
                  {{ m.content }}{% endif %};{%- endfor -%}\
                  {%- if add_generation_prompt -%}assistant: {% endif -%}";
    let template = ChatTemplate::compile(source, None, "", "").unwrap();
    let error = trained(&with("<|none|>", None), &r1("</s>")).unwrap_err();
    assert!(error.contains("otherwise than it prompts"), "{error}");
    assert_eq!(trained(&with("A", None), &template).unwrap(), "A;");
}

fn prepared(lines: &[Value], template: ChatTemplate, max: usize) -> (Prepared, DataReport) {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("data.jsonl"), folder.path().join("data.bin"));
    let lines: Vec<_> = lines.iter().map(Value::to_string).collect();
    std::fs::write(&source, lines.join("\n")).unwrap();
    let encoder = Encoder::new(Arc::new(Bytes::new()), Arc::new(template), 0, false);
    prepare(&source, &encoder, max, &cache).unwrap()
}

#[test]
fn split_conversations_are_one_example_in_reports() {
    let (user, answer) = (message("user", "U"), message("assistant", "A"));
    let two = json!({"messages": [user, answer, user, answer]});
    let one = json!({"messages": [user, answer]});
    let (data, report) = prepared(&[two.clone(), one.clone()], qwen3(""), 999);
    assert_eq!((data.len(), report.examples, report.dropped), (3, 2, 0));
    assert_eq!(report.notes.len(), 1);
    assert!(report.notes[0].contains("1 conversations are trained as 2 sequences"), "{report:?}");
    // The longer sequence does not fit, and is truncated before its completion.
    let short = data.length(2);
    let (data, report) = prepared(std::slice::from_ref(&two), qwen3(""), short);
    assert_eq!((data.len(), report.truncated, report.dropped), (1, 1, 0));
    let chatml = ChatTemplate::compile(CHATML, None, "", "").unwrap();
    let (data, report) = prepared(&[two, one], chatml, 999);
    assert_eq!((data.len(), report.examples, report.notes.len()), (2, 2, 0));
}

#[test]
fn answers_without_an_end_of_turn_are_noted() {
    let line = json!({"messages": [message("user", "U"), message("assistant", "A")]});
    let source = |end: &str| {
        format!(
            "{{%- for m in messages -%}}{{{{ m.role }}}}: {{{{ m.content }}}}{end}\n{{% endfor -%}}\
             {{%- if add_generation_prompt -%}}assistant: {{% endif -%}}"
        )
    };
    let template = |end: &str| ChatTemplate::compile(&source(end), None, "", "").unwrap();
    let (_, report) = prepared(&[line.clone(), line.clone()], template(""), 99);
    assert_eq!(report.notes.len(), 1);
    assert!(report.notes[0].contains("behind 2 of 2 trained answers"), "{report:?}");
    let (_, report) = prepared(&[line], template("<|im_end|>"), 99);
    assert_eq!(report.notes, [""; 0]);
    // Plain texts end with EOS.
    let (_, report) = prepared(&[json!({"prompt": "a", "completion": "b"})], template(""), 99);
    assert_eq!(report.notes, [""; 0]);
}

#[test]
fn pairs_and_scores_are_one_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let (source, cache) = (folder.path().join("data.jsonl"), folder.path().join("data.bin"));
    let template = Arc::new(qwen3(""));
    let encoder = Encoder::new(Arc::new(Bytes::new()), template.clone(), 0, false);
    let (user, answer) = (message("user", "U"), message("assistant", "A"));
    let pair = |chosen: &[&Value]| {
        json!({"prompt": [user], "chosen": chosen, "rejected": "B"}).to_string()
    };
    std::fs::write(&source, pair(&[&answer])).unwrap();
    assert_eq!(prepare_pairs(&source, &encoder, 999, &cache).unwrap().0.len(), 1);
    std::fs::write(&source, pair(&[&answer, &user, &answer])).unwrap();
    let error = prepare_pairs(&source, &encoder, 999, &cache).err().unwrap().to_string();
    assert!(
        error.contains("line 1: the chosen answer") && error.contains("not one text"),
        "{error}"
    );
    let mut last = chat(json!({"messages": [user, answer, user, answer]}));
    last.trained[1] = false;
    assert_eq!(render(&Example::Chat(last), Rendering::plain(&template)).unwrap().pieces.len(), 2);
}

/// The templates that llama.cpp ships, from `scripts/templates.sh`.
#[test]
fn real_templates_train_plain_chats() {
    let Some(folder) = std::env::var_os("INGOT_TEST_TEMPLATES") else {
        eprintln!("SKIPPED: run scripts/templates.sh and set INGOT_TEST_TEMPLATES to its folder");
        return;
    };
    let talk = ["Where?", "Here.", "When?", "Now."];
    let roles = ["user", "assistant", "user", "assistant"];
    let talk: Vec<_> = roles.iter().zip(talk).map(|(role, text)| message(role, text)).collect();
    let (mut trained, mut refused) = (0, Vec::new());
    for file in std::fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "jinja") {
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap();
        let template = ChatTemplate::compile(&source, None, "<s>", "</s>").unwrap();
        match sequences(&talk, &template) {
            Ok(found) => {
                let answers: Vec<_> = found.iter().flat_map(|(_, trained)| trained).collect();
                assert_eq!(answers.len(), 2, "{}", path.display());
                assert!(answers[0].contains("Here.") && answers[1].contains("Now."), "{answers:?}");
                trained += 1;
            }
            Err(why) => refused.push(format!("{}: {why}", path.display())),
        }
    }
    assert!(trained >= 50 && refused.len() <= 6, "{trained} trained, refused: {refused:#?}");
}
