//! A look at a whole file before anything is computed from it.

use super::format::{Format, Purpose, parse};
use super::prepare::{DataError, Lines, NAMED};
use std::path::Path;

/// Reads every line of `source` as an example, and gives their number; fewer than `least` are too few.
///
/// # Errors
/// [`DataError`], as [`super::prepare`] would find it, but for what only a template or a tokenizer
/// can say.
pub fn check(source: &Path, purpose: Purpose, least: u64) -> Result<u64, DataError> {
    let mut lines = Lines::open(source)?;
    let (mut found, mut format) = (0, None::<Format>);
    let (mut bad, mut more) = (Vec::new(), 0);
    loop {
        let chunk = lines.next_chunk()?;
        if chunk.is_empty() {
            break;
        }
        // On one core: the gateway does this beside its requests.
        for (line, text) in chunk {
            found += 1;
            match parse(&text, purpose) {
                Ok((then, _)) => {
                    let before = *format.get_or_insert(then);
                    if before != then {
                        return Err(DataError::Mixed { line, before, then });
                    }
                }
                Err(why) if bad.len() < NAMED => bad.push((line, why)),
                Err(_) => more += 1,
            }
        }
    }
    match found {
        _ if !bad.is_empty() => Err(DataError::Lines { bad, more }),
        0 => Err(DataError::Empty),
        _ if found < least => Err(DataError::TooFew { found, least }),
        _ => Ok(found),
    }
}
