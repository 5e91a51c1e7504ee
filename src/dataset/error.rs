//! Errors of training files.

use std::io;

/// Why a file cannot be trained on.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The first bad lines, numbered from 1, and how many more there are.
    #[error("{}", named(.bad, *.more))]
    Lines { bad: Vec<(u64, String)>, more: u64 },
    #[error("the file has no examples")]
    Empty,
    #[error("the file has {found} examples; at least {least} are needed")]
    TooFew { found: u64, least: u64 },
    #[error(
        "no example has a trained token within {max_length} tokens: nothing would be trained; raise \
         `max_length`"
    )]
    Untrained { max_length: usize },
    #[error(
        "no pair has two different answers within {max_length} tokens: nothing would be trained; \
         raise `max_length`"
    )]
    NoPair { max_length: usize },
    #[error("no prompt has at most {max_length} tokens: raise `max_length`, or lower `max_tokens`")]
    NoPrompt { max_length: usize },
    #[error("the text is of {tokens} tokens: too short to predict one from another")]
    Short { tokens: u64 },
}

fn named(bad: &[(u64, String)], more: u64) -> String {
    let lines: Vec<_> = bad.iter().map(|(line, why)| format!("line {line}: {why}")).collect();
    let more = if more > 0 { format!("; and {more} more bad lines") } else { String::new() };
    format!("{}{more}", lines.join("; "))
}
