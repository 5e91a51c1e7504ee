//! Published names: one database row each.

use super::database::{Store, StoreError, StoredAdapter};
use rusqlite::{OptionalExtension, Row, params};
use sha2::{Digest, Sha256};
use std::path::Path;

/// A name that stands for a model or adapter, which the operator may exchange.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    pub name: String,
    /// The model or adapter that serves the name.
    pub model: String,
    /// The one that served it before.
    pub previous: Option<String>,
    /// One that serves a share of the requests.
    pub candidate: Option<Candidate>,
    /// Seconds since 1970.
    pub changed_at: i64,
}

/// A model that serves a share of a name's requests.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    pub model: String,
    /// Above 0, below 1.
    pub share: f64,
}

impl Published {
    /// The models and adapters that serve requests now.
    pub fn serving(&self) -> impl Iterator<Item = &str> {
        let candidate = self.candidate.as_ref().map(|candidate| &*candidate.model);
        std::iter::once(&*self.model).chain(candidate)
    }

    /// The models and adapters that serve requests now, and the one that a rollback needs.
    pub fn needed(&self) -> impl Iterator<Item = &str> {
        self.serving().chain(self.previous.as_deref())
    }
}

/// Prefix of the names of files that [`Store::keep_checkpoint`] makes in the folder of adapters.
const KEPT: &str = "checkpoint-";

impl StoredAdapter {
    /// Whether the file is a kept checkpoint, see [`Store::keep_checkpoint`].
    pub fn is_kept_checkpoint(&self) -> bool {
        let name = self.file.file_name().unwrap_or_default().to_string_lossy();
        self.file.starts_with("adapters") && name.starts_with(KEPT)
    }
}

impl Store {
    /// Links the file of a checkpoint's adapter into the folder of adapters, and lists it there. All
    /// other adapters are left as they are. The inner error is one of the file.
    pub fn keep_checkpoint(&self, name: &str) -> Result<std::io::Result<()>, StoreError> {
        let Some(adapter) = self.adapter(name)? else { return Ok(Ok(())) };
        let folder = adapter.file.parent().and_then(Path::file_name);
        if !adapter.file.starts_with("jobs") || folder != Some("checkpoints".as_ref()) {
            return Ok(Ok(()));
        }
        let file = format!("{KEPT}{}.gguf", &super::hex(&Sha256::digest(name))[..32]);
        let file = Path::new("adapters").join(file);
        let (from, to) = (self.folder().join(&adapter.file), self.folder().join(&file));
        let _ = std::fs::remove_file(&to);
        // A copy where the system does not allow links.
        let linked = std::fs::hard_link(&from, &to).or_else(|_| std::fs::copy(from, &to).map(drop));
        if linked.is_err() {
            return Ok(linked);
        }
        self.put_adapter(&StoredAdapter { file, ..adapter }).map(Ok)
    }

    /// Removes an adapter from the list, and its file if that is a kept checkpoint. False if there
    /// was none.
    pub fn forget_adapter(&self, name: &str) -> Result<bool, StoreError> {
        let kept = self.adapter(name)?.filter(StoredAdapter::is_kept_checkpoint);
        let removed = self.remove_adapter(name)?;
        if let Some(adapter) = kept {
            let _ = std::fs::remove_file(self.folder().join(adapter.file));
        }
        Ok(removed)
    }

    /// All published names, sorted.
    pub fn published(&self) -> Result<Vec<Published>, StoreError> {
        self.with(|c| {
            c.prepare("SELECT * FROM published ORDER BY name")?.query_map([], published)?.collect()
        })
    }

    /// The published name `name`.
    pub fn published_name(&self, name: &str) -> Result<Option<Published>, StoreError> {
        let sql = "SELECT * FROM published WHERE name = ?1";
        self.with(|c| c.query_row(sql, [name], published).optional())
    }

    /// Adds a published name, or replaces the one of the same name.
    pub fn put_published(&self, published: &Published) -> Result<(), StoreError> {
        let Published { name, model, previous, candidate, changed_at } = published;
        let (candidate, share) =
            candidate.as_ref().map(|candidate| (&candidate.model, candidate.share)).unzip();
        self.with(|c| {
            c.execute(
                "INSERT OR REPLACE INTO published \
                 (name, model, previous, candidate, share, changed_at) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![name, model, previous, candidate, share, changed_at],
            )
        })
        .map(drop)
    }

    /// Removes a published name. False if there was none.
    pub fn remove_published(&self, name: &str) -> Result<bool, StoreError> {
        self.with(|c| c.execute("DELETE FROM published WHERE name = ?1", [name])).map(|n| n > 0)
    }
}

fn published(row: &Row<'_>) -> rusqlite::Result<Published> {
    let (candidate, share): (Option<String>, Option<f64>) =
        (row.get("candidate")?, row.get("share")?);
    Ok(Published {
        name: row.get("name")?,
        model: row.get("model")?,
        previous: row.get("previous")?,
        candidate: candidate.zip(share).map(|(model, share)| Candidate { model, share }),
        changed_at: row.get("changed_at")?,
    })
}
