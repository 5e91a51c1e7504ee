//! Uploaded files: one database row each, and the bytes in `files/<id>`.

use super::database::{Store, StoreError};
use rusqlite::{Connection, OptionalExtension, Row, params};
use std::path::PathBuf;

/// A file that a client uploaded, or that a job made for a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// `file-…`
    pub id: String,
    /// The client's name of the file; never used as a path.
    pub name: String,
    pub purpose: String,
    pub bytes: u64,
    /// Lower-case hexadecimal.
    pub sha256: String,
    /// Owner of the file: see [`crate::gateway::auth::Identity`].
    pub owner: String,
    /// Seconds since 1970.
    pub created_at: i64,
}

impl Store {
    /// The folder with the bytes of the files.
    pub fn files_folder(&self) -> PathBuf {
        self.folder().join("files")
    }

    /// All files of an owner (`None`: of all owners), the newest first.
    pub fn files(&self, owner: Option<&str>) -> Result<Vec<StoredFile>, StoreError> {
        self.with(|c| {
            let sql = "SELECT * FROM files WHERE ?1 IS NULL OR owner = ?1 ORDER BY rowid DESC";
            c.prepare(sql)?.query_map([owner], file)?.collect()
        })
    }

    pub fn file(&self, id: &str) -> Result<Option<StoredFile>, StoreError> {
        self.with(|c| c.query_row("SELECT * FROM files WHERE id = ?1", [id], file).optional())
    }

    pub fn put_file(&self, file: &StoredFile) -> Result<(), StoreError> {
        self.with(|c| insert(c, file))
    }

    /// Removes a file from the list; its bytes stay. False if there was none.
    pub fn remove_file(&self, id: &str) -> Result<bool, StoreError> {
        self.with(|c| c.execute("DELETE FROM files WHERE id = ?1", [id])).map(|n| n > 0)
    }
}

pub(super) fn insert(c: &Connection, file: &StoredFile) -> rusqlite::Result<()> {
    c.execute(
        "INSERT OR REPLACE INTO files (id, name, purpose, bytes, sha256, owner, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![
            file.id,
            file.name,
            file.purpose,
            file.bytes as i64,
            file.sha256,
            file.owner,
            file.created_at
        ],
    )
    .map(drop)
}

fn file(row: &Row<'_>) -> rusqlite::Result<StoredFile> {
    Ok(StoredFile {
        id: row.get("id")?,
        name: row.get("name")?,
        purpose: row.get("purpose")?,
        bytes: row.get::<_, i64>("bytes")? as u64,
        sha256: row.get("sha256")?,
        owner: row.get("owner")?,
        created_at: row.get("created_at")?,
    })
}
