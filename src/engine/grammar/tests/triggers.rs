//! Tests of triggers under all tokenizations of the output.

use super::*;

fn trigger(texts: &[&str], at_start_only: bool, inclusive: bool) -> GrammarTrigger {
    let texts = texts.iter().map(|text| text.to_string()).collect();
    GrammarTrigger { texts, at_start_only, inclusive }
}

/// The state of a grammar after some output.
#[derive(Debug, PartialEq)]
enum Outcome {
    Free,
    Constrained { accepting: bool },
}

/// Feeds `text`, cut after every byte whose bit in `cuts` is set. While the output is unconstrained
/// the pieces need not be in the vocabulary; afterwards they are fed byte by byte.
fn run(grammar: &CompiledGrammar, trigger: &GrammarTrigger, text: &str, cuts: u64) -> Outcome {
    let mut state = TriggeredGrammar::new(grammar, Some(trigger));
    let mut piece: Vec<u8> = Vec::new();
    for (i, byte) in text.bytes().enumerate() {
        if state.needs_mask() {
            assert!(piece.is_empty());
            state.observe(byte.into(), &[byte]).expect("allowed");
            continue;
        }
        piece.push(byte);
        if cuts >> (i % 64) & 1 == 1 || i + 1 == text.len() {
            // A piece of several bytes represents a token that need not exist in the vocabulary.
            let token = if piece.len() == 1 { Token::from(piece[0]) } else { 1_000_000 };
            state.observe(token, &piece).expect("free or fitting");
            piece.clear();
        }
    }
    match state.needs_mask() {
        false => Outcome::Free,
        true => Outcome::Constrained { accepting: state.is_accepting() },
    }
}

/// All cuts of short texts, a sample for long ones.
fn every_cut(text: &str) -> impl Iterator<Item = u64> {
    let all = if text.len() <= 13 { 1 << text.len() } else { 3000 };
    (0..all).map(move |i| if text.len() <= 13 { i } else { i * 0x9e37_79b9_7f4a_7c15 })
}

#[track_caller]
fn expect(grammar: &CompiledGrammar, trigger: &GrammarTrigger, text: &str, outcome: Outcome) {
    for cuts in every_cut(text) {
        assert_eq!(run(grammar, trigger, text, cuts), outcome, "{text:?} cut by {cuts:b}");
    }
}

const DONE: Outcome = Outcome::Constrained { accepting: true };
const OPEN: Outcome = Outcome::Constrained { accepting: false };

#[test]
fn exclusive_triggers_at_any_place() {
    let world = World::bytes();
    let grammar = world.compile(Grammar::Regex("[0-9]{2}".into()));
    let end = trigger(&["</t>"], false, false);
    expect(&grammar, &end, "ab</t>", OPEN);
    expect(&grammar, &end, "<</t</t>4", OPEN);
    expect(&grammar, &end, "a</t>42", DONE);
    expect(&grammar, &end, "a</t", Outcome::Free);
    expect(&grammar, &end, "", Outcome::Free);
    // Repetitive prefixes.
    let aab = trigger(&["aab"], false, false);
    expect(&grammar, &aab, "aaaab42", DONE);
    expect(&grammar, &aab, "aaaaaa", Outcome::Free);
    // Of several triggers, the one that is complete first.
    let two = trigger(&["long", "lon", "on"], false, false);
    expect(&grammar, &two, "lon42", DONE);
    // An empty trigger acts at once; an empty list of triggers never acts.
    expect(&grammar, &trigger(&[""], false, false), "42", DONE);
    expect(&grammar, &trigger(&[], false, false), "42", Outcome::Free);
}

#[test]
fn triggers_at_the_start_only() {
    let world = World::bytes();
    let grammar = world.compile(Grammar::Regex("<t>[0-9]{2}".into()));
    let start = trigger(&["<t>", "<u>"], true, true);
    expect(&grammar, &start, "<t>42", DONE);
    expect(&grammar, &start, " \n<t>4", OPEN);
    expect(&grammar, &start, " \n <", Outcome::Free);
    expect(&grammar, &start, "a<t>42", Outcome::Free);
    expect(&grammar, &start, "<x><t>42", Outcome::Free);
    expect(&grammar, &start, "   ", Outcome::Free);
    expect(&grammar, &trigger(&[" <t>"], true, true), "  <t>42", DONE);
}

#[test]
fn inclusive_triggers_are_part_of_the_grammar() {
    let world = World::bytes();
    let grammar = world.compile(Grammar::Lark("start: \"<t>\" /[0-9]/ \"</t>\"".into()));
    let both = trigger(&["<t>"], false, true);
    expect(&grammar, &both, "so <t>4</t>", DONE);
    expect(&grammar, &both, "<t>", OPEN);
}

#[test]
fn text_after_the_trigger_that_does_not_fit_frees_the_output() {
    let world = World::merges();
    let grammar = world.compile(Grammar::JsonObject);
    let think = trigger(&["</think>"], false, false);
    let after = |last: &str| {
        let mut state = TriggeredGrammar::new(&grammar, Some(&think));
        for piece in ["well", "</", "think", last] {
            state.observe(1_000_000, piece.as_bytes()).expect("free");
        }
        state.needs_mask()
    };
    assert!(after(">"));
    assert!(after(">{"));
    // White space in the marker's last token is not part of the grammar's text.
    assert!(after(">\n\n"));
    assert!(after(">\n\n {\""));
    assert!(!after(">x"));
}

#[test]
fn control_tokens_as_triggers() {
    let world = World::merges();
    let (marker, brace) = (world.special("<tool_call>"), world.token("{\""));
    let as_token = world.compile(Grammar::Lark("start: <tool_call> \"{\\\"\" /[a-z]/".into()));
    let as_text = world.compile(Grammar::Lark("start: \"<tool_call>\" \"{\\\"\" /[a-z]/".into()));
    let tool = trigger(&["<tool_call>"], false, true);
    // The marker is output as token or as text, and the grammar names it as token or as text.
    for grammar in [&as_token, &as_text] {
        let text = ["<tool", "_call", ">{"].map(|piece| (world.token(piece), piece));
        let outputs: [&[(Token, &str)]; 2] = [&[(marker, "<tool_call>"), (brace, "{\"")], &text];
        for output in outputs {
            let mut state = TriggeredGrammar::new(grammar, Some(&tool));
            for (token, piece) in output {
                state.observe(*token, piece.as_bytes()).expect("allowed");
            }
            assert!(state.needs_mask() && !state.is_finished());
            let rest = if output.len() == 2 { "a" } else { "\"a" };
            for byte in rest.bytes() {
                let mask = state.mask().expect("a mask").expect("constrained");
                assert!(bit(mask, byte.into()));
                state.observe(byte.into(), &[byte]).expect("allowed");
            }
            assert!(state.is_finished());
        }
    }
}

#[test]
fn the_search_remembers_no_more_than_it_needs() {
    let world = World::bytes();
    let grammar = world.compile(Grammar::JsonObject);
    for at_start_only in [false, true] {
        let mut state =
            TriggeredGrammar::new(&grammar, Some(&trigger(&["<tool>"], at_start_only, true)));
        for i in 0..20_000u32 {
            let piece: &[u8] = [&b" "[..], b"<to", b"", b"long piece of text"][i as usize % 4];
            state.observe(i, if at_start_only { b" \n" } else { piece }).expect("free");
            assert!(state.remembered() < 64, "{} bytes", state.remembered());
        }
    }
}
