//! Jobs: one database row each, and a folder `jobs/<id>`.
//!
//! A status is changed by one SQL statement that names the allowed previous statuses. So of two
//! concurrent changes only one succeeds, and a crash leaves either the old or the new status.

use super::database::{Store, StoreError};
use super::files::{self, StoredFile};
use crate::gateway::store::StoredAdapter;
use rusqlite::{OptionalExtension, Row, params};
use std::path::PathBuf;
use std::str::FromStr;

/// Status of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobStatus {
    /// The job's files are being validated.
    Validating,
    Queued,
    Running,
    Paused,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobStatus {
    pub const ALL: [Self; 7] = [
        Self::Validating,
        Self::Queued,
        Self::Running,
        Self::Paused,
        Self::Succeeded,
        Self::Failed,
        Self::Cancelled,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the status can no longer change.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

impl FromStr for JobStatus {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|status| status.name() == name);
        found.ok_or_else(|| format!("`{name}` is no status of a job"))
    }
}

/// A job, as stored in the database.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredJob {
    /// `ftjob-…`
    pub id: String,
    pub kind: String,
    pub status: JobStatus,
    /// The specification with all defaults, as JSON.
    pub spec: String,
    /// The request to the OpenAI endpoint, as JSON.
    pub request: Option<String>,
    /// Name of the model or adapter that the job makes.
    pub name: String,
    pub owner: String,
    /// All times are in seconds since 1970.
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    /// Reason why the job failed or was paused by the server, as JSON.
    pub error: Option<String>,
    pub trained_tokens: Option<u64>,
}

impl StoredJob {
    /// Whether the job makes a model or adapter of its name.
    pub fn makes_model(&self) -> bool {
        self.kind != "evaluate"
    }
}

/// Result of [`Store::finish_job`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    Done,
    /// The job was neither running nor paused. Nothing is stored.
    OtherStatus,
    /// Another model or adapter has the name, or it is published. Nothing is stored.
    NameTaken,
}

/// A file that a job made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredArtifact {
    pub id: String,
    pub kind: String,
    /// Path below the job's folder.
    pub file: PathBuf,
    pub bytes: u64,
    pub sha256: String,
}

/// Results of a succeeded job, written with its status in one transaction.
#[derive(Debug, Clone, PartialEq)]
pub struct Products {
    pub trained_tokens: u64,
    pub artifacts: Vec<StoredArtifact>,
    /// Files that the owner can read through `/v1/files`.
    pub results: Vec<StoredFile>,
    pub adapter: Option<StoredAdapter>,
    pub model: Option<super::StoredModel>,
}

impl Store {
    /// The folder that holds the job folders.
    pub fn jobs_folder(&self) -> PathBuf {
        self.folder().join("jobs")
    }

    pub fn put_job(&self, job: &StoredJob) -> Result<(), StoreError> {
        self.with(|c| {
            c.execute(
                "INSERT INTO jobs (id, kind, status, spec, request, name, owner, created_at) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    job.id,
                    job.kind,
                    job.status.name(),
                    job.spec,
                    job.request,
                    job.name,
                    job.owner,
                    job.created_at
                ],
            )
        })
        .map(drop)
    }

    pub fn job(&self, id: &str) -> Result<Option<StoredJob>, StoreError> {
        self.with(|c| c.query_row("SELECT * FROM jobs WHERE id = ?1", [id], job).optional())
    }

    /// Jobs of an owner (`None`: of all owners), the newest first.
    pub fn jobs(&self, owner: Option<&str>) -> Result<Vec<StoredJob>, StoreError> {
        self.with(|c| {
            let sql = "SELECT * FROM jobs WHERE ?1 IS NULL OR owner = ?1 ORDER BY rowid DESC";
            c.prepare(sql)?.query_map([owner], job)?.collect()
        })
    }

    /// Jobs with a status, the oldest first.
    pub fn jobs_in(&self, status: JobStatus) -> Result<Vec<StoredJob>, StoreError> {
        self.with(|c| {
            let sql = "SELECT * FROM jobs WHERE status = ?1 ORDER BY rowid";
            c.prepare(sql)?.query_map([status.name()], job)?.collect()
        })
    }

    /// An unfinished job that will make a model or adapter of this name, or a checkpoint's adapter.
    pub fn job_making(&self, name: &str) -> Result<Option<StoredJob>, StoreError> {
        let ended = names(&[JobStatus::Succeeded, JobStatus::Failed, JobStatus::Cancelled]);
        let sql = format!(
            "SELECT * FROM jobs WHERE kind <> 'evaluate' AND status NOT IN ({ended}) \
             AND (name = ?1 OR instr(?1, name || ':ckpt-step-') = 1) ORDER BY rowid LIMIT 1"
        );
        self.with(|c| c.query_row(&sql, [name], job).optional())
    }

    /// Whether a name is published, or is that of a model or adapter that the job `id` has not made.
    pub fn name_is_taken(&self, name: &str, id: &str) -> Result<bool, StoreError> {
        self.with(|c| name_is_taken(c, name, id))
    }

    /// Number of jobs by status.
    pub fn job_counts(&self) -> Result<Vec<(&'static str, usize)>, StoreError> {
        self.with(|c| {
            let mut count = c.prepare("SELECT count(*) FROM jobs WHERE status = ?1")?;
            let each = JobStatus::ALL.into_iter().map(|status| {
                let jobs = count.query_row([status.name()], |row| row.get::<_, i64>(0))?;
                Ok((status.name(), jobs as usize))
            });
            each.collect()
        })
    }

    /// Changes a job's status if the present status is one of `from`. `error` is stored for a job
    /// that failed or that the server paused; without `error` the stored error is cleared.
    ///
    /// # Errors
    /// Only database errors. `false` means that the job had another status.
    pub fn move_job(
        &self,
        id: &str,
        from: &[JobStatus],
        to: JobStatus,
        error: Option<&str>,
        now: i64,
    ) -> Result<bool, StoreError> {
        let from = names(from);
        self.with(|c| {
            c.execute(
                &format!(
                    "UPDATE jobs SET status = ?2, error = ?3, \
                     started_at = CASE WHEN ?2 = 'running' THEN coalesce(started_at, ?4) \
                                  ELSE started_at END, \
                     finished_at = CASE WHEN ?5 THEN ?4 END \
                     WHERE id = ?1 AND status IN ({from})"
                ),
                params![id, to.name(), error, now, to.is_final()],
            )
        })
        .map(|changed| changed > 0)
    }

    /// Changes a running or paused job to succeeded, and stores its results.
    ///
    /// # Errors
    /// Only database errors.
    pub fn finish_job(&self, id: &str, made: &Products, now: i64) -> Result<Finished, StoreError> {
        let from = names(&[JobStatus::Running, JobStatus::Paused]);
        self.transaction(|c| {
            let adapter = made.adapter.iter().map(|adapter| &adapter.name);
            for name in adapter.chain(made.model.iter().map(|model| &model.name)) {
                if name_is_taken(c, name, id)? {
                    return Ok(Finished::NameTaken);
                }
            }
            let changed = c.execute(
                &format!(
                    "UPDATE jobs SET status = 'succeeded', error = NULL, finished_at = ?2, \
                     trained_tokens = ?3 WHERE id = ?1 AND status IN ({from})"
                ),
                params![id, now, made.trained_tokens as i64],
            )?;
            if changed == 0 {
                return Ok(Finished::OtherStatus);
            }
            insert_artifacts(c, id, &made.artifacts)?;
            for file in &made.results {
                files::insert(c, file)?;
            }
            if let Some(adapter) = &made.adapter {
                super::database::insert_adapter(c, adapter)?;
            }
            if let Some(model) = &made.model {
                super::database::insert_model(c, model)?;
            }
            Ok(Finished::Done)
        })
    }

    /// Lists artifacts of a job, in place of those listed before.
    pub fn put_artifacts(&self, id: &str, made: &[StoredArtifact]) -> Result<(), StoreError> {
        self.transaction(|c| {
            c.execute("DELETE FROM artifacts WHERE job = ?1", [id])?;
            insert_artifacts(c, id, made)
        })
    }

    /// The artifacts of a job.
    pub fn artifacts(&self, job: &str) -> Result<Vec<StoredArtifact>, StoreError> {
        self.with(|c| {
            let sql = "SELECT * FROM artifacts WHERE job = ?1 ORDER BY rowid";
            c.prepare(sql)?.query_map([job], artifact)?.collect()
        })
    }
}

fn name_is_taken(c: &rusqlite::Connection, name: &str, id: &str) -> rusqlite::Result<bool> {
    c.query_row(
        "SELECT EXISTS (SELECT 1 FROM models WHERE name = ?1 AND instr(file, ?2) <> 1) \
         OR EXISTS (SELECT 1 FROM adapters WHERE name = ?1 AND instr(file, ?2) <> 1) \
         OR EXISTS (SELECT 1 FROM published WHERE name = ?1)",
        [name, &format!("jobs/{id}/")],
        |row| row.get(0),
    )
}

fn insert_artifacts(
    c: &rusqlite::Connection,
    id: &str,
    made: &[StoredArtifact],
) -> rusqlite::Result<()> {
    for artifact in made {
        c.execute(
            "INSERT OR REPLACE INTO artifacts (id, job, kind, file, bytes, sha256) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![
                artifact.id,
                id,
                artifact.kind,
                artifact.file.to_string_lossy(),
                artifact.bytes as i64,
                artifact.sha256
            ],
        )?;
    }
    Ok(())
}

/// A list for SQL's `IN`. Status names are constants, so nothing needs to be escaped.
fn names(statuses: &[JobStatus]) -> String {
    let quoted: Vec<_> = statuses.iter().map(|status| format!("'{}'", status.name())).collect();
    quoted.join(", ")
}

fn job(row: &Row<'_>) -> rusqlite::Result<StoredJob> {
    let status: String = row.get("status")?;
    let status = status.parse().map_err(|error: String| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.into())
    })?;
    Ok(StoredJob {
        id: row.get("id")?,
        kind: row.get("kind")?,
        status,
        spec: row.get("spec")?,
        request: row.get("request")?,
        name: row.get("name")?,
        owner: row.get("owner")?,
        created_at: row.get("created_at")?,
        started_at: row.get("started_at")?,
        finished_at: row.get("finished_at")?,
        error: row.get("error")?,
        trained_tokens: row.get::<_, Option<i64>>("trained_tokens")?.map(|tokens| tokens as u64),
    })
}

fn artifact(row: &Row<'_>) -> rusqlite::Result<StoredArtifact> {
    Ok(StoredArtifact {
        id: row.get("id")?,
        kind: row.get("kind")?,
        file: PathBuf::from(row.get::<_, String>("file")?),
        bytes: row.get::<_, i64>("bytes")? as u64,
        sha256: row.get("sha256")?,
    })
}
