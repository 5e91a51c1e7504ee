//! Tests of tool grammars against llguidance itself.

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv};
use llguidance::{Matcher, ParserFactory};

use super::*;

/// The id of `<|tool|>` in the test vocabulary of 256 bytes and six special tokens.
const TOOL_TOKEN: u32 = 256;

fn tools() -> Vec<Value> {
    let weather = json!({
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": false,
        "uniqueItems": true,
    });
    vec![
        json!({"type": "function", "function": {"name": "get_weather", "parameters": weather}}),
        json!({"type": "function", "function": {"name": "now"}}),
    ]
}

fn matcher(env: &TokEnv, lark: &str) -> Matcher {
    let capabilities = InferenceCapabilities::default();
    let mut factory = ParserFactory::new(env, capabilities, &[]).unwrap();
    factory.quiet();
    Matcher::new(factory.create_parser(TopLevelGrammar::from_lark(lark.to_owned())))
}

/// Whether the grammar derives exactly this text.
fn accepts(grammar: &ToolGrammar, text: &str) -> bool {
    let env = ApproximateTokEnv::single_byte_env();
    let mut matcher = matcher(&env, &grammar.lark);
    assert_eq!(matcher.get_error(), None, "{}", grammar.lark);
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    matcher.try_consume_tokens(&tokens).is_ok_and(|n| n == tokens.len())
        && matcher.is_accepting().unwrap_or(false)
}

fn grammar(family: ToolFamily, choice: ToolChoice, parallel: bool) -> ToolGrammar {
    family.grammar(&tools(), &choice, parallel, |_| None).unwrap()
}

const WEATHER: &str = r#"{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}"#;
const NOW: &str = r#"{"name":"now","arguments":{}}"#;

#[test]
fn hermes() {
    let one = grammar(ToolFamily::Hermes, ToolChoice::Required, false);
    let many = grammar(ToolFamily::Hermes, ToolChoice::Auto, true);
    assert_eq!(one.trigger, None);
    let trigger = many.trigger.as_ref().unwrap();
    assert_eq!(
        (trigger.text.as_slice(), trigger.at_start_only),
        (&["<tool_call>".to_owned()][..], false)
    );
    let weather = format!("<tool_call>\n{WEATHER}\n</tool_call>");
    let now = format!("<tool_call>{NOW}</tool_call>");
    assert!(accepts(&one, &weather) && accepts(&one, &now));
    assert!(!accepts(&one, &format!("{weather}\n{now}")));
    assert!(accepts(&many, &format!("{weather}\n{now}")));
    for bad in [
        "Hello",
        "<tool_call>\n{\"name\": \"other\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": 3}}\n</tool_call>",
        "<tool_call>\n{\"name\": \"now\", \"arguments\": []}\n</tool_call>",
    ] {
        assert!(!accepts(&one, bad), "{bad}");
    }
}

#[test]
fn a_named_choice_is_that_tool_once() {
    let named = grammar(ToolFamily::Hermes, ToolChoice::Named("now".into()), true);
    let now = format!("<tool_call>\n{NOW}\n</tool_call>");
    assert!(accepts(&named, &now));
    assert!(!accepts(&named, &format!("{now}\n{now}")));
    assert!(!accepts(&named, &format!("<tool_call>\n{WEATHER}\n</tool_call>")));
}

#[test]
fn llama3() {
    let weather = WEATHER.replace("arguments", "parameters");
    let now = NOW.replace("arguments", "parameters");
    let one = grammar(ToolFamily::Llama3, ToolChoice::Required, false);
    assert!(accepts(&one, &weather) && accepts(&one, &format!("<|python_tag|>{now}")));
    assert!(!accepts(&one, &format!("{weather}; {now}")));
    let many = grammar(ToolFamily::Llama3, ToolChoice::Auto, true);
    assert!(accepts(&many, &format!("{weather}; {now}")));
    assert!(many.trigger.unwrap().at_start_only);
}

#[test]
fn mistral() {
    let one = grammar(ToolFamily::Mistral, ToolChoice::Required, false);
    let many = grammar(ToolFamily::Mistral, ToolChoice::Auto, true);
    for text in [format!("[TOOL_CALLS][{WEATHER}]"), "[TOOL_CALLS]now[ARGS]{}".to_owned()] {
        assert!(accepts(&one, &text) && accepts(&many, &text), "{text}");
    }
    for text in [
        format!("[TOOL_CALLS] [{WEATHER}, {NOW}]"),
        "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get_weather[ARGS]{\"city\": \"\"}".to_owned(),
    ] {
        assert!(!accepts(&one, &text) && accepts(&many, &text), "{text}");
    }
}

#[test]
fn json_form() {
    let one = grammar(ToolFamily::Json, ToolChoice::Required, false);
    assert!(accepts(&one, WEATHER) && accepts(&one, &format!("[{NOW}]")));
    assert!(!accepts(&one, &format!("[{NOW}, {WEATHER}]")));
    let many = grammar(ToolFamily::Json, ToolChoice::Required, true);
    assert!(accepts(&many, &format!("[{NOW}, {WEATHER}]")));
}

#[test]
fn markers_may_be_tokens() {
    let token = |text: &str| (text == "<tool_call>").then_some(TOOL_TOKEN);
    let grammar =
        ToolFamily::Hermes.grammar(&tools(), &ToolChoice::Required, false, token).unwrap();
    let env = ApproximateTokEnv::single_byte_env();
    let mut matcher = matcher(&env, &grammar.lark);
    let mut tokens = vec![TOOL_TOKEN];
    tokens.extend(format!("\n{NOW}\n</tool_call>").bytes().map(u32::from));
    assert_eq!(matcher.try_consume_tokens(&tokens).unwrap(), tokens.len());
    assert!(matcher.is_accepting().unwrap());
}

#[test]
fn names_and_schemas_of_clients_are_only_data() {
    let name = "a\"b\\x41\n%json";
    let tools = [json!({"type": "function", "function": {"name": name, "parameters":
        {"properties": {"é\"}": {"const": "}\n\""}}, "x-guidance": {"lenient": "?"}}}})];
    let call = json!({"name": name, "arguments": {"é\"}": "}\n\""}});
    let family = ToolFamily::Json;
    let grammar = family.grammar(&tools, &ToolChoice::Required, false, |_| None).unwrap();
    assert!(accepts(&grammar, &call.to_string()), "{}", grammar.lark);
}

#[test]
fn strict_tools_are_taken_at_their_word() {
    let strict = |strict: bool| {
        let schema =
            json!({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}});
        let tool = json!({"function": {"name": "f", "strict": strict, "parameters": schema}});
        let grammar = ToolFamily::Json.grammar(&[tool], &ToolChoice::Required, false, |_| None);
        let env = ApproximateTokEnv::single_byte_env();
        matcher(&env, &grammar.unwrap().lark).get_error()
    };
    assert!(strict(true).is_some());
    assert_eq!(strict(false), None);
}

#[test]
fn mistakes_are_errors() {
    let family = ToolFamily::Hermes;
    let grammar = |tools: &[Value], choice| family.grammar(tools, &choice, true, |_| None);
    assert_eq!(grammar(&[], ToolChoice::Auto), Err(GrammarError::NoTools));
    let named = grammar(&tools(), ToolChoice::Named("f".into()));
    assert_eq!(named, Err(GrammarError::UnknownTool("f".into())));
    let list = json!({"function": {"name": "f", "parameters": {"type": "array"}}});
    let bad = grammar(&[list], ToolChoice::Required);
    assert_eq!(bad, Err(GrammarError::BadParameters("f".into())));
}
