//! The lines of a file, and which of them are bad.

use super::error::DataError;
use super::format::Format;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

/// Lines that are read before all cores tokenize them.
const LINES: usize = 1024;
/// Maximum bytes of a line: a document of several million words.
pub(super) const LONGEST: u64 = 64 << 20;
/// Number of bad lines that an error lists.
const NAMED: usize = 20;

/// The bad lines of a file: the first ones, numbered from 1, and how many more there are.
#[derive(Debug, Default)]
pub struct BadLines {
    named: Vec<(u64, String)>,
    more: u64,
}

impl BadLines {
    pub fn add(&mut self, line: u64, why: String) {
        if self.named.len() < NAMED {
            self.named.push((line, why));
        } else {
            self.more += 1;
        }
    }

    /// # Errors
    /// [`DataError::Lines`] if there are bad lines.
    pub fn refuse(&mut self) -> Result<(), DataError> {
        if self.named.is_empty() {
            return Ok(());
        }
        let Self { named, more } = std::mem::take(self);
        Err(DataError::Lines { bad: named, more })
    }
}

/// The format of a file, which is the format of its first good line.
#[derive(Debug, Default)]
pub struct OneFormat(Option<(u64, Format)>);

impl OneFormat {
    /// # Errors
    /// If the format of the line differs from that of the first one.
    pub fn check(&mut self, line: u64, format: Format) -> Result<(), String> {
        let (first, before) = *self.0.get_or_insert((line, format));
        if before == format {
            return Ok(());
        }
        Err(format!(
            "it is of another format ({}) than line {first} ({}): use one format in a file",
            format.name(),
            before.name()
        ))
    }
}

/// The lines of a file, read in chunks.
pub struct Lines {
    reader: BufReader<File>,
    number: u64,
    pub bytes: u64,
    pub hash: Sha256,
}

impl Lines {
    pub fn open(path: &Path) -> io::Result<Self> {
        let reader = BufReader::with_capacity(1 << 20, File::open(path)?);
        Ok(Self { reader, number: 0, bytes: 0, hash: Sha256::new() })
    }

    /// The next non-blank lines with their numbers; an error message in place of a line that cannot
    /// be read.
    pub fn next_chunk(&mut self) -> io::Result<Vec<(u64, Result<String, String>)>> {
        let mut chunk = Vec::new();
        let mut size = 0;
        while chunk.len() < LINES && size < LONGEST {
            let mut line = Vec::new();
            let mut read = self.read_part(&mut line)?;
            if read == 0 {
                break;
            }
            self.number += 1;
            size += read;
            let mut too_long = false;
            while read == LONGEST && !line.ends_with(b"\n") {
                // Skips the rest of the line. At the end of the file there is no rest.
                line.clear();
                read = self.read_part(&mut line)?;
                too_long |= read > 0;
            }
            if too_long {
                chunk.push((self.number, Err("it is longer than 64 MiB".into())));
                continue;
            }
            let Ok(line) = String::from_utf8(line) else {
                chunk.push((self.number, Err("it is not UTF-8: convert the file".into())));
                continue;
            };
            // A byte order mark is not part of the first line.
            let line = line.trim_start_matches('\u{feff}').trim();
            if !line.is_empty() {
                chunk.push((self.number, Ok(line.to_owned())));
            }
        }
        Ok(chunk)
    }

    /// Reads a line, or its first 64 MiB.
    fn read_part(&mut self, line: &mut Vec<u8>) -> io::Result<u64> {
        let read = io::Read::take(&mut self.reader, LONGEST).read_until(b'\n', line)? as u64;
        self.hash.update(&line);
        self.bytes += read;
        Ok(read)
    }
}

/// A digest in hexadecimal.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
