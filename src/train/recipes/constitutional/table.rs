//! Tables of examples in files of JSON lines, which a job that was killed goes on with.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::Path;

/// The rows of a file, which grows.
pub(super) struct Table<R> {
    file: File,
    pub rows: Vec<R>,
}

impl<R: Serialize + DeserializeOwned> Table<R> {
    /// Opens or creates a file. A line that was written in part is removed.
    ///
    /// # Errors
    /// If the file cannot be read or written, or a line is not a row.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64)?;
        file.seek(io::SeekFrom::End(0))?;
        let rows = serde_json::Deserializer::from_slice(&bytes[..whole]).into_iter();
        let rows = rows.collect::<Result<_, _>>()?;
        Ok(Self { file, rows })
    }

    /// Appends rows, and flushes them to the disk.
    ///
    /// # Errors
    /// If the file cannot be written, or a number is not finite.
    pub(super) fn append(&mut self, rows: Vec<R>) -> io::Result<()> {
        let text = lines(&rows)?;
        // The rows as a later process would read them: a number may differ in its last digit.
        let read = serde_json::Deserializer::from_slice(&text).into_iter();
        let read = read.collect::<Result<Vec<R>, _>>()?;
        self.file.write_all(&text)?;
        self.file.sync_data()?;
        self.rows.extend(read);
        Ok(())
    }
}

/// Rows as JSON lines.
pub(super) fn lines(rows: &[impl Serialize]) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut text, row)?;
        text.push(b'\n');
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_goes_on_behind_its_last_whole_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.jsonl");
        let mut table = Table::<Vec<u32>>::open(&path).unwrap();
        table.append(vec![vec![1, 2], vec![]]).unwrap();
        drop(table);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend(b"[3, 4");
        std::fs::write(&path, bytes).unwrap();
        let mut table = Table::<Vec<u32>>::open(&path).unwrap();
        assert_eq!(table.rows, [vec![1, 2], vec![]]);
        table.append(vec![vec![5]]).unwrap();
        assert_eq!(Table::<Vec<u32>>::open(&path).unwrap().rows, [vec![1, 2], vec![], vec![5]]);
        std::fs::write(&path, "[1]\n{}\n").unwrap();
        assert!(Table::<Vec<u32>>::open(&path).is_err());
    }
}
