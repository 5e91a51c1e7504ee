//! Tests of grammars that are invalid, too large, or built to be slow.

use super::*;
use std::time::{Duration, Instant};

#[test]
fn refusals_name_the_field_and_the_cause() {
    let world = World::bytes();
    let schema = |text: &str| world.refuse(Grammar::JsonSchema(text.into()));
    let unsupported = schema(r#"{"type":"object","if":{"type":"object"},"then":{}}"#);
    assert_eq!(unsupported.kind, EngineErrorKind::Invalid);
    assert_eq!(unsupported.param.as_deref(), Some("response_format"));
    assert!(unsupported.message.contains("if"), "{unsupported}");
    assert!(schema("{").message.contains("not valid JSON"));
    assert!(schema("[1]").message.contains("must be a JSON object"));
    assert!(schema("false").message.contains("allows nothing"));
    assert!(schema(r#"{"type":"strin"}"#).message.contains("strin"));
    let deep = format!("{}{}", r#"{"items":"#.repeat(65), "{}".to_owned() + &"}".repeat(65));
    assert!(schema(&deep).message.contains("64 levels"));
    let one_of = schema(r#"{"oneOf":[{"type":"string"},{"type":"string","maxLength":3}]}"#);
    assert!(one_of.message.contains("use anyOf"), "{one_of}");
    let regex = world.refuse(Grammar::Regex("a(".into()));
    assert_eq!(regex.param.as_deref(), Some("response_format"));
    let lark = world.refuse(Grammar::Lark("start: missing".into()));
    assert_eq!(lark.param.as_deref(), Some("grammar"));
    assert!(lark.message.contains("missing"), "{lark}");
    assert!(world.refuse(Grammar::Lark(" \n".into())).message.contains("empty"));
    let large = world.refuse(Grammar::Regex("a".repeat(MAX_GRAMMAR_BYTES + 1)));
    assert!(large.message.contains("262144"), "{large}");
    for error in [unsupported, regex, lark, large] {
        assert!(error.message.len() < 500 && !error.message.contains("panic"), "{error}");
    }
}

/// Compiles the grammar, computes the first mask if possible, and checks the elapsed time. The
/// grammar may be refused or accepted.
fn survive(world: &World, name: &str, grammar: Grammar) {
    let start = Instant::now();
    let outcome = match world.engine.compile(&grammar) {
        Err(error) => {
            assert_eq!(error.kind, EngineErrorKind::Invalid, "{name}: {error}");
            format!("refused: {error}")
        }
        Ok(compiled) => {
            let mut state = compiled.matcher();
            let mut steps = 0;
            while steps < 40 && state.mask().is_ok() && !state.is_finished() {
                let next = (1..=255).rev().find(|&t| bit(state.mask().expect("a mask"), t));
                let Some(next) = next else { break };
                state.accept(next).ok();
                steps += 1;
            }
            format!("accepted, {steps} steps")
        }
    };
    let elapsed = start.elapsed();
    println!("{name}: {elapsed:?}, {outcome}");
    assert!(elapsed < Duration::from_secs(30), "{name} took {elapsed:?}");
}

#[test]
fn hostile_grammars_end_in_bounded_time() {
    let world = World::merges();
    let half = MAX_GRAMMAR_BYTES / 2 - 16;
    let lark = |text: String| Grammar::Lark(text);
    let schema = |text: String| Grammar::JsonSchema(text);
    survive(
        &world,
        "parentheses",
        lark(format!("start: {}\"a\"{}", "(".repeat(half), ")".repeat(half))),
    );
    survive(&world, "open brackets", lark(format!("start: {}", "[".repeat(2 * half))));
    survive(&world, "regex parentheses", Grammar::Regex("(".repeat(half) + &")".repeat(half)));
    survive(&world, "repetitions", Grammar::Regex("((a{1,1000}){1,1000}){1,1000}".into()));
    survive(
        &world,
        "exponential",
        Grammar::Regex(format!("(.*a){{30}}.{{30}}{}", "b?".repeat(500))),
    );
    survive(&world, "long choice", lark(format!("start: {}\"a\"", "\"b\" | ".repeat(half / 3))));
    survive(&world, "choice", lark(format!("start: {}\"a\"", "\"b\" | ".repeat(9_900))));
    survive(&world, "options", lark(format!("start: {}\"a\"", "\"b\"? ".repeat(half / 3))));
    survive(&world, "some options", lark(format!("start: {}\"a\"", "\"b\"? ".repeat(5_000))));
    survive(&world, "left recursion", lark("start: start start | \"a\" | ".into()));
    survive(
        &world,
        "ambiguity",
        lark("start: x+\nx: \"a\" | x x | x x x | \"a\" x \"a\" |".into()),
    );
    survive(&world, "json in lark", lark(format!("start: %json {}", "[".repeat(2 * half))));
    survive(&world, "self reference", schema(r##"{"$ref":"#"}"##.into()));
    survive(&world, "all of itself", schema(r##"{"allOf":[{"$ref":"#"},{"$ref":"#"}]}"##.into()));
    survive(&world, "any of itself", schema(r##"{"anyOf":[{"$ref":"#"},{"$ref":"#"}]}"##.into()));
    let square = r##"{"$defs":{"a":{"allOf":[{"$ref":"#/$defs/b"},{"$ref":"#/$defs/b"}]},
        "b":{"allOf":[{"$ref":"#/$defs/a"},{"anyOf":[{"type":"string"},{"minLength":3}]}]}},
        "$ref":"#/$defs/a"}"##;
    survive(&world, "mutual all of", schema(square.into()));
    survive(&world, "items", schema(r#"{"type":"array","maxItems":1000000000}"#.into()));
    survive(&world, "length", schema(r#"{"type":"string","maxLength":1000000000}"#.into()));
    survive(
        &world,
        "pattern",
        schema(r#"{"type":"string","pattern":"^(a|aa)+(b{99}){99}$"}"#.into()),
    );
    let names: Vec<String> =
        (0..6000).map(|i| format!(r#""key{i}":{{"type":"string"}}"#)).collect();
    survive(&world, "many keys", schema(format!(r#"{{"properties":{{{}}}}}"#, names.join(","))));
    let patterns: Vec<String> =
        (0..400).map(|i| format!(r#""^k{i}_":{{"type":"null"}}"#)).collect();
    survive(
        &world,
        "patterns",
        schema(format!(r#"{{"patternProperties":{{{}}}}}"#, patterns.join(","))),
    );
    let late = format!("start: \"x\" /[b-z]/ c\nc: {}\"a\"", "\"b\" | ".repeat(half / 3));
    survive(&world, "late choice", lark(late));
    let chain: Vec<String> = (0..20)
        .map(|i| {
            format!(
                r##""d{i}":{{"anyOf":[{{"type":"array","items":{{"$ref":"#/$defs/d{0}"}}}},
            {{"type":"object","properties":{{"a":{{"$ref":"#/$defs/d{0}"}}}}}}]}}"##,
                (i + 1) % 20
            )
        })
        .collect();
    let chain = format!(r##"{{"$defs":{{{}}},"$ref":"#/$defs/d0"}}"##, chain.join(","));
    survive(&world, "chain", schema(chain));
    // An ordinary grammar still works afterwards.
    assert!(world.takes(&world.compile(Grammar::Regex("ok".into())), "ok"));
}

#[test]
fn the_cache_keeps_what_is_used() {
    let world = World::bytes();
    let grammar = |i: usize| Grammar::Regex(format!("a{{{i}}}"));
    let first = world.compile(grammar(1));
    for i in 2..100 {
        world.compile(grammar(i));
        world.compile(grammar(1));
    }
    assert!(first.is_same(&world.compile(grammar(1))), "in constant use");
    assert!(!world.compile(Grammar::Lark("start: \"a\"".into())).is_same(&first));
    // The same text as another kind of grammar is a different grammar.
    let text = r#"{"type":"null"}"#;
    assert!(world.takes(&world.compile(Grammar::JsonSchema(text.into())), "null"));
    assert!(
        !world.engine.compile(&Grammar::Regex(text.into())).is_ok_and(|g| world.takes(&g, "null"))
    );
}

#[test]
fn a_panic_inside_llguidance_costs_only_the_walks_of_its_grammar() {
    let world = World::bytes();
    let (grammar, other) = (Grammar::Regex("ab+".into()), Grammar::Regex("ac+".into()));
    let (compiled, bystander) = (world.compile(grammar.clone()), world.compile(other));
    let (mut first, mut second) = (compiled.matcher(), compiled.matcher());
    let error = first.break_tables().expect("a failure");
    assert_eq!(error.kind, EngineErrorKind::Internal);
    assert_eq!(first.mask().expect_err("over"), error);
    assert!(second.accept(b'a'.into()).is_err(), "shares the tables");
    assert!(compiled.matcher().accept(b'a'.into()).is_err(), "so do walks begun later");
    // The next request compiles again; other grammars are unaffected.
    assert!(world.takes(&world.compile(grammar), "abb"));
    assert!(world.takes(&bystander, "acc"));
}
