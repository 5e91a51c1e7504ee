//! Turns token pieces into text: UTF-8 characters are never split, stop strings are never emitted.

/// The result of adding a piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progressed {
    /// Text to emit; it can be empty.
    Text(String),
    /// A stop string was completed; only the text before it is emitted.
    Stopped { text: String, stop: String },
}

/// Assembles the output of one sequence.
#[derive(Debug)]
pub(super) struct TextAssembler {
    stops: Vec<String>,
    /// Bytes of an incomplete character.
    partial: Vec<u8>,
    /// Text that may be the beginning of a stop string.
    held: String,
}

impl TextAssembler {
    /// Empty stop strings are ignored: they would match everywhere.
    pub(super) fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(),
            partial: Vec::new(),
            held: String::new(),
        }
    }

    /// Adds a token's bytes.
    pub(super) fn push(&mut self, piece: &[u8]) -> Progressed {
        let text = self.decode(piece);
        if self.stops.is_empty() {
            return Progressed::Text(text);
        }
        self.held.push_str(&text);
        self.scan()
    }

    /// Ends the output and returns the text that was held back. An incomplete character becomes
    /// U+FFFD.
    pub(super) fn finish(&mut self) -> Progressed {
        if !self.partial.is_empty() {
            self.partial.clear();
            self.held.push(char::REPLACEMENT_CHARACTER);
        }
        match self.scan() {
            Progressed::Text(mut text) => {
                text.push_str(&std::mem::take(&mut self.held));
                Progressed::Text(text)
            }
            stopped @ Progressed::Stopped { .. } => stopped,
        }
    }

    /// Bytes that have not been emitted; after a stop string, the bytes from its beginning.
    pub(super) fn held_len(&self) -> usize {
        self.partial.len() + self.held.len()
    }

    /// Decodes whole characters only; invalid bytes become U+FFFD.
    fn decode(&mut self, piece: &[u8]) -> String {
        if self.partial.is_empty()
            && let Ok(text) = std::str::from_utf8(piece)
        {
            return text.to_owned();
        }
        self.partial.extend_from_slice(piece);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.partial) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.partial.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.partial[..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.partial.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.partial.drain(..valid + invalid);
                }
            }
        }
    }

    /// Searches for the stop string that begins first; holds back text that may become one.
    fn scan(&mut self) -> Progressed {
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)))
            .min_by_key(|&(at, stop)| (at, stop.len()));
        if let Some((at, stop)) = first {
            let stop = stop.clone();
            return Progressed::Stopped { text: self.held.drain(..at).collect(), stop };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Progressed::Text(std::mem::replace(&mut self.held, rest))
    }
}

/// Length of the longest proper prefix of `stop` that `text` ends with, in bytes.
fn overlap(text: &str, stop: &str) -> usize {
    let (text, stop) = (text.as_bytes(), stop.as_bytes());
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&n| text[text.len() - n..] == stop[..n]).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(pieces: &[&[u8]], stops: &[&str]) -> (String, Option<String>) {
        let stops: Vec<_> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut assembler = TextAssembler::new(&stops);
        let mut out = String::new();
        let ends = pieces.iter().map(|piece| Some(*piece)).chain([None]);
        for piece in ends {
            let progressed = match piece {
                Some(piece) => assembler.push(piece),
                None => assembler.finish(),
            };
            match progressed {
                Progressed::Text(text) => out.push_str(&text),
                Progressed::Stopped { text, stop } => return (out + &text, Some(stop)),
            }
        }
        (out, None)
    }

    #[test]
    fn characters_are_joined_across_pieces() {
        let smile = "😀".as_bytes();
        assert_eq!(run(&[&smile[..1], &smile[1..3], &smile[3..]], &[]), ("😀".into(), None));
        assert_eq!(run(&[&smile[..2]], &[]), ("\u{fffd}".into(), None));
        assert_eq!(run(&[b"a\xff", b"b"], &[]), ("a\u{fffd}b".into(), None));
    }

    #[test]
    fn stop_strings_do_not_leak() {
        assert_eq!(
            run(&[b"Hello ST", b"OP more"], &["STOP"]),
            ("Hello ".into(), Some("STOP".into()))
        );
        assert_eq!(run(&[b"Hello ST", b"AR"], &["STOP"]), ("Hello STAR".into(), None));
        assert_eq!(run(&[b"abcd"], &["cd", "bc"]), ("a".into(), Some("bc".into())));
    }

    proptest! {
        /// The result does not depend on how the bytes are split into pieces.
        #[test]
        fn chunking_does_not_matter(
            text in "[ab\u{e9}\u{1f600}]{0,24}",
            stop in "[ab\u{e9}]{1,4}",
            cuts in proptest::collection::vec(1usize..5, 1..40),
        ) {
            let whole = run(&[text.as_bytes()], &[&stop]);
            let mut pieces = Vec::new();
            let mut rest = text.as_bytes();
            let mut sizes = cuts.iter().cycle();
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                pieces.push(piece);
                rest = tail;
            }
            prop_assert_eq!(run(&pieces, &[&stop]), whole.clone());
            let expected = text.find(&stop).map_or(text.as_str(), |at| &text[..at]);
            prop_assert_eq!(whole.0, expected);
        }
    }
}
