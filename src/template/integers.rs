//! JSON integers beyond 64 bits: for example ids of more than 19 digits in the arguments of tool
//! calls. Python keeps them; `serde_json` would round them to floats.
//!
//! Between JSON text and template values they are represented as marked strings.

use serde_json::Value;
use std::borrow::Cow;

/// First character of a string that represents an integer. It is a private-use character. A
/// client's text that consists of this character and an integer is rendered without the character.
const MARK: char = '\u{f8f3}';

/// Parses JSON without rounding its integers.
pub(super) fn parse(text: &str) -> serde_json::Result<Value> {
    serde_json::from_str(&marked(text))
}

/// The JSON text of a value that [`parse`] made.
pub(super) fn to_text(value: &Value) -> String {
    let text = value.to_string();
    if !text.contains(MARK) {
        return text;
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(at) = rest.find(MARK) {
        let (before, behind) = rest.split_at(at);
        let behind = &behind[MARK.len_utf8()..];
        let end = behind.find(|c: char| c != '-' && !c.is_ascii_digit()).unwrap_or(behind.len());
        let (digits, behind) = behind.split_at(end);
        match (before.strip_suffix('"'), behind.strip_prefix('"')) {
            (Some(before), Some(behind)) if is_integer(digits) => {
                out.extend([before, digits]);
                rest = behind;
            }
            _ => {
                out.push_str(before);
                out.push(MARK);
                out.push_str(digits);
                rest = behind;
            }
        }
    }
    out + rest
}

/// The integer that a string represents.
pub(super) fn integer(text: &str) -> Option<i128> {
    text.strip_prefix(MARK).filter(|digits| is_integer(digits))?.parse().ok()
}

fn is_integer(digits: &str) -> bool {
    let digits = digits.strip_prefix('-').unwrap_or(digits);
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Replaces integers that fit into 128 bits but not into 64 by marked strings.
fn marked(text: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let (mut done, mut at) = (0, 0);
    let (mut in_string, mut escaped) = (false, false);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        let byte = bytes[at];
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'-' | b'0'..=b'9' if !in_string => {
                let number = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
                let end = at + bytes[at..].iter().take_while(|byte| number(byte)).count();
                let digits = &text[at..end];
                let short = digits.parse::<i64>().is_ok() || digits.parse::<u64>().is_ok();
                if is_integer(digits) && !short && digits.parse::<i128>().is_ok() {
                    out.push_str(&text[done..at]);
                    out.extend(['"', MARK]);
                    out.push_str(digits);
                    out.push('"');
                    done = end;
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    if done == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[done..]);
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_keep_their_digits() {
        for text in [
            r#"{"id":12345678901234567890123}"#,
            r#"{"id":-12345678901234567890123,"b":[18446744073709551616,1]}"#,
            r#"{"id":18446744073709551615,"text":"12345678901234567890123"}"#,
            r#"{"x":1.5,"y":1e300,"z":"\"99999999999999999999999"}"#,
            r#"[170141183460469231731687303715884105727]"#,
        ] {
            assert_eq!(to_text(&parse(text).unwrap()).replace("1e+300", "1e300"), text);
        }
        let value = parse(r#"[18446744073709551616, "18446744073709551616", 7]"#).unwrap();
        assert_eq!(integer(value[0].as_str().unwrap()), Some(1 << 64));
        assert_eq!(integer(value[1].as_str().unwrap()), None);
        assert_eq!(value[2], 7);
        for bad in ["{", "[01]", "[1 2]", "[-]"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
