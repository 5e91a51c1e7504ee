//! Python's text representations of template values: `str`, `repr` and `json.dumps`.
//!
//! Templates were written for CPython, so a list that a template prints must look as in CPython.
//! Every writer here is bounded: a value that shares parts (`[x, x]` forty times) is small in
//! memory but exponentially large as text.

use super::integers;
use std::fmt;

use minijinja::value::{Value, ValueKind};

/// Maximum size of one value as text, and of one prompt, in bytes.
pub(super) const MAX_TEXT: usize = 4 << 20;

/// Reason why a value cannot be written as text.
#[derive(Debug, PartialEq)]
pub(super) enum TextError {
    /// The text is longer than [`MAX_TEXT`].
    TooLong,
    /// `json.dumps` raises a TypeError for this kind of value.
    NotJson(String),
}

impl From<fmt::Error> for TextError {
    fn from(_: fmt::Error) -> Self {
        TextError::TooLong
    }
}

/// A string that cannot grow beyond [`MAX_TEXT`].
#[derive(Default)]
pub(super) struct Bounded(String);

impl Bounded {
    pub(super) fn into_string(self) -> String {
        self.0
    }
}

impl fmt::Write for Bounded {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > MAX_TEXT {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

/// Converts a JSON value to a template value; objects keep their order.
pub(super) fn from_json(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::String(text) => match integers::integer(text) {
            Some(integer) => Value::from(integer),
            None => Value::from(text.as_str()),
        },
        Json::Array(items) => items.iter().map(from_json).collect::<Vec<Value>>().into(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (key.clone(), from_json(item))))
        }
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(n), _, _) => Value::from(n),
            (_, Some(n), _) => Value::from(n),
            (_, _, x) => Value::from(x.unwrap_or(f64::NAN)),
        },
    }
}

/// `str(value)`.
pub(super) fn to_str(value: &Value) -> Result<String, TextError> {
    let mut out = Bounded::default();
    write_str(&mut out, value)?;
    Ok(out.into_string())
}

/// Writes `str(value)`; jinja2 prints an undefined value as nothing.
pub(super) fn write_str(out: &mut dyn fmt::Write, value: &Value) -> fmt::Result {
    match value.kind() {
        ValueKind::Undefined => Ok(()),
        ValueKind::String => out.write_str(value.as_str().unwrap_or_default()),
        _ => write_repr(out, value),
    }
}

/// Writes `repr(value)`.
pub(super) fn write_repr(out: &mut dyn fmt::Write, value: &Value) -> fmt::Result {
    match value.kind() {
        ValueKind::Undefined => out.write_str("Undefined"),
        ValueKind::String => write_repr_string(out, value.as_str().unwrap_or_default()),
        ValueKind::Number => write_number(out, value, ["nan", "inf", "-inf"]),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            out.write_str(if tuple { "(" } else { "[" })?;
            let mut count = 0;
            for item in value.try_iter().into_iter().flatten() {
                if count > 0 {
                    out.write_str(", ")?;
                }
                write_repr(out, &item)?;
                count += 1;
            }
            out.write_str(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                _ => "]",
            })
        }
        ValueKind::Map => {
            out.write_str("{")?;
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    out.write_str(", ")?;
                }
                write_repr(out, &key)?;
                out.write_str(": ")?;
                write_repr(out, &value.get_item(&key).unwrap_or_default())?;
            }
            out.write_str("}")
        }
        // None, True and False are printed as in Python already.
        _ => write!(out, "{value}"),
    }
}

fn write_repr_string(out: &mut dyn fmt::Write, text: &str) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            c if c == quote => write!(out, "\\{c}")?,
            c if is_printable(c) => out.write_char(c)?,
            c => match c as u32 {
                n @ 0..=0xff => write!(out, "\\x{n:02x}")?,
                n @ 0..=0xffff => write!(out, "\\u{n:04x}")?,
                n => write!(out, "\\U{n:08x}")?,
            },
        }
    }
    out.write_char(quote)
}

/// `str.isprintable` for assigned characters; std has no table of unassigned ones.
fn is_printable(c: char) -> bool {
    !(c.is_control()
        || (c != ' ' && c.is_whitespace())
        || matches!(c as u32, 0xad | 0x200b..=0x200f | 0x202a..=0x202e | 0x2060..=0x206f)
        || matches!(c as u32, 0xfeff | 0xe000..=0xf8ff | 0xf0000..))
}

/// Writes an int or a float as Python does; `specials` are the texts for NaN and the infinities.
fn write_number(out: &mut dyn fmt::Write, value: &Value, specials: [&str; 3]) -> fmt::Result {
    if value.is_integer() {
        return write!(out, "{value}");
    }
    match f64::try_from(value.clone()) {
        Ok(x) if x.is_nan() => out.write_str(specials[0]),
        Ok(x) if x.is_infinite() => out.write_str(specials[if x > 0.0 { 1 } else { 2 }]),
        Ok(x) => out.write_str(&float_repr(x)),
        Err(_) => write!(out, "{value}"),
    }
}

/// `repr` of a finite float: the shortest digits, with an exponent outside 1e-4 ≤ |x| < 1e16.
fn float_repr(x: f64) -> String {
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if !(-4..16).contains(&e) => {
            format!("{digits}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
        }
        _ => format!("{x:?}"),
    }
}

/// Keyword arguments of `json.dumps` that templates use.
pub(super) struct JsonStyle {
    pub(super) ensure_ascii: bool,
    /// One level of indentation; `None` writes a single line.
    pub(super) indent: Option<String>,
    /// Separators between items, and between a key and its value.
    pub(super) separators: Option<(String, String)>,
    pub(super) sort_keys: bool,
}

/// `json.dumps(value, …)`.
pub(super) fn to_json(value: &Value, style: &JsonStyle) -> Result<String, TextError> {
    let mut out = Bounded::default();
    write_json(&mut out, value, style, 0)?;
    Ok(out.into_string())
}

fn write_json(
    out: &mut Bounded,
    value: &Value,
    style: &JsonStyle,
    depth: usize,
) -> Result<(), TextError> {
    use fmt::Write;
    match value.kind() {
        ValueKind::None => out.write_str("null")?,
        ValueKind::Bool => out.write_str(if value.is_true() { "true" } else { "false" })?,
        ValueKind::Number => write_number(out, value, ["NaN", "Infinity", "-Infinity"])?,
        ValueKind::String => {
            write_json_string(out, value.as_str().unwrap_or_default(), style.ensure_ascii)?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter().into_iter().flatten().collect();
            write_json_items(out, ['[', ']'], items.len(), style, depth, |out, index| {
                write_json(out, &items[index], style, depth + 1)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter().into_iter().flatten().collect();
            if style.sort_keys {
                keys.sort();
            }
            let colon = style.separators.as_ref().map_or(": ", |s| s.1.as_str());
            write_json_items(out, ['{', '}'], keys.len(), style, depth, |out, index| {
                write_json_string(out, &json_key(&keys[index])?, style.ensure_ascii)?;
                out.write_str(colon)?;
                let item = value.get_item(&keys[index]).unwrap_or_default();
                write_json(out, &item, style, depth + 1)
            })?;
        }
        ValueKind::Undefined => return Err(TextError::NotJson("Undefined".into())),
        kind => return Err(TextError::NotJson(kind.to_string())),
    }
    Ok(())
}

/// Brackets, separators and line breaks around `count` items.
fn write_json_items(
    out: &mut Bounded,
    brackets: [char; 2],
    count: usize,
    style: &JsonStyle,
    depth: usize,
    mut item: impl FnMut(&mut Bounded, usize) -> Result<(), TextError>,
) -> Result<(), TextError> {
    use fmt::Write;
    let newline = |out: &mut Bounded, depth: usize| -> fmt::Result {
        let Some(indent) = &style.indent else { return Ok(()) };
        out.write_char('\n')?;
        (0..depth).try_for_each(|_| out.write_str(indent))
    };
    let default = if style.indent.is_some() { "," } else { ", " };
    let comma = style.separators.as_ref().map_or(default, |s| s.0.as_str());
    out.write_char(brackets[0])?;
    for index in 0..count {
        if index > 0 {
            out.write_str(comma)?;
        }
        newline(out, depth + 1)?;
        item(out, index)?;
    }
    if count > 0 {
        newline(out, depth)?;
    }
    Ok(out.write_char(brackets[1])?)
}

fn json_key(key: &Value) -> Result<String, TextError> {
    let mut text = Bounded::default();
    match key.kind() {
        ValueKind::String => return Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => return Ok("null".into()),
        ValueKind::Bool => return Ok(if key.is_true() { "true" } else { "false" }.into()),
        ValueKind::Number => write_number(&mut text, key, ["NaN", "Infinity", "-Infinity"])?,
        kind => return Err(TextError::NotJson(format!("a key of type {kind}"))),
    }
    Ok(text.into_string())
}

fn write_json_string(out: &mut Bounded, text: &str, ensure_ascii: bool) -> fmt::Result {
    use fmt::Write;
    out.write_char('"')?;
    for c in text.chars() {
        match c {
            '"' => out.write_str("\\\"")?,
            '\\' => out.write_str("\\\\")?,
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            '\u{8}' => out.write_str("\\b")?,
            '\u{c}' => out.write_str("\\f")?,
            c if c < ' ' || (ensure_ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    write!(out, "\\u{unit:04x}")?;
                }
            }
            c => out.write_char(c)?,
        }
    }
    out.write_char('"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_as_in_python() {
        for (x, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e300, "1.5e+300"),
            (-0.0, "-0.0"),
        ] {
            assert_eq!(float_repr(x), text);
        }
    }

    #[test]
    fn strings_and_containers_are_quoted_as_in_python() {
        let value = from_json(&serde_json::json!({"a": ["it's", "\"", "\n\u{7f}é"], "b": null}));
        assert_eq!(to_str(&value).unwrap(), "{'a': [\"it's\", '\"', '\\n\\x7fé'], 'b': None}");
    }

    #[test]
    fn shared_values_do_not_explode() {
        let mut value = Value::from("x");
        for _ in 0..60 {
            value = Value::from(vec![value.clone(), value]);
        }
        assert_eq!(to_str(&value), Err(TextError::TooLong));
    }
}
