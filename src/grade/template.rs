//! Templates: `{{item.question}}`, `{{sample.output_text}}`, `{{sample.output_json.answer.0}}`.
//!
//! A string is inserted unchanged, any other value as compact JSON. A path consists of keys of
//! objects and positions in lists, separated by dots; a key that contains a dot or a brace cannot
//! be named. There is no escape: a template cannot contain a literal `{{`.

use super::fields::show;
use super::{Fault, Flag};
use serde_json::Value;
use std::io::Write;
use std::sync::OnceLock;

/// Maximum length of a template and of a text rendered from one, in bytes.
pub(super) const LONGEST: usize = 1 << 20;
/// Template that renders the sample's text.
pub(super) const OUTPUT_TEXT: &str = "{{sample.output_text}}";
const LONGEST_PATH: usize = 64;

/// Input of a grader: a line of the data, and the model's output for it.
#[derive(Debug)]
pub struct Context<'a> {
    item: &'a Value,
    output_text: &'a str,
    output_json: OnceLock<Option<Value>>,
}

impl<'a> Context<'a> {
    pub fn new(item: &'a Value, output_text: &'a str) -> Self {
        Self { item, output_text, output_json: OnceLock::new() }
    }

    pub fn item(&self) -> &'a Value {
        self.item
    }

    pub fn output_text(&self) -> &'a str {
        self.output_text
    }

    /// The sample as JSON, parsed once.
    pub fn output_json(&self) -> Option<&Value> {
        self.output_json.get_or_init(|| json_of(self.output_text)).as_ref()
    }
}

/// Parses a text as JSON: the whole text, or the content of one fenced block that is the whole
/// text.
pub(super) fn json_of(text: &str) -> Option<Value> {
    if text.len() > LONGEST {
        return None;
    }
    let text = text.trim();
    let fenced = || text.strip_prefix("```json")?.strip_suffix("```");
    // A fence inside would begin a second block; no line of strict JSON starts with a fence.
    let inner = fenced().filter(|inner| !inner.contains("\n```"));
    serde_json::from_str(inner.unwrap_or(text)).ok()
}

/// Error message if a template among the texts of a grader cannot be filled from an item.
pub(super) fn missing_key(grader: &Value, item: &Value) -> Option<String> {
    match grader {
        Value::String(text) if text.contains("{{") => {
            let template = Template::parse(text.clone()).ok()?;
            template.pieces.iter().find_map(|piece| match piece {
                Piece::Item(path) => find(item, path).err().map(|at| missing("item", path, at).why),
                _ => None,
            })
        }
        Value::Array(list) => list.iter().find_map(|value| missing_key(value, item)),
        Value::Object(map) => map.values().find_map(|value| missing_key(value, item)),
        _ => None,
    }
}

/// A text with placeholders.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Template {
    source: String,
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Item(Vec<String>),
    OutputText,
    OutputJson(Vec<String>),
}

impl Template {
    /// Splits a template into its pieces; the error describes what is wrong.
    pub(super) fn parse(source: String) -> Result<Self, String> {
        if source.len() > LONGEST {
            return Err(format!("it may be {LONGEST} bytes long, not {}", source.len()));
        }
        let mut pieces = Vec::new();
        let mut rest = source.as_str();
        while let Some((text, after)) = rest.split_once("{{") {
            let Some((name, after)) = after.split_once("}}") else {
                return Err("`{{` is not closed by `}}`".to_owned());
            };
            if !text.is_empty() {
                pieces.push(Piece::Text(text.to_owned()));
            }
            pieces.push(Piece::named(name.trim())?);
            rest = after;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self { source, pieces })
    }

    pub(super) fn source(&self) -> &str {
        &self.source
    }

    /// Renders the text for one sample.
    pub(super) fn render(&self, context: &Context<'_>) -> Result<String, Fault> {
        let mut text = Vec::new();
        self.render_into(context, &mut text, LONGEST)?;
        // Only whole strings and JSON were written, which are UTF-8.
        String::from_utf8(text).map_err(|_| too_long())
    }

    /// Appends the rendered text; `text` must not become longer than `most` bytes.
    pub(super) fn render_into(
        &self,
        context: &Context<'_>,
        text: &mut Vec<u8>,
        most: usize,
    ) -> Result<(), Fault> {
        let mut out = Bounded { text, most };
        for piece in &self.pieces {
            let value = match piece {
                Piece::Text(piece) => {
                    out.string(piece)?;
                    continue;
                }
                Piece::OutputText => {
                    out.string(context.output_text)?;
                    continue;
                }
                Piece::Item(path) => {
                    find(context.item, path).map_err(|at| missing("item", path, at))?
                }
                Piece::OutputJson(path) => {
                    let json = context.output_json().ok_or_else(|| {
                        Fault::new(Flag::Sample, "the sample is not JSON, sample.output_json is")
                    })?;
                    find(json, path).map_err(|at| missing("sample.output_json", path, at))?
                }
            };
            match value {
                Value::String(string) => out.string(string)?,
                other => serde_json::to_writer(&mut out, other).map_err(|_| too_long())?,
            }
        }
        Ok(())
    }
}

impl Piece {
    /// Parses the name between braces.
    fn named(name: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "{{{{{name}}}}} names nothing: there are item, with a path such as item.answer, \
                 sample.output_text, and sample.output_json, with or without a path",
                name = show(&Value::from(name)).trim_matches('"')
            )
        };
        let (space, rest) = name.split_once('.').unwrap_or((name, ""));
        match space {
            "item" if name == "item" => Ok(Self::Item(Vec::new())),
            "item" => path(rest).map(Self::Item).ok_or_else(unknown),
            "sample" if rest == "output_text" => Ok(Self::OutputText),
            "sample" if rest == "output_json" => Ok(Self::OutputJson(Vec::new())),
            "sample" => {
                let rest = rest.strip_prefix("output_json.").and_then(path);
                rest.map(Self::OutputJson).ok_or_else(unknown)
            }
            _ => Err(unknown()),
        }
    }
}

/// The steps of a path; `None` if one is empty.
fn path(text: &str) -> Option<Vec<String>> {
    let steps: Vec<String> = text.split('.').take(LONGEST_PATH + 1).map(str::to_owned).collect();
    let fine = |step: &String| !step.is_empty() && !step.contains(['{', '}', '[', ']', '\n']);
    (steps.len() <= LONGEST_PATH && steps.iter().all(fine)).then_some(steps)
}

/// The value at a path, or the number of steps that could be taken.
fn find<'a>(mut value: &'a Value, path: &[String]) -> Result<&'a Value, usize> {
    for (at, step) in path.iter().enumerate() {
        let next = match value {
            Value::Object(map) => map.get(step),
            Value::Array(list) => step.parse().ok().and_then(|index: usize| list.get(index)),
            _ => None,
        };
        value = next.ok_or(at)?;
    }
    Ok(value)
}

fn missing(space: &str, path: &[String], at: usize) -> Fault {
    let step = path.get(at).map_or("", String::as_str);
    let before = [space].into_iter().chain(path[..at].iter().map(String::as_str));
    let before = before.collect::<Vec<_>>().join(".");
    Fault::new(Flag::Variable, format!("{before} has no {}", show(&Value::from(step))))
}

fn too_long() -> Fault {
    Fault::new(Flag::Other, format!("a filled template is longer than {LONGEST} bytes"))
}

/// Text with a maximum length.
struct Bounded<'a> {
    text: &'a mut Vec<u8>,
    most: usize,
}

impl Bounded<'_> {
    fn string(&mut self, text: &str) -> Result<(), Fault> {
        self.write_all(text.as_bytes()).map_err(|_| too_long())
    }
}

impl Write for Bounded<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.most.saturating_sub(self.text.len()) {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(template: &str, item: &Value, output: &str) -> Result<String, Fault> {
        Template::parse(template.to_owned()).unwrap().render(&Context::new(item, output))
    }

    #[test]
    fn places_are_filled() {
        let item = json!({"q": "2+2?", "n": 4, "list": [{"x": "é"}, null], "a b": true, "o": {"z": 1, "a": [1.5]}});
        let output = r#"{"answer": {"list": [7, "sieben"]}}"#;
        for (template, expected) in [
            ("", ""),
            ("plain } }} {", "plain } }} {"),
            ("{{item.q}}", "2+2?"),
            ("{{  item.q\t}}!", "2+2?!"),
            ("<{{item.n}}{{item.n}}>", "<44>"),
            ("{{item.list.0.x}}", "é"),
            ("{{item.list.1}}", "null"),
            ("{{item.list}}", "[{\"x\":\"é\"},null]"),
            ("{{item.a b}}", "true"),
            ("{{item.o}}", "{\"z\":1,\"a\":[1.5]}"),
            ("{{sample.output_text}}", output),
            ("{{sample.output_json.answer.list.1}}", "sieben"),
            ("{{ sample.output_json.answer.list.0 }}", "7"),
            ("{{sample.output_json}}", "{\"answer\":{\"list\":[7,\"sieben\"]}}"),
        ] {
            assert_eq!(render(template, &item, output).as_deref(), Ok(expected), "{template}");
        }
    }

    #[test]
    fn what_cannot_be_named_is_refused() {
        for template in [
            "{{foo.x}}",
            "{{sample.choices}}",
            "{{sample}}",
            "{{sample.output_text.x}}",
            "{{sample.output_json.}}",
            "{{sample.output_jsonx}}",
            "{{item.}}",
            "{{item..a}}",
            "{{item.a[0]}}",
            "{{items.a}}",
            "{{{item.a}}}",
            "{{}}",
            "{{ }}",
            "{{Item.a}}",
        ] {
            let error = Template::parse(template.to_owned()).unwrap_err();
            assert!(error.contains("sample.output_text"), "{template}: {error}");
        }
        assert!(Template::parse("a {{item.x".to_owned()).unwrap_err().contains("not closed"));
        assert!(Template::parse("x".repeat(LONGEST + 1)).unwrap_err().contains("1048576"));
        let long = format!("{{{{item{}}}}}", ".a".repeat(LONGEST_PATH + 1));
        assert!(Template::parse(long).unwrap_err().len() < 400);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let item = json!({"a": {"b": [1]}, "s": "text"});
        for (template, why) in [
            ("{{item.x}}", "item has no \"x\""),
            ("{{item.a.b.1}}", "item.a.b has no \"1\""),
            ("{{item.a.b.-1}}", "item.a.b has no \"-1\""),
            ("{{item.s.0}}", "item.s has no \"0\""),
        ] {
            let fault = render(template, &item, "").unwrap_err();
            assert_eq!(fault, Fault::new(Flag::Variable, why));
        }
        let fault = render("{{sample.output_json.b}}", &item, "{\"a\": 1}").unwrap_err();
        assert_eq!(fault, Fault::new(Flag::Variable, "sample.output_json has no \"b\""));
        let fault = render("{{sample.output_json.b}}", &item, "no").unwrap_err();
        assert_eq!(fault.flag, Flag::Sample);
    }

    #[test]
    fn json_stands_alone_or_in_one_fence() {
        for (text, is) in [
            ("{\"a\": 1}", true),
            ("  7\n", true),
            ("```json\n{\"a\": \"```\"}\n```", true),
            ("\n```json {\"a\": 1}```  ", true),
            ("```json\n1\n```\n```json\n2\n```", false),
            ("```\n1\n```", false),
            ("Here: ```json\n1\n```", false),
            ("```json", false),
            ("```json```", false),
            ("", false),
            ("{'a': 1}", false),
            ("1 2", false),
        ] {
            assert_eq!(json_of(text).is_some(), is, "{text}");
        }
        assert_eq!(json_of(&"[".repeat(100_000)), None);
        assert_eq!(json_of(&format!("{}1{}", "[".repeat(200), "]".repeat(200))), None);
        assert_eq!(json_of(&format!("\"{}\"", "x".repeat(LONGEST))), None);
    }

    #[test]
    fn texts_are_bounded() {
        let item = json!({"s": "x".repeat(1 << 19), "list": vec!["é".repeat(1000); 400]});
        assert!(render("{{item.s}}{{item.s}}", &item, "").is_ok());
        assert_eq!(render("{{item.s}}{{item.s}}.", &item, "").unwrap_err().flag, Flag::Other);
        assert_eq!(render("{{item.list}}{{item.s}}", &item, "").unwrap_err().flag, Flag::Other);
        let many = "{{sample.output_text}}".repeat(40_000);
        assert_eq!(render(&many, &item, "").as_deref(), Ok(""));
        assert_eq!(render(&many, &item, &"y".repeat(1 << 20)).unwrap_err().flag, Flag::Other);
    }
}
