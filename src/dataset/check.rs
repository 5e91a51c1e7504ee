//! A look at a whole file before anything is computed from it.

use super::error::DataError;
use super::format::{DatasetKind, parse};
use super::lines::{BadLines, Lines, OneFormat};
use std::path::Path;

/// Reads every line of `source` as an example, and gives their number; fewer than `least` are too few.
///
/// # Errors
/// [`DataError`], as [`super::prepare`] would find it, but for what only a template or a tokenizer
/// can say.
pub fn check(source: &Path, dataset: DatasetKind, least: u64) -> Result<u64, DataError> {
    let mut lines = Lines::open(source)?;
    let (mut found, mut bad, mut one_format) = (0, BadLines::default(), OneFormat::default());
    loop {
        let chunk = lines.next_chunk()?;
        if chunk.is_empty() {
            break;
        }
        // On one core: the gateway does this beside its requests.
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
