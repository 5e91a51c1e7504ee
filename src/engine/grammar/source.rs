//! Converts a request's grammar to llguidance's format, makes the checks that need no compilation,
//! and words the error messages.

use crate::ipc::{EngineError, Grammar};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::regex_to_lark;
use serde_json::{Value, json};

/// Longest grammar text, in bytes.
pub const MAX_GRAMMAR_BYTES: usize = 256 * 1024;
/// Deepest nesting of a JSON schema's text.
pub const MAX_DEPTH: usize = 64;
/// White space between JSON tokens, as a regular expression: one or two spaces, or one line break
/// with indentation. It is bounded, since a model under a mask that always allows white space can
/// write nothing else forever.
///
/// JSON inside a Lark grammar (`%json`) uses llguidance's own, unbounded pattern, unless its schema
/// sets `"x-guidance": {"whitespace_pattern": ...}` to this one.
pub const JSON_WHITESPACE: &str = r"[ ]{1,2}|\r?\n[ \t]{0,48}";
/// Longest part of llguidance's message that is included in an error, in bytes.
const MAX_CAUSE: usize = 240;

/// The resource limits of a grammar. llguidance counts fuel, not time, so the same grammar always
/// gives the same result; the times are for one core of 2024.
pub(super) fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        // About 20 ms to build the lexer.
        initial_lexer_fuel: 1_000_000,
        // About 15 ms per mask.
        step_lexer_fuel: 200_000,
        // About 3 ms per mask.
        step_max_items: 50_000,
        // About 1-2 kB each.
        max_lexer_states: 50_000,
        // Symbols. Some of the work is quadratic in the number of symbols possible at one position.
        max_grammar_size: 40_000,
        precompute_large_lexemes: true,
        // Verbose errors would contain the grammar and the text so far.
        verbose_errors: false,
    }
}

fn text(grammar: &Grammar) -> &str {
    match grammar {
        Grammar::JsonSchema(text)
        | Grammar::LenientJsonSchema(text)
        | Grammar::Regex(text)
        | Grammar::Lark(text)
        | Grammar::JsonLark { lark: text, .. } => text,
        Grammar::JsonObject => "",
    }
}

fn noun(grammar: &Grammar) -> &'static str {
    match grammar {
        Grammar::JsonSchema(_) | Grammar::LenientJsonSchema(_) | Grammar::JsonObject => {
            "JSON schema"
        }
        Grammar::Regex(_) => "regular expression",
        Grammar::Lark(_) => "Lark grammar",
        Grammar::JsonLark { .. } => "grammar of tool calls",
    }
}

/// Checks size and nesting and converts the text into llguidance's grammar.
///
/// # Errors
/// An invalid-request error that names the field and what to change.
pub(super) fn top_level(grammar: &Grammar) -> Result<TopLevelGrammar, EngineError> {
    let invalid = |message: String| EngineError::invalid(grammar.param(), message);
    let length = text(grammar).len();
    if length > MAX_GRAMMAR_BYTES {
        return Err(invalid(format!(
            "the {} is {length} bytes long; the limit is {MAX_GRAMMAR_BYTES}",
            noun(grammar)
        )));
    }
    match grammar {
        Grammar::JsonObject => Ok(json_grammar(json!({"type": "object"}), false)),
        Grammar::Regex(pattern) => Ok(TopLevelGrammar::from_regex(&whole_match(pattern))),
        Grammar::Lark(text) if text.trim().is_empty() => {
            Err(invalid("the Lark grammar is empty; it needs a rule named start".into()))
        }
        Grammar::Lark(text) if text.matches('|').count() > MAX_ALTERNATIVES => {
            Err(invalid(format!(
                "the Lark grammar has more than {MAX_ALTERNATIVES} alternatives; write sets of words \
             as one regular expression"
            )))
        }
        Grammar::Lark(text) | Grammar::JsonLark { lark: text, .. } => {
            Ok(TopLevelGrammar::from_lark(text.clone()))
        }
        Grammar::JsonSchema(text) | Grammar::LenientJsonSchema(text) => {
            let lenient = matches!(grammar, Grammar::LenientJsonSchema(_));
            if depth(text) > MAX_DEPTH {
                return Err(invalid(format!(
                    "the JSON schema nests deeper than {MAX_DEPTH} levels; move inner parts to \
                     $defs and refer to them with $ref"
                )));
            }
            let schema: Value = serde_json::from_str(text)
                .map_err(|error| invalid(format!("the JSON schema is not valid JSON: {error}")))?;
            if work(&schema) > MAX_WORK {
                return Err(invalid(
                    "the JSON schema has objects of too many properties (about 2,000) or \
                     patternProperties (about 60); split them"
                        .into(),
                ));
            }
            match schema {
                Value::Object(_) => Ok(json_grammar(schema, lenient)),
                Value::Bool(true) => Ok(json_grammar(json!({}), lenient)),
                Value::Bool(false) => {
                    Err(invalid("the JSON schema false allows nothing; use an object".into()))
                }
                _ => Err(invalid("the JSON schema must be a JSON object".into())),
            }
        }
    }
}

/// Sets the options of llguidance's JSON compiler; overrides those in the schema.
fn json_grammar(mut schema: Value, lenient: bool) -> TopLevelGrammar {
    if let Some(object) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": JSON_WHITESPACE, "lenient": lenient});
        object.insert("x-guidance".into(), options);
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// The pattern in llguidance's form. The whole output must match, so anchors at the ends are
/// redundant and llguidance has none; `\d` and `\w` are ASCII, as in JSON schema's patterns.
fn whole_match(pattern: &str) -> String {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let pattern = match pattern.strip_suffix('$') {
        Some(rest) if rest.bytes().rev().take_while(|&b| b == b'\\').count() % 2 == 0 => rest,
        _ => pattern,
    };
    regex_to_lark(pattern, "dw")
}

/// Most alternatives of a Lark grammar: llguidance's first mask is quadratic in them.
const MAX_ALTERNATIVES: usize = 10_000;
/// Largest [`work`] of a JSON schema: 2,000 properties of one object, about a second.
const MAX_WORK: usize = 4_500_000;

/// Number of steps in those parts of llguidance's JSON compiler that are quadratic and use no fuel:
/// ordering an object's properties, and checking that its patterns are disjoint.
fn work(schema: &Value) -> usize {
    let size = |value: &Value| value.as_object().map_or(0, |object| object.len());
    match schema {
        Value::Object(object) => {
            let patterns = object.get("patternProperties").map_or(0, size);
            let own = object.len().pow(2) + 1000 * patterns.pow(2);
            own + object.values().map(work).sum::<usize>()
        }
        Value::Array(items) => items.iter().map(work).sum(),
        _ => 0,
    }
}

/// Deepest nesting of brackets outside of strings.
fn depth(text: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    let (mut in_string, mut escaped) = (false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// The error message for a grammar that llguidance refuses.
pub(super) fn refusal(grammar: &Grammar, cause: &str) -> EngineError {
    let advice = match grammar {
        _ if cause.contains("coerce_one_of") => {
            return EngineError::invalid(
                grammar.param(),
                "the schema's oneOf has branches that are not told apart by a required constant \
                 property; use anyOf instead",
            );
        }
        Grammar::JsonSchema(_) | Grammar::LenientJsonSchema(_) | Grammar::JsonObject => {
            "remove or rewrite the part named, or simplify the schema"
        }
        Grammar::Regex(_) => {
            "use plain regular expressions (no look-around, back-references or anchors) with small \
             repetition counts"
        }
        Grammar::JsonLark { .. } => "simplify the tools' parameters",
        Grammar::Lark(_) => "correct the part named (see llguidance's Lark syntax), or simplify it",
    };
    let noun = noun(grammar);
    let message = match cause_line(cause) {
        Some(line) => format!("the {noun} cannot be used: {line}; {advice}"),
        None => format!("the {noun} cannot be used; {advice}"),
    };
    EngineError::invalid(grammar.param(), message)
}

/// The first line of a llguidance error, shortened. `None` for a panic, whose text describes
/// llguidance's internals.
fn cause_line(cause: &str) -> Option<String> {
    let line = cause.lines().map(str::trim).find(|line| !line.is_empty())?;
    if line.starts_with("NoExtension") {
        return Some("it allows no text of this model at all".into());
    }
    if line.starts_with("panic") || line.contains("<non-verbose/>") {
        return None;
    }
    let mut end = line.len().min(MAX_CAUSE);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    let cut = if end < line.len() { "..." } else { "" };
    Some(format!("{}{cut}", line[..end].trim_end_matches(['.', ':', ';'])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_ignores_strings() {
        assert_eq!(depth(r#"{"a": [{"b": "[[[\"{{{"}]}"#), 3);
        assert_eq!(depth("]]]]{"), 1);
        assert_eq!(depth(""), 0);
    }

    #[test]
    fn anchors_at_the_ends_are_dropped() {
        assert_eq!(whole_match(r"^a|b$"), "a|b");
        assert_eq!(whole_match(r"cost \$"), r"cost \$");
        assert_eq!(whole_match(r"\\$"), r"\\");
        assert_eq!(whole_match(r"/\d"), r"\/[0-9]");
    }

    #[test]
    fn causes_are_one_short_line() {
        assert_eq!(cause_line("\n  bad rule:\nsource"), Some("bad rule".into()));
        assert_eq!(cause_line("panic: oh\n<backtrace>"), None);
        assert!(cause_line(&"é".repeat(400)).is_some_and(|line| line.len() < 250));
    }
}
