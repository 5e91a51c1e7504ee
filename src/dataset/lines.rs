//! A file's lines, and which of them are bad.

use super::error::DataError;
use super::format::Format;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

/// Lines that are read before all cores tokenize them.
const LINES: usize = 1024;
/// Bytes of a line at most: a document of some million words.
pub const LONGEST: u64 = 64 << 20;
/// Bad lines that are named.
const NAMED: usize = 20;

/// Bad lines of a file: the first ones by number from 1, and how many more there are.
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
    /// [`DataError::Lines`] if there are any.
    pub fn refuse(&mut self) -> Result<(), DataError> {
        if self.named.is_empty() {
            return Ok(());
        }
        let Self { named, more } = std::mem::take(self);
        Err(DataError::Lines { bad: named, more })
    }
}

/// The format of a file, which is that of its first good line.
#[derive(Debug, Default)]
pub struct OneFormat(Option<(u64, Format)>);

impl OneFormat {
    /// # Errors
    /// If the line is of another format than the first one.
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

/// Lines of a file, some at a time.
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

    /// The next lines that are not blank, with their numbers; of one that cannot be read, why.
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
                // The rest of the line, which is at the end of the file where nothing comes.
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
            // A byte order mark is no part of the first line.
            let line = line.trim_start_matches('\u{feff}').trim();
            if !line.is_empty() {
                chunk.push((self.number, Ok(line.to_owned())));
            }
        }
        Ok(chunk)
    }

    /// Reads a line, or 64 MiB of it.
    fn read_part(&mut self, line: &mut Vec<u8>) -> io::Result<u64> {
        let read = io::Read::take(&mut self.reader, LONGEST).read_until(b'\n', line)? as u64;
        self.hash.update(&line);
        self.bytes += read;
        Ok(read)
    }
}

/// A digest as it is written.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
