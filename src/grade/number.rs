//! Grader that compares the number in an answer with a reference.

use super::{Fault, Flag};

/// Settings of the comparison of two numbers in texts.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NumberMatch {
    /// Marker before the answer, such as gsm8k's `####`.
    pub marker: Option<Marker>,
    /// Maximum difference: absolute, or relative to the reference if that is above 1.
    pub tolerance: f64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Marker(pub String);

impl NumberMatch {
    /// Whether the input's number equals the reference's. An input without a number does not match.
    pub(super) fn holds(&self, input: &str, reference: &str) -> Result<bool, Fault> {
        let expected = self.read(reference).ok_or_else(|| {
            Fault::new(Flag::Variable, "there is no number in the reference".to_owned())
        })?;
        let near = |number: f64| {
            number == expected
                || (number - expected).abs() <= self.tolerance * expected.abs().max(1.0)
        };
        Ok(self.read(input).is_some_and(near))
    }

    /// The first number after the last marker; without a marker, the last number.
    fn read(&self, text: &str) -> Option<f64> {
        let marked = self.marker.as_ref().and_then(|Marker(marker)| text.rsplit_once(marker));
        match marked {
            Some((_, after)) => numbers(after).next(),
            None => numbers(text).last(),
        }
    }
}

/// The numbers in a text: with a sign, commas between thousands, a fraction, an exponent, and a
/// currency sign before the digits. Text after a number, such as `%` or a full stop, is ignored. A
/// sign after a letter, a digit or a bracket is a binary minus and is ignored too. A number too
/// large for an `f64` is not a number.
fn numbers(text: &str) -> impl Iterator<Item = f64> + '_ {
    let bytes = text.as_bytes();
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() {
            let starts = bytes[at].is_ascii_digit()
                || (bytes[at] == b'.'
                    && digit(bytes, at + 1)
                    && !(at > 0 && matches!(bytes[at - 1], b'0'..=b'9' | b'.')));
            if !starts {
                at += 1;
                continue;
            }
            let (number, end) = scan(bytes, at);
            let number = if negative(&text[..at]) { -number } else { number };
            at = end;
            if number.is_finite() {
                return Some(number);
            }
        }
        None
    })
}

fn digit(bytes: &[u8], at: usize) -> bool {
    bytes.get(at).is_some_and(u8::is_ascii_digit)
}

/// The unsigned number that starts at a digit or a point, and the position of its end.
fn scan(bytes: &[u8], start: usize) -> (f64, usize) {
    let mut written = String::new();
    let mut at = start;
    let digits = |at: &mut usize, written: &mut String| {
        while digit(bytes, *at) {
            written.push(char::from(bytes[*at]));
            *at += 1;
        }
    };
    digits(&mut at, &mut written);
    // Up to three digits, then groups of three after commas: 1,234,567. Any other comma ends the
    // number.
    if at - start <= 3 {
        while bytes.get(at) == Some(&b',')
            && (1..=3).all(|next| digit(bytes, at + next))
            && !digit(bytes, at + 4)
        {
            at += 1;
            digits(&mut at, &mut written);
        }
    }
    if bytes.get(at) == Some(&b'.') && digit(bytes, at + 1) {
        written.push('.');
        at += 1;
        digits(&mut at, &mut written);
    }
    if matches!(bytes.get(at), Some(b'e' | b'E')) {
        let signed = usize::from(matches!(bytes.get(at + 1), Some(b'+' | b'-')));
        if digit(bytes, at + 1 + signed) {
            written.push('e');
            if bytes[at + 1] == b'-' {
                written.push('-');
            }
            at += 1 + signed;
            digits(&mut at, &mut written);
        }
    }
    (written.parse().unwrap_or(f64::INFINITY), at)
}

/// Whether a number after this text is negative: `-5`, `−5`, `-$5`, `$-5`.
fn negative(before: &str) -> bool {
    const CURRENCY: [char; 4] = ['$', '€', '£', '¥'];
    let before = before.strip_suffix(CURRENCY).unwrap_or(before);
    let Some(before) = before.strip_suffix(['-', '\u{2212}']) else { return false };
    let before = before.strip_suffix(CURRENCY).unwrap_or(before);
    !before.ends_with(|c: char| c.is_alphanumeric() || matches!(c, ')' | ']' | '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &str) -> Vec<f64> {
        numbers(text).collect()
    }

    #[test]
    fn numbers_are_found_as_people_write_them() {
        for (text, expected) in [
            ("", &[] as &[f64]),
            ("none at all. - , $ % e5", &[5.0]),
            ("42", &[42.0]),
            ("It is 42.", &[42.0]),
            ("It is 42.5.", &[42.5]),
            ("is .5?", &[0.5]),
            ("-.5", &[-0.5]),
            ("1,234,567.89 and 12,34", &[1_234_567.89, 12.0, 34.0]),
            ("1,2345", &[1.0, 2345.0]),
            ("1234,567", &[1234.0, 567.0]),
            ("1,2,3", &[1.0, 2.0, 3.0]),
            ("(1, 2)", &[1.0, 2.0]),
            ("$1,000", &[1000.0]),
            ("-$5 $-5 $5", &[-5.0, -5.0, 5.0]),
            ("€7 −£8", &[7.0, -8.0]),
            ("50%.", &[50.0]),
            ("3-4=-1", &[3.0, 4.0, -1.0]),
            ("x-4 (2)-1 a - 5", &[4.0, 2.0, 1.0, 5.0]),
            ("+7", &[7.0]),
            ("1e3 2E-2 3e+1 5e 6e- 7ex", &[1000.0, 0.02, 30.0, 5.0, 6.0, 7.0]),
            ("1.2.3", &[1.2, 3.0]),
            ("1...2", &[1.0, 2.0]),
            ("\\boxed{18}", &[18.0]),
            ("**18**", &[18.0]),
            ("007", &[7.0]),
            ("1e999 3", &[3.0]),
            ("٤٢", &[]),
            ("日本5語", &[5.0]),
        ] {
            assert_eq!(all(text), expected, "{text}");
        }
    }

    #[test]
    fn the_marker_leads_to_the_number() {
        let how = NumberMatch { marker: Some(Marker("####".to_owned())), tolerance: 1e-6 };
        assert_eq!(how.read("2+2 = 4\n#### 42 apples of 50"), Some(42.0));
        assert_eq!(how.read("#### 1\n#### 2 3"), Some(2.0));
        assert_eq!(how.read("5 #### none"), None);
        assert_eq!(how.read("no marker 5, 6"), Some(6.0));
    }

    #[test]
    fn near_is_near() {
        let how = NumberMatch { marker: None, tolerance: 1e-6 };
        assert_eq!(how.holds("it is 1,000,000.5", "#### 1000000"), Ok(true));
        assert_eq!(how.holds("1000002", "1000000"), Ok(false));
        assert_eq!(how.holds("0.0000005", "0"), Ok(true));
        assert_eq!(how.holds("0.1", "0"), Ok(false));
        assert_eq!(how.holds("", "0"), Ok(false));
        assert_eq!(how.holds("1", "one").unwrap_err().flag, Flag::Variable);
        let exact = NumberMatch { marker: None, tolerance: 0.0 };
        assert_eq!(exact.holds("0.1", ".1"), Ok(true));
        assert_eq!(exact.holds("0.1", "0.10000000001"), Ok(false));
        let wide = NumberMatch { marker: None, tolerance: 1e300 };
        assert_eq!(wide.holds("-1e308", "1e308"), Ok(true));
    }

    #[test]
    fn long_texts_are_read_in_one_pass() {
        let text = "1".repeat(1 << 20);
        assert_eq!(all(&text), &[] as &[f64]);
        assert_eq!(all(&"1,".repeat(1 << 19)).len(), 1 << 19);
        assert_eq!(all(&"-".repeat(1 << 20)).len(), 0);
        // 1, then 1111 repeated, then 111: groups of four digits are not thousands.
        assert_eq!(all(&"1,111".repeat(1 << 17)).len(), (1 << 17) + 1);
    }
}
