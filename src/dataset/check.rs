//! Checks a whole file before a job is queued.

use super::error::DataError;
use super::format::{DatasetKind, parse};
use super::lines::{BadLines, Lines, OneFormat};
use std::path::Path;

/// Parses every line of `source` as an example, and returns their number. It is an error if there
/// are fewer than `least`.
///
/// # Errors
/// The [`DataError`] that `train::data::prepare` would return, except for errors that only a
/// template or a tokenizer can find.
pub fn check(source: &Path, dataset: DatasetKind, least: u64) -> Result<u64, DataError> {
    let mut lines = Lines::open(source)?;
    let (mut found, mut bad, mut one_format) = (0, BadLines::default(), OneFormat::default());
    loop {
        let chunk = lines.next_chunk()?;
        if chunk.is_empty() {
            break;
        }
        // Runs on one core, because the gateway serves requests at the same time.
        for (number, line) in chunk {
            found += 1;
            let parsed = line.and_then(|line| parse(&line, dataset));
            if let Err(why) = parsed.and_then(|(format, _)| one_format.check(number, format)) {
                bad.add(number, why);
            }
        }
    }
    bad.refuse()?;
    match found {
        0 => Err(DataError::Empty),
        _ if found < least => Err(DataError::TooFew { found, least }),
        _ => Ok(found),
    }
}
