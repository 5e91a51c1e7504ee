//! Published names: one database row each.

use super::database::{Store, StoreError};
use rusqlite::{OptionalExtension, Row, params};

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
}

impl Store {
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
