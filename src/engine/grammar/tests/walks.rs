//! Tests of the texts that grammars allow: random generation, special tokens, the end.

use super::*;

const SCHEMAS: [&str; 14] = [
    r#"{"type":"object","properties":{"name":{"type":"string"},"age":{"type":"integer"}},
        "required":["name","age"],"additionalProperties":false}"#,
    r#"{"type":"object","properties":{"a":{"type":"string","maxLength":5},
        "b":{"type":"boolean"}},"required":["a"],"additionalProperties":false}"#,
    r#"{"enum":["red","green",12,null,{"a":[1,2]}]}"#,
    r#"{"type":"array","items":{"type":"array","items":{"type":"integer","minimum":-3,
        "maximum":120}},"minItems":1,"maxItems":3}"#,
    r##"{"$defs":{"node":{"type":"object","properties":{"v":{"type":"integer"},
        "next":{"anyOf":[{"$ref":"#/$defs/node"},{"type":"null"}]}},"required":["v","next"],
        "additionalProperties":false}},"$ref":"#/$defs/node"}"##,
    r#"{"type":"object","additionalProperties":{"type":"number"}}"#,
    r#"{"type":"string","minLength":2,"maxLength":4}"#,
    r#"{"type":"integer","minimum":10,"maximum":99}"#,
    r#"{"anyOf":[{"type":"boolean"},{"type":"array","items":{"type":"null"},"maxItems":2}]}"#,
    r#"{"oneOf":[
        {"type":"object","properties":{"kind":{"const":"a"},"x":{"type":"integer"}},
         "required":["kind","x"],"additionalProperties":false},
        {"type":"object","properties":{"kind":{"const":"b"},"y":{"type":"string"}},
         "required":["kind","y"],"additionalProperties":false}]}"#,
    r#"{"type":["string","null"]}"#,
    r#"{"type":"object","properties":{"list":{"type":"array","items":{"enum":["red","green"]}},
        "deep":{"type":"object","properties":{"é":{"type":"number"}},"required":["é"]}},
        "required":["list","deep"]}"#,
    r#"{"type":"object"}"#,
    "true",
];

#[test]
fn walks_under_the_mask_are_valid_json() {
    for world in [World::bytes(), World::merges()] {
        for text in SCHEMAS {
            let schema: Value = serde_json::from_str(text).expect("a schema");
            let grammar = world.compile(Grammar::JsonSchema(text.into()));
            for seed in 0..12 {
                let out = world.walk(&grammar, seed, 60);
                let value: Value = match serde_json::from_str(&out) {
                    Ok(value) => value,
                    // Valid JSON, but not an f64: 1e999.
                    Err(error) if error.to_string().contains("out of range") => continue,
                    Err(error) => panic!("{error}: {out:?} under {text}"),
                };
                assert!(check::fits(&schema, &schema, &value), "{out} does not fit {text}");
            }
        }
        let any = world.compile(Grammar::JsonObject);
        for seed in 0..12 {
            let out = world.walk(&any, seed, 40);
            assert!(out.starts_with('{') && out.ends_with('}'), "{out}");
        }
    }
}

#[test]
fn white_space_is_allowed_but_bounded() {
    let world = World::bytes();
    let grammar = world.compile(Grammar::JsonSchema(SCHEMAS[0].into()));
    assert!(world.takes(&grammar, r#"{"name":"x","age":3}"#));
    assert!(world.takes(&grammar, r#"{"name": "x", "age": 3}"#));
    assert!(world.takes(&grammar, "{\n  \"name\": \"x\",\n  \"age\": 3\n}"));
    assert!(!world.takes(&grammar, "{\n\n\"name\":\"x\",\"age\":3}"));
    assert!(!world.takes(&grammar, &format!("{{{}\"name\":\"x\",\"age\":3}}", " ".repeat(50))));
    // White space must not follow without end.
    let mut state = grammar.matcher();
    assert!(world.feed(&mut state, r#"{"name":"x","age":3}"#));
    let allowed = world.allowed(&mut state);
    assert!(state.is_finished(), "more than the end may follow: {allowed:?}");
    assert_eq!(allowed, world.eos);
}

#[test]
fn end_tokens_come_only_where_the_text_is_complete() {
    let world = World::bytes();
    let grammar = world.compile(Grammar::Regex("ab?".into()));
    let mut state = grammar.matcher();
    assert_eq!(world.allowed(&mut state), [Token::from(b'a')]);
    assert!(!state.is_accepting() && !state.is_finished());
    state.accept(Token::from(b'a')).expect("allowed");
    let mut expected = vec![Token::from(b'b')];
    expected.extend(&world.eos);
    assert_eq!(world.allowed(&mut state), expected);
    assert!(state.is_accepting() && !state.is_finished());
    state.accept(Token::from(b'b')).expect("allowed");
    assert!(state.is_finished());
    assert_eq!(world.allowed(&mut state), world.eos);
    state.accept(world.eos[1]).expect("the end");
    assert!(state.is_finished());
    assert!(state.accept(Token::from(b'b')).is_err(), "nothing comes after the end");
}

#[test]
fn an_early_end_and_a_wrong_token_are_errors_that_last() {
    let world = World::bytes();
    let grammar = world.compile(Grammar::Regex("abc".into()));
    for wrong in [world.eos[0], Token::from(b'x'), 100_000] {
        let mut state = grammar.matcher();
        let error = state.accept(wrong).expect_err("not allowed");
        assert_eq!(error.kind, EngineErrorKind::Internal);
        assert_eq!(state.mask().expect_err("over"), error);
        assert_eq!(state.accept(Token::from(b'a')).expect_err("over"), error);
        assert!(!state.is_finished());
    }
    // Other states of the same grammar are unaffected.
    assert!(world.takes(&world.compile(Grammar::Regex("abc".into())), "abc"));
}

#[test]
fn regular_expressions() {
    let world = World::merges();
    let date = world.compile(Grammar::Regex(r"^\d{4}-(0[1-9]|1[0-2])-[0-3]\d$".into()));
    assert!(world.takes(&date, "2024-11-30"));
    assert!(!world.takes(&date, "2024-13-30"));
    let path = world.compile(Grammar::Regex("/[a-z/]+\n?".into()));
    assert!(world.takes(&path, "/a/b\n"));
    for seed in 0..20 {
        let out = world.walk(&date, seed, 5);
        assert!(out.len() == 10 && out.as_bytes()[4] == b'-', "{out}");
    }
}

#[test]
fn lark_with_control_tokens() {
    let world = World::merges();
    let lark = r#"start: <tool_call> "\n" call "\n" </tool_call>
call: %json {"type":"object","properties":{"name":{"enum":["red"]}},"required":["name"],
    "additionalProperties":false,"x-guidance":{"whitespace_flexible":false}}"#;
    let grammar = world.compile(Grammar::Lark(lark.into()));
    let mut state = grammar.matcher();
    assert_eq!(world.allowed(&mut state), [world.special("<tool_call>")]);
    let out = world.walk(&grammar, 1, 5);
    assert_eq!(out, "<tool_call>\n{\"name\":\"red\"}\n</tool_call>");
    // The marker as text is not the marker token.
    assert!(!state.accept_text(b"<tool_call>").expect("no failure"));
    // By id, for markers that are not written in angle brackets.
    let by_id = format!("start: <[{}]> \"a\"", world.special("<tool_call>"));
    let grammar = world.compile(Grammar::Lark(by_id));
    assert_eq!(world.walk(&grammar, 1, 5), "<tool_call>a");
}

#[test]
fn a_vocabulary_without_end_tokens_ends_with_an_empty_mask() {
    let tokens = (0..=255u8).map(|b| VocabToken { bytes: vec![b], special: false }).collect();
    let tokenize: Tokenize = Arc::new(|text| text.iter().map(|&b| Token::from(b)).collect());
    let engine = GrammarEngine::new(VocabSource { tokens, eos: vec![9999], tokenize });
    let grammar = engine.expect("usable").compile(&Grammar::Regex("ab".into())).expect("a grammar");
    let mut state = grammar.matcher();
    assert!(state.accept_text(b"ab").expect("no failure"));
    assert!(state.is_finished());
    assert!(state.mask().expect("a mask").iter().all(|&word| word == 0));
}

#[test]
fn a_wrong_tokenizer_does_no_harm() {
    let tokens = |_: ()| (0..=255u8).map(|b| VocabToken { bytes: vec![b], special: false });
    for wrong in [vec![], vec![b'z'.into()], vec![70_000], vec![32; 400]] {
        let tokenize: Tokenize = Arc::new(move |_| wrong.clone());
        let source = VocabSource { tokens: tokens(()).collect(), eos: vec![0], tokenize };
        let engine = GrammarEngine::new(source).expect("usable");
        let grammar = engine.compile(&Grammar::Regex("abc[d-f]".into())).expect("a grammar");
        let mut state = grammar.matcher();
        for byte in *b"abcd" {
            assert!(bit(state.mask().expect("a mask"), byte.into()), "{byte}");
            state.accept(byte.into()).expect("allowed");
        }
        assert!(state.is_finished());
    }
}

#[test]
fn the_worker_gives_masks_back() {
    let world = World::merges();
    let spec = GrammarSpec { grammar: Grammar::Regex("[ab]{3}".into()), trigger: None };
    let mut worker = MaskWorker::new(2, 3).expect("threads");
    assert!(worker.collect().is_empty());
    let mut grammars: Vec<(usize, TriggeredGrammar)> =
        (0..8).map(|i| (i, world.engine.start(&spec).expect("a grammar"))).collect();
    for byte in *b"aba" {
        for (key, grammar) in grammars.drain(..) {
            assert!(grammar.needs_mask());
            worker.submit(key, grammar);
        }
        let mut back = worker.collect();
        assert_eq!(back.len(), 8);
        back.sort_by_key(|masked| masked.key);
        for mut masked in back {
            masked.result.expect("no failure");
            let mask = masked.grammar.mask().expect("ready").expect("constrained");
            assert!(bit(mask, byte.into()) && !bit(mask, b'x'.into()));
            masked.grammar.observe(byte.into(), &[byte]).expect("allowed");
            grammars.push((masked.key, masked.grammar));
        }
    }
    assert!(grammars.iter().all(|(_, grammar)| grammar.is_finished()));
    // A failed grammar affects no others.
    let mut broken = world.engine.start(&spec).expect("a grammar");
    assert!(broken.observe(b'x'.into(), b"x").is_err());
    worker.submit(0, broken);
    worker.submit(1, world.engine.start(&spec).expect("a grammar"));
    let results: Vec<(usize, bool)> =
        worker.collect().into_iter().map(|masked| (masked.key, masked.result.is_ok())).collect();
    assert!(results.contains(&(0, false)) && results.contains(&(1, true)));
    // The worker is dropped with work outstanding.
    worker.submit(2, world.engine.start(&spec).expect("a grammar"));
}
