//! Tests of the output parser: examples, then all chunkings.

use proptest::prelude::*;

use super::*;

fn think(starts_open: bool) -> Option<ReasoningFormat> {
    Some(ReasoningFormat { open: "<think>".into(), close: "</think>".into(), starts_open })
}

fn parse(family: ToolFamily, text: &str) -> ParsedMessage {
    OutputParser::new(Some(family), None, true, true, CallIds::new(1)).parse(text)
}

fn calls(message: &ParsedMessage) -> Vec<(&str, &str)> {
    message.tool_calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect()
}

#[test]
fn reasoning_is_split_and_trimmed() {
    for (starts_open, text, reasoning, content) in [
        (false, "<think>\nhm\n</think>\n\nHello \n", "hm", "Hello \n"),
        (true, "\nhm </think>\nHello", "hm", "Hello"),
        (true, "<think>\nhm</think>Hello", "hm", "Hello"),
        (true, "never closed </thin", "never closed </thin", ""),
        (false, " \nplain <think>", "", " \nplain <think>"),
        (false, "<think></think>x", "", "x"),
        (false, "<thin", "", "<thin"),
    ] {
        let parser = OutputParser::new(None, think(starts_open), true, true, CallIds::new(1));
        let message = parser.parse(text);
        assert_eq!((message.reasoning.as_str(), message.content.as_str()), (reasoning, content));
    }
}

#[test]
fn hermes_calls() {
    let message = parse(
        ToolFamily::Hermes,
        "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"\", \"b\": [1]}}\n\
         </tool_call>\n<tool_call>{\"arguments\": {}, \"name\": \"g\"}</tool_call>\n",
    );
    assert_eq!(message.content, "Let me see.");
    assert_eq!(calls(&message), [("f", "{\"a\": \"}\\\"\", \"b\": [1]}"), ("g", "{}")]);
    let text = "<tool_call>{\"name\":\"f\",\"arguments\":\"{\\\"a\\\":1}\"}</tool_call>";
    assert_eq!(calls(&parse(ToolFamily::Hermes, text)), [("f", "{\"a\":1}")]);
    let text = "<tool_call>{\"name\":\"f\"}";
    assert_eq!(calls(&parse(ToolFamily::Hermes, text)), [("f", "{}")]);
}

#[test]
fn llama_calls() {
    for text in [
        "{\"name\": \"f\", \"parameters\": {\"a\": 1}}",
        "\n<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": 1}}",
    ] {
        assert_eq!(calls(&parse(ToolFamily::Llama3, text)), [("f", "{\"a\": 1}")]);
    }
    let text = "{\"name\":\"f\",\"parameters\":{}}; {\"name\":\"g\",\"parameters\":{}}";
    let message = parse(ToolFamily::Llama3, text);
    assert_eq!(calls(&message), [("f", "{}"), ("g", "{}")]);
    assert_eq!(message.content, "");
}

#[test]
fn mistral_calls() {
    for text in [
        "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": 1}, \"id\": \"x\"}, {\"name\":\"g\",\"arguments\":{}}]",
        "[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS] {}",
        "[TOOL_CALLS] f{\"a\": 1}[TOOL_CALLS] [{\"name\":\"g\"}]",
    ] {
        let message = parse(ToolFamily::Mistral, text);
        assert_eq!(calls(&message), [("f", "{\"a\": 1}"), ("g", "{}")], "{text}");
        assert_eq!(message.content, "");
    }
}

#[test]
fn json_calls() {
    let text = "[{\"name\":\"f\",\"arguments\":{}}, {\"name\":\"g\",\"arguments\":{}}]";
    assert_eq!(calls(&parse(ToolFamily::Json, text)), [("f", "{}"), ("g", "{}")]);
    let text = "{\"name\":\"f\",\"arguments\":{}}";
    assert_eq!(calls(&parse(ToolFamily::Json, text)), [("f", "{}")]);
}

#[test]
fn what_is_no_call_is_content() {
    use ToolFamily::{Hermes, Json, Llama3, Mistral};
    for (family, text) in [
        (Hermes, " a <tool_call> b </tool_call> c "),
        (Hermes, "<tool_call>{\"name\": 3}</tool_call>"),
        (Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": [1]}</tool_call>"),
        (Hermes, "<tool_call><tool_call"),
        (Hermes, "{\"name\":\"f\",\"arguments\":{}}"),
        (Llama3, "{\"name\": \"John\", \"age\": 3}"),
        (Llama3, "{\"name\": \"John\"}"),
        (Llama3, " {\"name\": \"f\", \"parameters\": "),
        (Llama3, "text {\"name\":\"f\",\"parameters\":{}}"),
        (Llama3, "<|python_tag|>print(1)"),
        (Mistral, "[TOOL_CALLS]"),
        (Mistral, "[TOOL_CALLS][]"),
        (Mistral, "[TOOL_CALLS]f[ARGX]{}"),
        (Mistral, "[TOOL_CALLS]f "),
        (Json, "[1, 2]"),
        (Json, "{}"),
        (Json, "\n[\n"),
    ] {
        let message = parse(family, text);
        assert_eq!(message.content, text);
        assert!(message.tool_calls.is_empty());
    }
}

#[test]
fn a_second_call_is_dropped_unless_parallel() {
    let text = "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>\
                <tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call>";
    let parser = OutputParser::new(Some(ToolFamily::Hermes), None, true, false, CallIds::new(1));
    assert_eq!(calls(&parser.parse(text)), [("f", "{}")]);
    let parser = OutputParser::new(Some(ToolFamily::Hermes), None, false, true, CallIds::new(1));
    assert_eq!(parser.parse(text).content, text);
}

/// The message and the parser after output that was cut off behind `text`.
fn cut(family: ToolFamily, text: &str) -> (ParsedMessage, OutputParser) {
    let mut parser = OutputParser::new(Some(family), None, true, true, CallIds::new(1));
    let mut deltas = parser.push(text);
    deltas.extend(parser.finish(true));
    (ParsedMessage::collect(deltas), parser)
}

#[test]
fn a_call_that_is_cut_off_is_no_content() {
    use ToolFamily::{Hermes, Json, Llama3, Mistral};
    let whole = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    for (family, text, content, names) in [
        (Hermes, "<tool_call>\n{\"na".to_owned(), "", 0),
        (Hermes, "<tool_c".to_owned(), "", 0),
        (Hermes, "Let me see. <tool_call>".to_owned(), "Let me see.", 0),
        (Hermes, format!("{whole}\n<tool_call>\n{{\"name"), "", 1),
        (Hermes, format!("{whole}\n<tool"), "", 1),
        (Hermes, whole.to_owned(), "", 1),
        (Llama3, " {\"name\": \"f\", \"parameters\": ".to_owned(), "", 0),
        (Llama3, "{\"age\": 3".to_owned(), "{\"age\": 3", 0),
        (Llama3, "{".to_owned(), "{", 0),
        (Mistral, "[TOOL_CALLS]f".to_owned(), "", 0),
        (Json, "[{\"name\": \"f".to_owned(), "", 0),
        (Json, "[1, ".to_owned(), "[1, ", 0),
        // A single character of a marker may be anything.
        (Hermes, "2 <".to_owned(), "2 <", 0),
    ] {
        let (message, parser) = cut(family, &text);
        assert_eq!(
            (message.content.as_str(), message.tool_calls.len()),
            (content, names),
            "{text}"
        );
        assert_eq!(parser.calls_are_complete(), names > 0, "{text}");
    }
    // If the answer is constrained to calls, every text is the beginning of a call.
    for (family, text) in [(Hermes, "<"), (Llama3, "{"), (Json, "["), (Mistral, "[T")] {
        let mut parser = OutputParser::new(Some(family), None, true, true, CallIds::new(1));
        parser = parser.must_call(true);
        let mut deltas = parser.push(text);
        deltas.extend(parser.finish(true));
        assert_eq!(deltas, [], "{text}");
        assert!(parser.saw_a_call());
    }
    let (message, parser) = cut(Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a");
    assert_eq!(calls(&message), [("f", "{\"a")]);
    assert!(!parser.calls_are_complete() && parser.saw_a_call());
}

#[test]
fn a_call_is_told_once() {
    let call = |city: &str| {
        format!(
            "<tool_call>{{\"name\": \"f\", \"arguments\": {{\"city\": \"{city}\"}}}}</tool_call>"
        )
    };
    let (rome, oslo) = (("f", "{\"city\": \"Rome\"}"), ("f", "{\"city\": \"Oslo\"}"));
    let other = call("Rome").replace(": ", ":");
    for (text, expected, repeats) in [
        (call("Rome") + &call("Rome"), vec![rome], true),
        // White space between tokens does not matter.
        (call("Rome") + &other, vec![rome], true),
        (call("Rome") + &call("Oslo"), vec![rome, oslo], false),
        (call("Rome") + &call("Romeo"), vec![rome, ("f", "{\"city\": \"Romeo\"}")], false),
        (call("Rome") + &call("Oslo") + &call("Rome"), vec![rome, oslo], true),
        (call("Rome") + &call("Rome").replace("\"f\"", "\"g\""), vec![rome, ("g", rome.1)], false),
    ] {
        let mut parser =
            OutputParser::new(Some(ToolFamily::Hermes), None, true, true, CallIds::new(1));
        let mut deltas: Vec<Delta> =
            text.split_inclusive(':').flat_map(|piece| parser.push(piece)).collect();
        deltas.extend(parser.finish(false));
        assert_eq!(calls(&ParsedMessage::collect(deltas)), expected, "{text}");
        assert_eq!(parser.repeats_itself(), repeats, "{text}");
        assert!(parser.calls_are_complete());
    }
}

#[test]
fn arguments_stream_as_they_arrive() {
    let mut parser = OutputParser::new(Some(ToolFamily::Hermes), None, true, true, CallIds::new(1));
    assert_eq!(parser.push("Hi <tool"), [Delta::Content("Hi".into())]);
    let deltas = parser.push("_call>{\"name\": \"f\", \"arguments\": {\"ci");
    assert!(matches!(&deltas[0], Delta::ToolCallStart { index: 0, name, .. } if name == "f"));
    let fragment = |text: &str| Delta::ToolCallArguments { index: 0, json_fragment: text.into() };
    assert_eq!(deltas[1..], [fragment("{\"ci")]);
    assert_eq!(parser.push("ty\": 1}}"), [fragment("ty\": 1}")]);
    assert_eq!(parser.push("</tool_call>"), []);
    assert_eq!(parser.finish(false), []);
}

#[test]
fn long_names_are_content_however_they_come() {
    let text = format!("[TOOL_CALLS]{}[ARGS]{{}}", "n".repeat(MAX_NAME));
    for cut in [1, 7, 511, 512, 513, 5000] {
        let mut parser =
            OutputParser::new(Some(ToolFamily::Mistral), None, true, true, CallIds::new(1));
        let pieces = text.as_bytes().chunks(cut).map(|piece| std::str::from_utf8(piece).unwrap());
        let mut deltas: Vec<Delta> = pieces.flat_map(|piece| parser.push(piece)).collect();
        deltas.extend(parser.finish(false));
        assert_eq!(ParsedMessage::collect(deltas).content, text);
    }
}

#[test]
fn ids_look_as_openai_s() {
    let mut ids = CallIds::new(7);
    let (a, b) = (ids.next_id(), ids.next_id());
    assert!(a != b && a.len() == 29 && a.starts_with("call_"));
    assert!(a[5..].chars().all(|c| c.is_ascii_alphanumeric()));
}

/// Texts made of relevant pieces, complete and broken.
fn texts() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("<tool_call>"),
        Just("</tool_call>"),
        Just("[TOOL_CALLS]"),
        Just("[ARGS]"),
        Just("[CALL_ID]"),
        Just("<|python_tag|>"),
        Just("<think>"),
        Just("</think>"),
        Just("{\"name\": \"f\", \"arguments\": {\"a\": [1.5e3, \"\\u00e9}\"]}}"),
        Just("{\"parameters\": {}, \"type\": \"function\", \"name\": \"g\"}"),
        Just("{\"name\":\"h\",\"arguments\":\"{\\\"x\\\": 1}\"}"),
        Just("{\"name\": \"f\""),
        Just("f[ARGS]{\"é\": 1}"),
        Just("["),
        Just("]"),
        Just(","),
        Just(";"),
        Just("{"),
        Just("}"),
        Just("\""),
        Just(" "),
        Just("\n"),
        Just("<"),
        Just("é"),
        Just("word"),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

fn deltas(mut parser: OutputParser, text: &str, cuts: &[usize]) -> ParsedMessage {
    let mut all = Vec::new();
    let mut start = 0;
    let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (text.len() + 1)).collect();
    ends.push(text.len());
    ends.sort_unstable();
    for end in ends {
        if text.is_char_boundary(end) {
            all.extend(parser.push(&text[start..end]));
            start = end;
        }
    }
    all.extend(parser.finish(false));
    ParsedMessage::collect(all)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn chunking_does_not_matter(
        text in texts(),
        cuts in prop::collection::vec(0usize..10_000, 0..40),
        family in prop::sample::select(vec![
            None,
            Some(ToolFamily::Hermes),
            Some(ToolFamily::Llama3),
            Some(ToolFamily::Mistral),
            Some(ToolFamily::Json),
        ]),
        reasoning in prop::sample::select(vec![None, Some(false), Some(true)]),
    ) {
        let parser = || {
            let reasoning = reasoning.and_then(think);
            OutputParser::new(family, reasoning, true, true, CallIds::new(3))
        };
        let whole = parser().parse(&text);
        prop_assert_eq!(&deltas(parser(), &text, &cuts), &whole);
        let every: Vec<usize> = (0..text.len()).collect();
        prop_assert_eq!(&deltas(parser(), &text, &every), &whole);
        for call in &whole.tool_calls {
            // Complete, or cut off where the text is cut off: never invalid.
            let mut scan = JsonScan::new();
            let steps: Vec<Step> = call.arguments.chars().map(|c| scan.push(c)).collect();
            let parses = serde_json::from_str::<serde_json::Value>(&call.arguments).is_ok();
            prop_assert!(parses || steps.iter().all(|step| *step == Step::More));
        }
        if family.is_none() && reasoning.is_none() {
            prop_assert_eq!(&whole.content, &text);
        }
        if whole.tool_calls.is_empty() && reasoning.is_none() {
            prop_assert_eq!(&whole.content, &text);
        }
    }

    #[test]
    fn hostile_text_is_only_text(text in ".{0,200}") {
        for family in [ToolFamily::Hermes, ToolFamily::Llama3, ToolFamily::Mistral, ToolFamily::Json] {
            let parser = OutputParser::new(Some(family), think(true), true, true, CallIds::new(3));
            parser.parse(&text);
        }
    }
}
