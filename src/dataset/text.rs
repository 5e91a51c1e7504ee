//! Pretraining files: plain text, or lines of `{"text"}`.
//!
//! A plain-text file is one document. It is read in pieces. The pieces are cut where no
//! pre-tokenizer joins the text on both sides, so that the tokens are those of the whole text.

use super::error::DataError;
use super::lines::{BadLines, LONGEST, Lines, hex};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

/// Approximate size of a piece of plain text, in bytes.
const PIECE: usize = 1 << 18;
/// If there is no good place to cut within this number of bytes, the text is cut anywhere.
const STUBBORN: usize = 1 << 22;
/// Pieces that are read before all cores tokenize them.
const PIECES: usize = 32;

/// A document, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub text: String,
    /// Whether the document ends with this piece.
    pub ends: bool,
}

/// The documents of a file, read in chunks.
pub struct Texts {
    format: Format,
    /// Number of documents without any text, which are dropped.
    pub empty: u64,
    bad: BadLines,
}

enum Format {
    Plain(Plain),
    Lines(Lines),
}

struct Plain {
    reader: BufReader<File>,
    /// Bytes that were read but not yet returned.
    rest: Vec<u8>,
    /// Line number of the beginning of `rest`, from 1.
    line: u64,
    bytes: u64,
    hash: Sha256,
    ended: bool,
}

impl Texts {
    /// Opens a file. Its first non-blank line determines the format.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut reader = BufReader::new(File::open(path)?);
        let mut first = Vec::new();
        while first.trim_ascii().is_empty() {
            first.clear();
            if Read::take(&mut reader, LONGEST).read_until(b'\n', &mut first)? == 0 {
                break;
            }
        }
        let first = first.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&first);
        let json = matches!(serde_json::from_slice(first), Ok(Value::Object(_)));
        let format = match json {
            true => Format::Lines(Lines::open(path)?),
            false => Format::Plain(Plain::open(path)?),
        };
        Ok(Self { format, empty: 0, bad: BadLines::default() })
    }

    /// Number of bytes of the file read so far.
    pub fn bytes(&self) -> u64 {
        match &self.format {
            Format::Plain(plain) => plain.bytes,
            Format::Lines(lines) => lines.bytes,
        }
    }

    /// The next pieces; none at the end.
    ///
    /// # Errors
    /// If the file cannot be read, or, at its end, if some lines were bad.
    pub fn next_chunk(&mut self) -> Result<Vec<Piece>, DataError> {
        let mut pieces = Vec::new();
        match &mut self.format {
            Format::Plain(plain) => {
                while pieces.len() < PIECES
                    && let Some(piece) = plain.next()?
                {
                    pieces.push(piece);
                }
            }
            Format::Lines(lines) => {
                while pieces.is_empty() {
                    let chunk = lines.next_chunk()?;
                    if chunk.is_empty() {
                        break;
                    }
                    for (number, line) in chunk {
                        match line.and_then(|line| text_of(&line)) {
                            Ok(text) if text.is_empty() => self.empty += 1,
                            Ok(text) => pieces.push(Piece { text, ends: true }),
                            Err(why) => self.bad.add(number, why),
                        }
                    }
                }
            }
        }
        if pieces.is_empty() {
            self.bad.refuse()?;
        }
        Ok(pieces)
    }

    /// SHA-256 of the bytes read.
    pub fn digest(self) -> String {
        match self.format {
            Format::Plain(plain) => hex(plain.hash),
            Format::Lines(lines) => hex(lines.hash),
        }
    }
}

fn text_of(line: &str) -> Result<String, String> {
    let value: Value =
        serde_json::from_str(line).map_err(|error| format!("it is not JSON: {error}"))?;
    match value {
        Value::Object(mut line) => match line.remove("text") {
            Some(Value::String(text)) => Ok(text),
            Some(_) => Err("`text` is not a string".into()),
            None => Err("`text` is missing: pretraining takes lines of {\"text\"}".into()),
        },
        _ => Err("it is no JSON object".into()),
    }
}

impl Plain {
    fn open(path: &Path) -> io::Result<Self> {
        let reader = BufReader::with_capacity(PIECE, File::open(path)?);
        let (rest, hash) = (Vec::new(), Sha256::new());
        Ok(Self { reader, rest, line: 1, bytes: 0, hash, ended: false })
    }

    fn next(&mut self) -> io::Result<Option<Piece>> {
        loop {
            if !self.ended {
                self.ended = !self.fill()?;
            }
            let end = match self.ended {
                true => Some(self.rest.len()),
                false => cut(&self.rest),
            };
            let Some(end) = end else { continue };
            if self.rest.is_empty() {
                return Ok(None);
            }
            let rest = self.rest.split_off(end);
            let piece = String::from_utf8(std::mem::replace(&mut self.rest, rest));
            let text = piece.map_err(|error| {
                let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
                let line = self.line + newlines(valid);
                let what = format!("line {line} is not UTF-8: convert the file, or cut the line");
                io::Error::new(io::ErrorKind::InvalidData, what)
            })?;
            self.line += newlines(text.as_bytes());
            return Ok(Some(Piece { text, ends: self.ended && self.rest.is_empty() }));
        }
    }

    /// Reads more bytes; `false` at the end of the file.
    fn fill(&mut self) -> io::Result<bool> {
        let before = self.rest.len();
        let read = Read::take(&mut self.reader, PIECE as u64).read_to_end(&mut self.rest)?;
        self.hash.update(&self.rest[before..]);
        if self.bytes == 0 && self.rest.starts_with("\u{feff}".as_bytes()) {
            // A byte order mark is not part of the text.
            self.rest.drain(..3);
        }
        self.bytes += read as u64;
        Ok(read == PIECE)
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

/// Where to cut: after a single newline between a visible character and a letter, or before a
/// single space between letters. Every pre-tokenizer in use begins a word there, whatever follows.
fn cut(bytes: &[u8]) -> Option<usize> {
    let letter = |at: usize| bytes.get(at).is_some_and(u8::is_ascii_alphabetic);
    let from = 2..bytes.len();
    let newline =
        |at: &usize| bytes[at - 1] == b'\n' && bytes[at - 2].is_ascii_graphic() && letter(*at);
    let space = |at: &usize| bytes[*at] == b' ' && letter(at - 1) && letter(at + 1);
    let boundary = |at: &usize| bytes[*at] & 0xC0 != 0x80;
    let found = from.clone().rev().find(newline).or_else(|| from.clone().rev().find(space));
    match found {
        None if bytes.len() >= STUBBORN => from.rev().find(boundary),
        found => found,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<(Vec<Piece>, u64), DataError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, bytes).unwrap();
        let mut texts = Texts::open(&path).unwrap();
        let mut pieces = Vec::new();
        loop {
            let chunk = texts.next_chunk()?;
            if chunk.is_empty() {
                assert_eq!(texts.bytes(), bytes.len() as u64);
                return Ok((pieces, texts.empty));
            }
            pieces.extend(chunk);
        }
    }

    #[test]
    fn plain_text_is_one_document_in_pieces() {
        let line = "Speak, speak.\n\nFirst Citizen: 12 éà  you\nare all\n";
        let text = line.repeat(3 * PIECE / line.len());
        let (pieces, _) = read(text.as_bytes()).unwrap();
        assert!(pieces.len() > 2);
        let ends: Vec<_> = pieces.iter().filter(|piece| piece.ends).collect();
        assert_eq!((ends.len(), pieces.last().unwrap().ends), (1, true));
        assert_eq!(pieces.iter().map(|piece| &piece.text[..]).collect::<String>(), text);
        // A whole number of reads, an empty file, and text without any place to cut.
        let (pieces, _) = read(&vec![b'x'; PIECE]).unwrap();
        assert_eq!(pieces, [Piece { text: "x".repeat(PIECE), ends: true }]);
        assert_eq!(read(b"").unwrap().0, []);
        let long = "é".repeat(STUBBORN);
        let (pieces, _) = read(long.as_bytes()).unwrap();
        assert!(pieces.len() > 1);
        assert_eq!(pieces.iter().map(|piece| &piece.text[..]).collect::<String>(), long);
        let error = read(b"a\nb\n\xff\n").unwrap_err().to_string();
        assert!(error.contains("line 3 is not UTF-8"), "{error}");
    }

    #[test]
    fn lines_are_documents() {
        let (pieces, empty) =
            read(b"\n{\"text\": \"a\\nb\", \"id\": 1}\n{\"text\": \"\"}\n{\"text\": \"c\"}")
                .unwrap();
        let expected = ["a\nb", "c"].map(|text| Piece { text: text.into(), ends: true });
        assert_eq!((pieces, empty), (expected.to_vec(), 1));
        let error = read(b"{\"text\": \"a\"}\n{\"prompt\": \"b\"}\n[]").unwrap_err().to_string();
        assert!(error.contains("line 2: `text` is missing") && error.contains("line 3"), "{error}");
    }
}
