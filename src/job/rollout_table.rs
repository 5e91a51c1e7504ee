//! `rollouts.jsonl`: the completions that a policy was trained on, for people to read.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::Path;

/// A line of the table: one completion, with its reward and its advantage in training.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RolloutRow {
    pub step: u64,
    /// Number of the prompt among the training prompts, from 0.
    pub prompt: usize,
    /// The line of the prompt in the training file.
    pub item: Value,
    pub completion: String,
    /// Number of tokens of the completion.
    pub tokens: usize,
    /// Whether the completion ended with an end-of-turn token, not at `max_tokens`.
    pub ended: bool,
    /// `None` if the completion could not be graded.
    pub reward: Option<f64>,
    /// The rewards of each grader of a `multi`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sub_rewards: BTreeMap<String, f64>,
    /// Why graders failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// The advantage, averaged over the tokens. `None` if the completion was not trained on.
    pub advantage: Option<f64>,
    /// Mean absolute difference between the engine's and the trainer's log-probabilities. `None` if
    /// the completion was not trained on.
    pub sampling_logp_difference: Option<f64>,
}

/// Appends rows.
///
/// # Errors
/// If the file cannot be written.
pub fn append(path: &Path, rows: &[RolloutRow]) -> io::Result<()> {
    let mut text = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut text, row)?;
        text.push(b'\n');
    }
    OpenOptions::new().append(true).create(true).open(path)?.write_all(&text)
}

/// Flushes appended rows to disk. A job without rollouts has no file.
///
/// # Errors
/// If flushing fails.
pub fn sync(path: &Path) -> io::Result<()> {
    match File::open(path) {
        Ok(file) => file.sync_data(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes the rows of `step` and later ones: a job that resumes repeats these steps.
///
/// # Errors
/// If the file cannot be read or written. It then holds either the old or the new rows.
pub fn cut(path: &Path, step: u64) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let part = path.with_extension("part");
    let mut out = BufWriter::new(File::create(&part)?);
    each(path, |row, line| {
        if row.step < step {
            out.write_all(line)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    })?;
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
    fs::rename(part, path)
}

/// The rows of a step, the last one if `step` is `None`: `limit` rows at most, and whether there
/// are more. A job without rollouts has no rows.
///
/// # Errors
/// If the file cannot be read.
pub fn read(path: &Path, step: Option<u64>, limit: usize) -> io::Result<(Vec<RolloutRow>, bool)> {
    let (mut rows, mut more) = (Vec::new(), false);
    if !path.exists() {
        return Ok((rows, more));
    }
    each(path, |row, _| {
        match step {
            Some(step) if row.step != step => return Ok(()),
            None if rows.first().is_some_and(|first: &RolloutRow| first.step != row.step) => {
                rows.clear();
                more = false;
            }
            _ => {}
        }
        if rows.len() < limit {
            rows.push(row)
        } else {
            more = true
        }
        Ok(())
    })?;
    Ok((rows, more))
}

/// Calls `then` with each row and its line. A line that a killed process left unfinished is
/// skipped.
fn each(path: &Path, mut then: impl FnMut(RolloutRow, &[u8]) -> io::Result<()>) -> io::Result<()> {
    for line in BufReader::new(File::open(path)?).split(b'\n') {
        let line = line?;
        if let Ok(row) = serde_json::from_slice(&line) {
            then(row, &line)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64, prompt: usize) -> RolloutRow {
        RolloutRow { step, prompt, completion: "a\nb".into(), ..RolloutRow::default() }
    }

    #[test]
    fn rows_are_found_by_step_and_cut() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rollouts.jsonl");
        assert_eq!(read(&path, None, 9).unwrap(), (vec![], false));
        cut(&path, 1).unwrap();
        append(&path, &[row(1, 0), row(1, 1)]).unwrap();
        append(&path, &[row(3, 0), row(3, 1), row(3, 2)]).unwrap();
        assert_eq!(read(&path, Some(1), 9).unwrap(), (vec![row(1, 0), row(1, 1)], false));
        assert_eq!(read(&path, Some(2), 9).unwrap(), (vec![], false));
        assert_eq!(read(&path, None, 2).unwrap(), (vec![row(3, 0), row(3, 1)], true));
        // A killed process may leave a part of a line.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\": 4").unwrap();
        assert_eq!(read(&path, None, 9).unwrap().0.len(), 3);
        cut(&path, 3).unwrap();
        assert_eq!(read(&path, None, 9).unwrap(), (vec![row(1, 0), row(1, 1)], false));
        append(&path, &[row(3, 7)]).unwrap();
        assert_eq!(read(&path, None, 9).unwrap(), (vec![row(3, 7)], false));
    }
}
