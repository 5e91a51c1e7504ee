//! The database of the data folder.

use crate::gguf::is_hugging_face;
use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// One step per schema version. A released step is never edited; changes are appended as new steps.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE models (
        name       TEXT PRIMARY KEY,
        file       TEXT NOT NULL UNIQUE,      -- relative to the data folder
        sha256     TEXT NOT NULL,
        bytes      INTEGER NOT NULL,
        source     TEXT NOT NULL,             -- the reference it was pulled by
        created_at INTEGER NOT NULL           -- seconds since 1970
    ) STRICT;
    CREATE TABLE adapters (
        name       TEXT PRIMARY KEY,
        base_model TEXT NOT NULL,
        file       TEXT NOT NULL,
        format     TEXT NOT NULL,             -- peft or gguf
        sha256     TEXT NOT NULL,
        bytes      INTEGER NOT NULL,
        created_at INTEGER NOT NULL
    ) STRICT;
",
    "
    ALTER TABLE adapters ADD COLUMN scale REAL NOT NULL DEFAULT 1;
    CREATE TABLE files (
        id         TEXT PRIMARY KEY,
        name       TEXT NOT NULL,
        purpose    TEXT NOT NULL,
        bytes      INTEGER NOT NULL,
        sha256     TEXT NOT NULL,
        owner      TEXT NOT NULL,
        created_at INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE jobs (
        id             TEXT PRIMARY KEY,
        kind           TEXT NOT NULL,
        status         TEXT NOT NULL,
        spec           TEXT NOT NULL,         -- JSON, with every default
        request        TEXT,                  -- JSON, of the OpenAI endpoint
        name           TEXT NOT NULL,         -- of what it makes
        owner          TEXT NOT NULL,
        created_at     INTEGER NOT NULL,
        started_at     INTEGER,
        finished_at    INTEGER,
        error          TEXT,                  -- JSON
        trained_tokens INTEGER
    ) STRICT;
    CREATE TABLE artifacts (
        id     TEXT PRIMARY KEY,
        job    TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
        kind   TEXT NOT NULL,
        file   TEXT NOT NULL,                 -- below the job's folder
        bytes  INTEGER NOT NULL,
        sha256 TEXT NOT NULL
    ) STRICT;
",
    "
    CREATE TABLE published (
        name       TEXT PRIMARY KEY,
        model      TEXT NOT NULL,             -- a model or an adapter
        previous   TEXT,
        candidate  TEXT,                      -- serves a share of the requests
        share      REAL,
        changed_at INTEGER NOT NULL
    ) STRICT;
",
];

/// Reason why the data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error(
        "The data folder {path} cannot be used: {source}. Name another one with --data-dir, or \
         mend its permissions."
    )]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("The database {path} cannot be used: {source}.")]
    Database { path: PathBuf, source: rusqlite::Error },
    #[error(
        "The database {path} was written by a newer Ingot (schema {found}; this one knows up to \
         {known}): use that version, or another --data-dir."
    )]
    Newer { path: PathBuf, found: i64, known: usize },
}

/// A model in the data folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredModel {
    pub name: String,
    /// Path relative to the data folder.
    pub file: PathBuf,
    /// Lower-case hexadecimal.
    pub sha256: String,
    pub bytes: u64,
    /// The reference with which the model was pulled.
    pub source: String,
    /// Seconds since 1970.
    pub created_at: i64,
}

impl StoredModel {
    /// The Hugging Face folder from which the model was converted, if the folder still exists.
    pub fn parent(&self) -> Option<PathBuf> {
        Some(PathBuf::from(&self.source)).filter(|folder| is_hugging_face(folder))
    }
}

/// An adapter in the data folder.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredAdapter {
    pub name: String,
    /// Name of the base model.
    pub base_model: String,
    /// File or folder, relative to the data folder.
    pub file: PathBuf,
    /// `peft` or `gguf`.
    pub format: String,
    pub sha256: String,
    pub bytes: u64,
    /// Factor on the adapter's own scale.
    pub scale: f32,
    pub created_at: i64,
}

/// The opened data folder. Calls block for a disk access of some milliseconds.
#[derive(Debug)]
pub struct Store {
    folder: PathBuf,
    connection: Mutex<Connection>,
}

impl Store {
    /// Opens the folder, creates what is missing, and migrates the database.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let unusable = |source| StoreError::Folder { path: folder.to_owned(), source };
        std::fs::create_dir_all(folder).map_err(unusable)?;
        let folder = folder.canonicalize().map_err(unusable)?;
        for part in ["models", "adapters", "downloads", "files", "jobs"] {
            std::fs::create_dir_all(folder.join(part)).map_err(unusable)?;
        }
        let path = folder.join("ingot.db");
        let broken = |source| StoreError::Database { path: path.clone(), source };
        let mut connection = Connection::open(&path).map_err(broken)?;
        connection.busy_timeout(Duration::from_secs(10)).map_err(broken)?;
        connection.pragma_update(None, "journal_mode", "WAL").map_err(broken)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(broken)?;
        connection.pragma_update(None, "foreign_keys", true).map_err(broken)?;
        let found = migrate(&mut connection).map_err(broken)?;
        if found > MIGRATIONS.len() as i64 {
            return Err(StoreError::Newer { path, found, known: MIGRATIONS.len() });
        }
        Ok(Self { folder, connection: Mutex::new(connection) })
    }

    /// The absolute path of the data folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder of adapters.
    pub fn adapters_folder(&self) -> PathBuf {
        self.folder.join("adapters")
    }

    pub(super) fn models_folder(&self) -> PathBuf {
        self.folder.join("models")
    }

    pub(super) fn downloads_folder(&self) -> PathBuf {
        self.folder.join("downloads")
    }

    /// All models, sorted by name.
    pub fn models(&self) -> Result<Vec<StoredModel>, StoreError> {
        self.with(|c| {
            c.prepare("SELECT * FROM models ORDER BY name")?.query_map([], model)?.collect()
        })
    }

    /// The model with a name or source reference.
    pub fn model(&self, name_or_source: &str) -> Result<Option<StoredModel>, StoreError> {
        self.with(|c| {
            let sql = "SELECT * FROM models WHERE name = ?1 OR source = ?1 \
                       ORDER BY name = ?1 DESC LIMIT 1";
            c.query_row(sql, [name_or_source], model).optional()
        })
    }

    /// Adds a model, or replaces the one of the same name.
    pub fn put_model(&self, model: &StoredModel) -> Result<(), StoreError> {
        self.with(|c| insert_model(c, model))
    }

    /// Removes a model from the list; its file stays. False if there was none.
    pub fn remove_model(&self, name: &str) -> Result<bool, StoreError> {
        self.with(|c| c.execute("DELETE FROM models WHERE name = ?1", [name])).map(|n| n > 0)
    }

    /// All adapters, sorted by name.
    pub fn adapters(&self) -> Result<Vec<StoredAdapter>, StoreError> {
        self.with(|c| {
            c.prepare("SELECT * FROM adapters ORDER BY name")?.query_map([], adapter)?.collect()
        })
    }

    /// The adapter with a name.
    pub fn adapter(&self, name: &str) -> Result<Option<StoredAdapter>, StoreError> {
        self.with(|c| {
            c.query_row("SELECT * FROM adapters WHERE name = ?1", [name], adapter).optional()
        })
    }

    /// Adds an adapter, or replaces the one of the same name.
    pub fn put_adapter(&self, adapter: &StoredAdapter) -> Result<(), StoreError> {
        self.with(|c| insert_adapter(c, adapter))
    }

    /// Removes an adapter from the list; its file stays. False if there was none.
    pub fn remove_adapter(&self, name: &str) -> Result<bool, StoreError> {
        self.with(|c| c.execute("DELETE FROM adapters WHERE name = ?1", [name])).map(|n| n > 0)
    }

    pub(super) fn with<T>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        work(&self.connection()).map_err(|source| self.broken(source))
    }

    /// Runs `work` in a transaction, which is rolled back on an error.
    pub(super) fn transaction<T>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let mut connection = self.connection();
        let done = connection.transaction_with_behavior(TransactionBehavior::Immediate).and_then(
            |transaction| {
                let done = work(&transaction)?;
                transaction.commit()?;
                Ok(done)
            },
        );
        done.map_err(|source| self.broken(source))
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A panic in a call leaves SQLite's own state valid, so a poisoned lock may be used.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn broken(&self, source: rusqlite::Error) -> StoreError {
        StoreError::Database { path: self.folder.join("ingot.db"), source }
    }
}

pub(super) fn insert_model(c: &Connection, model: &StoredModel) -> rusqlite::Result<()> {
    c.execute(
        "INSERT OR REPLACE INTO models (name, file, sha256, bytes, source, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            model.name,
            model.file.to_string_lossy(),
            model.sha256,
            model.bytes as i64,
            model.source,
            model.created_at
        ],
    )
    .map(drop)
}

pub(super) fn insert_adapter(c: &Connection, adapter: &StoredAdapter) -> rusqlite::Result<()> {
    c.execute(
        "INSERT OR REPLACE INTO adapters \
         (name, base_model, file, format, sha256, bytes, scale, created_at) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            adapter.name,
            adapter.base_model,
            adapter.file.to_string_lossy(),
            adapter.format,
            adapter.sha256,
            adapter.bytes as i64,
            adapter.scale,
            adapter.created_at
        ],
    )
    .map(drop)
}

/// Migrates the schema; returns the version found if it is newer than this program supports.
fn migrate(connection: &mut Connection) -> rusqlite::Result<i64> {
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let version: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    for (index, step) in MIGRATIONS.iter().enumerate().skip(version.max(0) as usize) {
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "user_version", index as i64 + 1)?;
    }
    transaction.commit()?;
    Ok(version)
}

fn model(row: &Row<'_>) -> rusqlite::Result<StoredModel> {
    Ok(StoredModel {
        name: row.get("name")?,
        file: PathBuf::from(row.get::<_, String>("file")?),
        sha256: row.get("sha256")?,
        bytes: row.get::<_, i64>("bytes")? as u64,
        source: row.get("source")?,
        created_at: row.get("created_at")?,
    })
}

fn adapter(row: &Row<'_>) -> rusqlite::Result<StoredAdapter> {
    Ok(StoredAdapter {
        name: row.get("name")?,
        base_model: row.get("base_model")?,
        file: PathBuf::from(row.get::<_, String>("file")?),
        format: row.get("format")?,
        sha256: row.get("sha256")?,
        bytes: row.get::<_, i64>("bytes")? as u64,
        scale: row.get("scale")?,
        created_at: row.get("created_at")?,
    })
}
