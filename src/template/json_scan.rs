//! JSON scanner that reads one character at a time, so that arguments stream as they are generated.

/// Nesting beyond which a value is treated as malformed; serde_json stops at the same depth.
const MAX_DEPTH: usize = 127;

/// Effect of one character on a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The value is incomplete.
    More,
    /// The character completes the value.
    End,
    /// The value was complete before the character, which is not part of it (numbers).
    EndBefore,
    /// No JSON value continues with this character.
    Error,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    Value,
    /// After `[`.
    ValueOrEnd,
    /// After `{`.
    KeyOrEnd,
    Key,
    Colon,
    CommaOrEnd,
    /// Inside a string; the flags: a key, after a backslash, hex digits outstanding.
    Text {
        key: bool,
        escape: bool,
        hex: u8,
    },
    /// Inside `true`, `false` or `null`: the remaining text.
    Literal(&'static str),
    Number(Number),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Int,
    Dot,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
}

/// A validating scanner of one JSON value.
#[derive(Clone, Debug)]
pub(super) struct JsonScan {
    expect: Expect,
    /// Open brackets, as their closing characters.
    stack: Vec<char>,
}

impl JsonScan {
    pub(super) fn new() -> Self {
        JsonScan { expect: Expect::Value, stack: Vec::new() }
    }

    /// Reads one character; after any result but [`Step::More`] the scanner must not be used.
    pub(super) fn push(&mut self, c: char) -> Step {
        let space = matches!(c, ' ' | '\n' | '\r' | '\t');
        match self.expect {
            Expect::Text { key, escape, hex } => self.text(c, key, escape, hex),
            Expect::Literal(rest) => match rest.strip_prefix(c) {
                Some("") => self.value_done(),
                Some(rest) => self.go(Expect::Literal(rest)),
                None => Step::Error,
            },
            Expect::Number(number) => self.number(c, number),
            _ if space => Step::More,
            Expect::Value => self.value(c),
            Expect::ValueOrEnd if c == ']' => self.close(c),
            Expect::ValueOrEnd => self.value(c),
            Expect::KeyOrEnd if c == '}' => self.close(c),
            Expect::KeyOrEnd | Expect::Key if c == '"' => {
                self.go(Expect::Text { key: true, escape: false, hex: 0 })
            }
            Expect::Colon if c == ':' => self.go(Expect::Value),
            Expect::CommaOrEnd if c == ',' => match self.stack.last() {
                Some('}') => self.go(Expect::Key),
                _ => self.go(Expect::Value),
            },
            Expect::CommaOrEnd => self.close(c),
            _ => Step::Error,
        }
    }

    fn go(&mut self, expect: Expect) -> Step {
        self.expect = expect;
        Step::More
    }

    fn value_done(&mut self) -> Step {
        self.expect = Expect::CommaOrEnd;
        if self.stack.is_empty() { Step::End } else { Step::More }
    }

    fn close(&mut self, c: char) -> Step {
        if self.stack.pop() == Some(c) { self.value_done() } else { Step::Error }
    }

    fn value(&mut self, c: char) -> Step {
        let (close, next) = match c {
            '{' => ('}', Expect::KeyOrEnd),
            '[' => (']', Expect::ValueOrEnd),
            '"' => return self.go(Expect::Text { key: false, escape: false, hex: 0 }),
            't' => return self.go(Expect::Literal("rue")),
            'f' => return self.go(Expect::Literal("alse")),
            'n' => return self.go(Expect::Literal("ull")),
            '-' => return self.go(Expect::Number(Number::Minus)),
            '0' => return self.go(Expect::Number(Number::Zero)),
            '1'..='9' => return self.go(Expect::Number(Number::Int)),
            _ => return Step::Error,
        };
        if self.stack.len() >= MAX_DEPTH {
            return Step::Error;
        }
        self.stack.push(close);
        self.go(next)
    }

    fn text(&mut self, c: char, key: bool, escape: bool, hex: u8) -> Step {
        let text = |escape, hex| Expect::Text { key, escape, hex };
        match c {
            _ if hex > 0 && c.is_ascii_hexdigit() => self.go(text(false, hex - 1)),
            _ if hex > 0 => Step::Error,
            'u' if escape => self.go(text(false, 4)),
            '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' if escape => self.go(text(false, 0)),
            _ if escape => Step::Error,
            '\\' => self.go(text(true, 0)),
            '"' if key => self.go(Expect::Colon),
            '"' => self.value_done(),
            c if c < ' ' => Step::Error,
            _ => Step::More,
        }
    }

    fn number(&mut self, c: char, number: Number) -> Step {
        use Number::{Dot, Exponent, ExponentDigits, ExponentSign, Fraction, Int, Minus, Zero};
        let next = match (number, c) {
            (Minus, '0') => Zero,
            (Minus, '1'..='9') | (Int, '0'..='9') => Int,
            (Zero | Int, '.') => Dot,
            (Dot | Fraction, '0'..='9') => Fraction,
            (Zero | Int | Fraction, 'e' | 'E') => Exponent,
            (Exponent, '+' | '-') => ExponentSign,
            (Exponent | ExponentSign | ExponentDigits, '0'..='9') => ExponentDigits,
            (Zero | Int | Fraction | ExponentDigits, _) => {
                self.value_done();
                return if self.stack.is_empty() { Step::EndBefore } else { self.push(c) };
            }
            _ => return Step::Error,
        };
        self.go(Expect::Number(next))
    }
}

/// Event of a tool call's JSON object while it is read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CallEvent {
    Start(String),
    /// The next piece of the arguments' JSON text.
    Arguments(String),
    /// The arguments are complete.
    End,
}

/// State of a call object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallStep {
    More,
    /// The object is complete with this character.
    Done,
    /// The object is not a tool call; the character is not consumed.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    Name,
    Arguments,
    /// `type` and `id`, which are ignored.
    Other,
}

#[derive(Clone, Debug)]
enum Part {
    Open,
    KeyOrEnd,
    Key,
    KeyText(JsonScan, String),
    Colon(Key),
    /// White space before a value.
    Before(Key),
    Value(Key, JsonScan, String),
    CommaOrEnd,
}

/// Incremental reader of `{"name": …, "arguments": {…}}` (or `parameters`, in any order).
#[derive(Clone, Debug)]
pub(super) struct CallObject {
    part: Part,
    name: Option<String>,
    /// Arguments that came before the name, or that are a string.
    held: Option<String>,
    has_arguments: bool,
    started: bool,
    /// Whether an object without `arguments` is refused, because bare JSON may be anything.
    needs_arguments: bool,
}

impl CallObject {
    pub(super) fn new(needs_arguments: bool) -> Self {
        CallObject {
            part: Part::Open,
            name: None,
            held: None,
            has_arguments: false,
            started: false,
            needs_arguments,
        }
    }

    /// Whether [`CallEvent::Start`] was emitted, and so cannot be taken back.
    pub(super) fn started(&self) -> bool {
        self.started
    }

    /// Reads one character.
    pub(super) fn push(&mut self, c: char, events: &mut Vec<CallEvent>) -> CallStep {
        let space = matches!(c, ' ' | '\n' | '\r' | '\t');
        match &mut self.part {
            Part::KeyText(scan, text) => {
                text.push(c);
                match scan.push(c) {
                    Step::More => {}
                    Step::End => match self.key() {
                        Some(key) => self.part = Part::Colon(key),
                        None => return CallStep::Failed,
                    },
                    _ => return CallStep::Failed,
                }
            }
            Part::Value(..) => return self.value(c, events),
            _ if space => {}
            Part::Open if c == '{' => self.part = Part::KeyOrEnd,
            Part::KeyOrEnd | Part::Key if c == '"' => {
                let mut scan = JsonScan::new();
                scan.push(c);
                self.part = Part::KeyText(scan, c.into());
            }
            Part::Colon(key) if c == ':' => self.part = Part::Before(*key),
            Part::Before(key) => {
                let fits = match key {
                    Key::Name => c == '"',
                    Key::Arguments => matches!(c, '{' | '"' | 'n'),
                    Key::Other => true,
                };
                if !fits {
                    return CallStep::Failed;
                }
                self.part = Part::Value(*key, JsonScan::new(), String::new());
                return self.value(c, events);
            }
            Part::CommaOrEnd if c == ',' => self.part = Part::Key,
            Part::KeyOrEnd | Part::CommaOrEnd if c == '}' => return self.done(events),
            _ => return CallStep::Failed,
        }
        CallStep::More
    }

    /// The key just read, if a tool call may have it at this place.
    fn key(&self) -> Option<Key> {
        let Part::KeyText(_, text) = &self.part else { return None };
        match serde_json::from_str::<String>(text).ok()?.as_str() {
            "name" if self.name.is_none() => Some(Key::Name),
            "arguments" | "parameters" if !self.has_arguments => Some(Key::Arguments),
            "type" | "id" => Some(Key::Other),
            _ => None,
        }
    }

    fn value(&mut self, c: char, events: &mut Vec<CallEvent>) -> CallStep {
        let Part::Value(key, scan, text) = &mut self.part else { return CallStep::Failed };
        let (key, step) = (*key, scan.push(c));
        if step == Step::Error {
            return CallStep::Failed;
        }
        if step != Step::EndBefore {
            text.push(c);
        }
        let streams = key == Key::Arguments && self.name.is_some() && text.starts_with('{');
        if streams {
            if !self.started {
                self.started = true;
                events.push(CallEvent::Start(self.name.clone().unwrap_or_default()));
            }
            // The text itself is not needed again; only its first character, which identifies
            // objects.
            match events.last_mut() {
                Some(CallEvent::Arguments(text)) => text.push(c),
                _ => events.push(CallEvent::Arguments(c.into())),
            }
            text.truncate(1);
        }
        if step == Step::More {
            return CallStep::More;
        }
        let text = std::mem::take(text);
        self.part = Part::CommaOrEnd;
        match key {
            Key::Name => match serde_json::from_str::<String>(&text) {
                Ok(name) if !name.is_empty() => self.name = Some(name),
                _ => return CallStep::Failed,
            },
            Key::Arguments => {
                self.has_arguments = true;
                if !streams {
                    match held_arguments(&text) {
                        Some(arguments) => self.held = Some(arguments),
                        None => return CallStep::Failed,
                    }
                }
            }
            Key::Other => {}
        }
        if step == Step::EndBefore { self.push(c, events) } else { CallStep::More }
    }

    fn done(&mut self, events: &mut Vec<CallEvent>) -> CallStep {
        if self.started {
            return CallStep::Done;
        }
        let Some(name) = self.name.clone() else { return CallStep::Failed };
        if self.needs_arguments && !self.has_arguments {
            return CallStep::Failed;
        }
        self.started = true;
        events.push(CallEvent::Start(name));
        events.push(CallEvent::Arguments(self.held.take().unwrap_or_else(|| "{}".into())));
        CallStep::Done
    }
}

/// The arguments from a value that was not streamed: an object, null, or either of them in a
/// string.
fn held_arguments(text: &str) -> Option<String> {
    match serde_json::from_str::<serde_json::Value>(text).ok()? {
        serde_json::Value::Object(_) => Some(text.to_owned()),
        serde_json::Value::Null => Some("{}".into()),
        serde_json::Value::String(inner) if inner.trim().is_empty() => Some("{}".into()),
        serde_json::Value::String(inner) => serde_json::from_str::<serde_json::Value>(&inner)
            .is_ok_and(|value| value.is_object())
            .then(|| inner.trim().to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &str) -> Option<usize> {
        let mut scan = JsonScan::new();
        for (at, c) in text.char_indices() {
            match scan.push(c) {
                Step::More => {}
                Step::End => return Some(at + c.len_utf8()),
                Step::EndBefore => return Some(at),
                Step::Error => return None,
            }
        }
        None
    }

    #[test]
    fn values_end_where_serde_says() {
        for text in [
            "{}",
            "[]",
            "\"a\\n\\u00e9\\\"\"",
            "null",
            "[1,-0.5e+3,true,{\"a\":[{}]}]",
            "{\"a\" : 1 }",
        ] {
            assert_eq!(scan(&format!("{text}, rest")), Some(text.len()), "{text}");
            assert!(serde_json::from_str::<serde_json::Value>(text).is_ok());
        }
        assert_eq!(scan("12,"), Some(2));
        for text in ["{,", "[1,]", "{\"a\":}", "{'a'", "[01]", "\"\n", "\"\\x", "nul}", "1.}", "{]"]
        {
            assert_eq!(scan(text), None, "{text}");
        }
        assert_eq!(scan(&"[".repeat(1000)), None);
    }
}
