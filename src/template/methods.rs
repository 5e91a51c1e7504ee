//! Python's methods of strings, lists and dicts, where minijinja's pycompat differs or is
//! unbounded.

use minijinja::value::{Kwargs, Rest, StringInput, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::engine::text_error;
use super::python::{self, MAX_TEXT, TextError};

/// The environment's unknown-method callback.
pub(super) fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, method, args)?
    {
        return Ok(result);
    }
    match (value.kind(), method) {
        (ValueKind::Map | ValueKind::Seq, "copy") if args.is_empty() => return Ok(value.clone()),
        // jinja2's immutable sandbox forbids these methods; the message states the reason.
        (
            ValueKind::Map | ValueKind::Seq | ValueKind::Iterable,
            "append" | "extend" | "insert" | "pop" | "popitem" | "remove" | "clear" | "update"
            | "setdefault" | "reverse" | "sort",
        ) => {
            let message = format!("access to attribute '{method}' is unsafe in a sandbox");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        (ValueKind::Seq | ValueKind::Iterable, "index") => {
            let (wanted,): (Value,) = from_args(args)?;
            let position = value.try_iter()?.position(|item| item == wanted);
            return position.map(Value::from).ok_or_else(|| invalid("item is not in list"));
        }
        _ => {}
    }
    pycompat::unknown_method_callback(state, value, method, args)
}

/// The `trim` filter: `str(value).strip(chars)`.
pub(super) fn trim(value: &Value, chars: Option<StringInput<'_>>) -> Result<String, Error> {
    let text = python::to_str(value).map_err(text_error)?;
    Ok(strip(&text, chars.as_ref().map(StringInput::as_str), true, true).to_owned())
}

/// The `indent` filter, jinja2's `do_indent(s, width=4, first=False, blank=False)`.
pub(super) fn indent(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Value, Error> {
        match args.get(index) {
            Some(value) => Ok(value.clone()),
            None => Ok(kwargs.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let width = argument(0, "width")?;
    let (first, blank) = (argument(1, "first")?.is_true(), argument(2, "blank")?.is_true());
    kwargs.assert_all_used()?;
    let margin = match (width.as_str(), width.as_i64()) {
        (Some(margin), _) => margin.to_owned(),
        (None, Some(width)) => " ".repeat(width.clamp(0, 1000) as usize),
        (None, None) => " ".repeat(4),
    };
    let mut text = python::to_str(value).map_err(text_error)?;
    text.push('\n');
    let mut out = python::Bounded::default();
    for (index, line) in split_lines(&text).iter().enumerate() {
        let line = line.as_str().unwrap_or_default();
        if index > 0 {
            write(&mut out, "\n")?;
        }
        if if index == 0 { first } else { blank || !line.is_empty() } {
            write(&mut out, &margin)?;
        }
        write(&mut out, line)?;
    }
    Ok(out.into_string())
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let result = match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(text, chars, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, limit, kwargs): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = match separator {
                Some(separator) => separator,
                None => kwargs.get::<Option<Value>>("sep")?.unwrap_or_default(),
            };
            let limit = match limit {
                Some(limit) => limit,
                None => kwargs.get::<Option<i64>>("maxsplit")?.unwrap_or(-1),
            };
            kwargs.assert_all_used()?;
            let limit = usize::try_from(limit).unwrap_or(usize::MAX);
            Value::from(split(text, &separator, limit, method == "rsplit")?)
        }
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            let count = usize::try_from(count.unwrap_or(-1)).unwrap_or(usize::MAX);
            let found = text.matches(old).take(count).count();
            bounded(text.len().saturating_add(found.saturating_mul(new.len())))?;
            Value::from(text.replacen(old, new, count))
        }
        "join" => {
            let (items,): (Value,) = from_args(args)?;
            let mut out = python::Bounded::default();
            for (index, item) in items.try_iter()?.enumerate() {
                let Some(item) = item.as_str() else {
                    return Err(invalid("join expects strings"));
                };
                let separator = if index > 0 { text } else { "" };
                write(&mut out, separator)?;
                write(&mut out, item)?;
            }
            Value::from(out.into_string())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(invalid("empty separator"));
            }
            let parts = match method {
                "partition" => text.split_once(separator).map(|(a, b)| [a, separator, b]),
                _ => text.rsplit_once(separator).map(|(a, b)| [a, separator, b]),
            };
            let missing = if method == "partition" { [text, "", ""] } else { ["", "", text] };
            Value::from(Tuple::from(parts.unwrap_or(missing).map(Value::from)))
        }
        "index" | "rindex" => {
            let (needle,): (&str,) = from_args(args)?;
            let at = if method == "index" { text.find(needle) } else { text.rfind(needle) };
            let at = at.ok_or_else(|| invalid("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "ljust" | "rjust" | "zfill" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            bounded(width)?;
            let fill = if method == "zfill" { "0" } else { fill.unwrap_or(" ") };
            let fill = fill.repeat(width.saturating_sub(text.chars().count()));
            Value::from(if method == "ljust" { text.to_owned() + &fill } else { fill + text })
        }
        "swapcase" | "casefold" | "expandtabs" | "center" => return Err(unknown(method)),
        "splitlines" if args.is_empty() => Value::from(split_lines(text)),
        "format" => {
            // A width in the format may request any amount of padding.
            let wide = text.as_bytes().split(|b| !b.is_ascii_digit()).any(|run| run.len() > 5);
            if wide {
                return Err(text_error(TextError::TooLong));
            }
            return Ok(None);
        }
        _ => return Ok(None),
    };
    Ok(Some(result))
}

fn invalid(message: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn unknown(method: &str) -> Error {
    Error::new(ErrorKind::UnknownMethod, format!("string has no method named {method}"))
}

fn bounded(length: usize) -> Result<(), Error> {
    if length > MAX_TEXT { Err(text_error(TextError::TooLong)) } else { Ok(()) }
}

fn write(out: &mut python::Bounded, text: &str) -> Result<(), Error> {
    std::fmt::Write::write_str(out, text).map_err(|error| text_error(error.into()))
}

/// `str.isspace` of one character: Unicode's white space and the four ASCII separators.
fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

fn strip<'t>(text: &'t str, chars: Option<&str>, left: bool, right: bool) -> &'t str {
    let unwanted = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(unwanted) } else { text };
    if right { text.trim_end_matches(unwanted) } else { text }
}

/// `str.split` and `str.rsplit`; without a separator, runs of white space separate.
fn split(text: &str, separator: &Value, limit: usize, right: bool) -> Result<Vec<Value>, Error> {
    let parts: Vec<&str> = match (separator.as_str(), right) {
        (Some(""), _) => return Err(invalid("empty separator")),
        (Some(s), false) => text.splitn(limit.saturating_add(1), s).collect(),
        (Some(s), true) => text.rsplitn(limit.saturating_add(1), s).collect(),
        (None, _) if !(separator.is_none() || separator.is_undefined()) => {
            return Err(invalid("separator must be a string"));
        }
        (None, right) => {
            let mut parts = Vec::new();
            let mut rest = strip(text, None, true, true);
            while !rest.is_empty() {
                let at = if right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(at) = at.filter(|_| parts.len() < limit) else {
                    parts.push(rest);
                    break;
                };
                let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                let (head, tail) = (&rest[..at], &rest[at + width..]);
                parts.push(if right { tail } else { head });
                rest = if right {
                    strip(head, None, false, true)
                } else {
                    strip(tail, None, true, false)
                };
            }
            parts
        }
    };
    let mut parts: Vec<Value> = parts.into_iter().map(Value::from).collect();
    if right {
        parts.reverse();
    }
    Ok(parts)
}

/// `str.splitlines()`: Python has more line ends than `\n`.
fn split_lines(text: &str) -> Vec<Value> {
    let is_end = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}')
            || matches!(c, '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let Some(at) = rest.find(is_end) else {
            lines.push(Value::from(rest));
            break;
        };
        lines.push(Value::from(&rest[..at]));
        let tail = &rest[at..];
        let width = if tail.starts_with("\r\n") {
            2
        } else {
            tail.chars().next().map_or(1, char::len_utf8)
        };
        rest = &tail[width..];
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_text(text: &str, separator: Option<&str>, limit: usize, right: bool) -> String {
        let separator = separator.map_or(Value::UNDEFINED, Value::from);
        let parts = split(text, &separator, limit, right).unwrap();
        python::to_str(&Value::from(parts)).unwrap()
    }

    #[test]
    fn splits_as_python() {
        assert_eq!(split_text(" a  b c ", None, usize::MAX, false), "['a', 'b', 'c']");
        assert_eq!(split_text(" a  b c ", None, 1, false), "['a', 'b c']");
        assert_eq!(split_text(" a  b c ", None, 1, true), "['a  b', 'c']");
        assert_eq!(split_text("a,b,c", Some(","), 1, false), "['a', 'b,c']");
        assert_eq!(split_text("a,b,c", Some(","), 1, true), "['a,b', 'c']");
        assert_eq!(split_text("", Some(","), 9, false), "['']");
        assert_eq!(split_text("", None, 9, false), "[]");
    }

    #[test]
    fn strips_python_spaces() {
        assert_eq!(strip("\u{1f}\u{a0} x \n", None, true, true), "x");
        assert_eq!(strip("xxaxx", Some("x"), false, true), "xxa");
    }
}
