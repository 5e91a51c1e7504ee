use super::*;
use crate::gateway::api::wire::fields::Fields;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities};
use llguidance::{Matcher, ParserFactory};

const THINKS: &str = "{%- for m in messages -%}<|{{ m.role }}|>{{ m.content }}{%- endfor -%}\
    {%- if add_generation_prompt -%}<|assistant|>{%- endif -%}{#- <think> </think> -#}";

fn info(special_tokens: Vec<(String, u32)>) -> ModelInfo {
    ModelInfo {
        description: String::new(),
        architecture: String::new(),
        vocab_size: 256,
        parameters: 0,
        context_length: 64,
        embedding_size: 0,
        pooled_length: 0,
        can_generate: true,
        can_embed: false,
        can_infill: false,
        shares_prefixes: true,
        mixes_adapters: false,
        speculates: false,
        kv_pages: 1,
        page_tokens: 32,
        max_sequences: 1,
        special_tokens,
        load_seconds: 0.0,
        step_seconds: 0.0,
    }
}

#[test]
fn drafts_are_refused_where_they_would_change_the_output() {
    for (most, speculates, fine) in [(0, false, true), (4, true, true), (4, false, false)] {
        let info = ModelInfo { speculates, ..info(Vec::new()) };
        let checked = request(json!({"speculative.n_max": most})).common.check_model(&info);
        assert_eq!(checked.is_ok(), fine, "{most}");
        if let Err(error) = checked {
            assert_eq!(error.status, 400);
            assert_eq!(error.param.as_deref(), Some("speculative.n_max"));
        }
    }
}

fn request(more: Value) -> ChatRequest {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    ChatRequest::read(Fields::of(String::new(), body).unwrap()).unwrap()
}

fn spec(source: &str, prompt: &str, more: Value) -> Option<GrammarSpec> {
    let template = ChatTemplate::compile(source, None, "", "").unwrap();
    build(&template, &info(vec![]), prompt, &request(more)).unwrap().grammar
}

fn format() -> Value {
    json!({"response_format": {"type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "object"}}}})
}

fn tools(choice: &str) -> Value {
    let tool = json!({"type": "function", "function": {"name": "f",
        "parameters": {"type": "object", "properties": {}}}});
    json!({"tools": [tool], "tool_choice": choice})
}

#[test]
fn without_reasoning_a_format_applies_at_once() {
    let spec = spec("", "<|im_start|>assistant\n", format()).unwrap();
    assert_eq!(spec.grammar, Grammar::JsonSchema("{\"type\":\"object\"}".into()));
    assert_eq!(spec.trigger, None);
}

#[test]
fn reasoning_comes_before_a_format() {
    let open = spec(THINKS, "<|assistant|><think>\n", format()).unwrap();
    let trigger = open.trigger.unwrap();
    assert_eq!((trigger.texts, trigger.inclusive), (vec!["</think>".to_owned()], false));
    let closed = spec(THINKS, "<|assistant|><think>\n\n</think>\n\n", format()).unwrap();
    assert!(closed.trigger.is_none() && matches!(closed.grammar, Grammar::JsonSchema(_)));
    let free = spec(THINKS, "<|assistant|>", format()).unwrap();
    let Grammar::JsonLark { lark, reasoning } = free.grammar else { panic!("{:?}", free.grammar) };
    assert_eq!(reasoning, Some(("<think>".to_owned(), "</think>".to_owned())));
    assert!(free.trigger.is_none());
    assert!(lark.starts_with("start: think answer | answer\n"), "{lark}");
    assert!(lark.contains("thought[suffix=\"</think>\"]"), "{lark}");
    assert!(lark.contains("answer: form\n"), "{lark}");
}

#[test]
fn special_tokens_stand_for_their_markers() {
    let template = ChatTemplate::compile(THINKS, None, "", "").unwrap();
    let info = info(vec![("<think>".into(), 7), ("</think>".into(), 8)]);
    let built = build(&template, &info, "<|assistant|>", &request(format())).unwrap();
    let Some(Grammar::JsonLark { lark, .. }) = built.grammar.map(|spec| spec.grammar) else {
        panic!()
    };
    assert!(lark.contains("think: <[7]> THOUGHT <[8]>"), "{lark}");
}

#[test]
fn tools_by_choice() {
    let auto = spec("", "", tools("auto")).unwrap();
    assert_eq!(
        auto.trigger.map(|t| (t.texts, t.inclusive)),
        Some((vec!["<tool_call>".to_owned()], true))
    );
    let required = spec("", "", tools("required")).unwrap();
    assert!(required.trigger.is_none() && matches!(required.grammar, Grammar::JsonLark { .. }));
    assert!(spec("", "", tools("none")).is_none());
}

#[test]
fn tools_and_a_format_are_alternatives() {
    let mut both = tools("auto");
    both["response_format"] = json!({"type": "regex", "regex": "a/b\\/c\nd"});
    let Some(Grammar::Lark(lark)) = spec("", "", both).map(|spec| spec.grammar) else { panic!() };
    assert!(lark.starts_with("start: calling | form\ncalling: "), "{lark}");
    assert!(lark.ends_with("form: FORM\nFORM: /a\\/b\\/c\\nd/\n"), "{lark}");
    let template = ChatTemplate::compile("", None, "", "").unwrap();
    let mut both = tools("auto");
    both["response_format"] = json!({"type": "grammar", "grammar": "start: \"a\""});
    let error = build(&template, &info(vec![]), "", &request(both)).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("response_format"));
}

/// Whether the grammar derives exactly this text, byte by byte.
fn accepts(lark: &str, text: &str) -> bool {
    let env = ApproximateTokEnv::single_byte_env();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &[]).unwrap();
    factory.quiet();
    let grammar = TopLevelGrammar::from_lark(lark.to_owned());
    let mut matcher = Matcher::new(factory.create_parser(grammar));
    assert_eq!(matcher.get_error(), None, "{lark}");
    let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
    matcher.try_consume_tokens(&tokens).is_ok_and(|count| count == tokens.len())
        && matcher.is_accepting().unwrap_or(false)
}

fn lark(source: &str, prompt: &str, more: Value) -> String {
    match spec(source, prompt, more).map(|spec| spec.grammar) {
        Some(Grammar::Lark(lark) | Grammar::JsonLark { lark, .. }) => lark,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_model_that_decides_may_think_first() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}},
        "required": ["a"], "additionalProperties": false});
    let format = json!({"response_format": {"type": "json_schema",
        "json_schema": {"name": "x", "schema": schema}}});
    let grammar = lark(THINKS, "<|assistant|>", format);
    for text in [
        "{\"a\":1}",
        "{\"a\": 1}",
        "<think>\nhm {} <b>\n</think>\n\n{\"a\": 1}",
        "<think></think>{\"a\":1}",
    ] {
        assert!(accepts(&grammar, text), "{text}\n{grammar}");
    }
    for text in ["hm", "<think>hm", "<think>hm</think>", "<think>a</think>b</think>{\"a\":1}", "{}"]
    {
        assert!(!accepts(&grammar, text), "{text}\n{grammar}");
    }
    let regex = json!({"response_format": {"type": "regex", "regex": "[0-9]+/[0-9]+"}});
    let grammar = lark(THINKS, "<|assistant|>", regex);
    assert!(accepts(&grammar, "12/5") && accepts(&grammar, "<think>12</think>\n1/2"));
    assert!(!accepts(&grammar, "12"));
    let object = json!({"response_format": {"type": "json_object"}});
    let grammar = lark(THINKS, "<|assistant|>", object);
    assert!(accepts(&grammar, "{\"x\": [1, {}]}") && !accepts(&grammar, "[1]"));
}

#[test]
fn a_model_may_think_before_a_required_call() {
    let grammar = lark(THINKS, "<|assistant|>", tools("required"));
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    assert!(accepts(&grammar, call), "{grammar}");
    assert!(accepts(&grammar, &format!("<think>\nf!</think>\n{call}")), "{grammar}");
    assert!(!accepts(&grammar, "no") && !accepts(&grammar, "<think>f</think>"));
}

#[test]
fn an_answer_is_a_call_or_has_the_format() {
    let mut both = tools("auto");
    both["response_format"] = format()["response_format"].clone();
    let grammar = lark("", "", both);
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    assert!(accepts(&grammar, call) && accepts(&grammar, "{\"any\": 1}"), "{grammar}");
    assert!(!accepts(&grammar, "hello"));
}

#[test]
fn a_complete_call_may_end_the_answer() {
    let grammar = lark("", "", tools("required"));
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    // White space after a call allows nothing else to follow.
    for text in [call.to_owned(), format!("{call}\n"), format!("{call}\n{call}")] {
        assert!(accepts(&grammar, &text), "{text}");
    }
    assert!(!accepts(&grammar, &format!("{call}\n<tool_call>")));
    // A function without parameters has none.
    for parameters in [json!(null), json!({}), json!({"type": "object", "properties": {}})] {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": parameters}});
        let grammar = lark("", "", json!({"tools": [tool], "tool_choice": "required"}));
        assert!(accepts(&grammar, call), "{parameters}");
        assert!(!accepts(&grammar, &call.replace("{}", "{\"a\": 1}")), "{parameters}");
    }
}

#[test]
fn the_parts_of_a_grammar_are_named() {
    let tool = |name: &str, strict: bool, parameters: Value| {
        json!({"type": "function",
            "function": {"name": name, "strict": strict, "parameters": parameters}})
    };
    let object = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    let mut body =
        json!({"tools": [tool("one", false, object.clone()), tool("two", true, object)]});
    body["response_format"] = format()["response_format"].clone();
    let template = ChatTemplate::compile("", None, "", "").unwrap();
    let built = build(&template, &info(vec![]), "", &request(body)).unwrap();
    let params: Vec<&str> = built.parts.iter().map(|part| &part.param[..]).collect();
    assert_eq!(
        params,
        ["response_format", "tools[0].function.parameters", "tools[1].function.parameters"]
    );
    let closed = "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"}},\
                  \"additionalProperties\":false}";
    assert_eq!(built.parts[1].grammar, Grammar::LenientJsonSchema(closed.into()));
    assert_eq!(built.parts[2].grammar, Grammar::JsonSchema(closed.into()));
    assert_eq!(built.parts[2].what.as_deref(), Some("the parameters of the tool `two`"));
}
