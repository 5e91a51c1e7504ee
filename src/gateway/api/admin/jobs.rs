//! `/admin/jobs`: every kind of job, for the operator.

use crate::gateway::api::openai::check_format;
use crate::gateway::api::openai::files::{self, Page};
use crate::gateway::api::wire::fields::{Fields, without_mark};
use crate::gateway::api::wire::query;
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::jobs::{Jobs, NewJob, Requester};
use crate::gateway::store::{JobStatus, StoredJob};
use crate::gateway::stream::json_line;
use crate::job::{Entry, EvaluateOrder, Follower, JobOrder, JobSpec, plot, report, rollout_table};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Interval at which new events of a running job are polled.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// After this much silence a comment is sent, so that proxies keep the connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Maximum number of rollouts in one answer.
const MAX_ROLLOUTS: usize = 1_000;
/// Maximum number of jobs on a page.
const MAX_PAGE: usize = 1_000;

type Answer = Result<Json<Value>, ApiError>;

/// `POST /admin/jobs`: creates a job from a specification, in the format of [`crate::job::spec`].
///
/// # Errors
/// As [`Jobs::create`].
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    body: Bytes,
) -> Result<Response, ApiError> {
    // Returns the error if the body is not JSON or not an object.
    Fields::parse(&body)?;
    let spec = JobSpec::parse(without_mark(&body)).map_err(|why| {
        ApiError::bad_request(format!("The job's specification is not valid: {why}."))
    })?;
    if let JobSpec::Train(spec) = &spec {
        check_format(&app, spec, &format!("{}.response_format", spec.task.name())).await?;
    }
    created(&app, identity, spec).await
}

/// Creates a job of the operator.
pub(super) async fn created(
    app: &App,
    identity: Identity,
    spec: JobSpec,
) -> Result<Response, ApiError> {
    let owner = app.auth.owner(identity);
    let requester = Requester { owner, admin: true, request: None };
    let job = app.jobs.create(NewJob { spec, requester }).await?;
    Ok((StatusCode::CREATED, Json(show(&app.jobs, &job)?)).into_response())
}

/// `GET /admin/jobs`, the newest first.
///
/// # Errors
/// 400 for invalid page parameters.
pub async fn list(
    State(app): State<Arc<App>>,
    query: Result<Query<Page>, QueryRejection>,
) -> Answer {
    let page = query::read(query)?;
    let jobs = app.jobs.store().jobs(None).map_err(ApiError::internal)?;
    let (jobs, more) = page.cut(jobs, |job| &job.id, MAX_PAGE)?;
    let shown = jobs.iter().map(|job| show(&app.jobs, job)).collect::<Result<_, _>>()?;
    Ok(files::listed(shown, more))
}

/// `GET /admin/jobs/{id}`.
///
/// # Errors
/// 404.
pub async fn retrieve(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    show(&app.jobs, &app.jobs.get(&id, None)?).map(Json)
}

/// `POST /admin/jobs/{id}/cancel`.
///
/// # Errors
/// As [`Jobs::cancel`].
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    show(&app.jobs, &app.jobs.cancel(&id, None)?).map(Json)
}

/// `POST /admin/jobs/{id}/pause`.
///
/// # Errors
/// As [`Jobs::pause`].
pub async fn pause(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    show(&app.jobs, &app.jobs.pause(&id, None)?).map(Json)
}

/// `POST /admin/jobs/{id}/resume`.
///
/// # Errors
/// As [`Jobs::resume`].
pub async fn resume(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    show(&app.jobs, &app.jobs.resume(&id, None)?).map(Json)
}

/// `POST /admin/jobs/{id}/finish`.
///
/// # Errors
/// As [`Jobs::finish`].
pub async fn finish(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    show(&app.jobs, &app.jobs.finish(&id, None)?).map(Json)
}

#[derive(Debug, Deserialize)]
pub struct HowEvents {
    stream: Option<bool>,
}

/// `GET /admin/jobs/{id}/events`: server-sent events until the job has ended, or with
/// `?stream=false` the events up to now.
///
/// # Errors
/// 404.
pub async fn events(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    query: Result<Query<HowEvents>, QueryRejection>,
) -> Result<Response, ApiError> {
    let how = query::read(query)?;
    let job = app.jobs.get(&id, None)?;
    if how.stream == Some(false) {
        let entries = app.jobs.events(&job.id)?;
        return Ok(Json(json!({"object": "list", "data": entries})).into_response());
    }
    let follower = Follower::new(app.jobs.folder(&id).events(), 0);
    let state = Following { app, id, follower, ready: VecDeque::new(), ends: false, over: false };
    let lines = futures_util::stream::unfold(state, |mut state| async {
        let line = state.next().await?;
        Some((Ok::<_, Infallible>(line), state))
    });
    let mut response = Body::from_stream(lines).into_response();
    let headers = response.headers_mut();
    let event_stream = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, event_stream);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// One client that follows the events of a job.
struct Following {
    app: Arc<App>,
    id: String,
    follower: Follower,
    ready: VecDeque<Entry>,
    /// The job has ended, and the last poll found nothing new.
    ends: bool,
    over: bool,
}

impl Following {
    /// The next lines; `None` at the end of the stream.
    async fn next(&mut self) -> Option<Bytes> {
        let since = Instant::now();
        loop {
            if let Some(entry) = self.ready.pop_front() {
                let text = json_line(&entry).unwrap_or_default();
                return Some(format!("data: {text}\n\n").into());
            }
            if self.over {
                return None;
            }
            let job = self.app.jobs.get(&self.id, None);
            let ended = job.map_or(true, |job| job.status.is_final());
            self.ready.extend(self.follower.read().unwrap_or_default());
            if self.ready.is_empty() && (ended || self.app.life.is_draining()) {
                // The last events of a job may be written after its status, so it is polled once
                // more.
                if std::mem::replace(&mut self.ends, true) {
                    self.over = true;
                    return Some("data: [DONE]\n\n".into());
                }
            }
            if self.ready.is_empty() {
                if since.elapsed() > KEEP_ALIVE {
                    return Some(": still here\n\n".into());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

#[derive(Debug, Deserialize)]
pub struct WhichRollouts {
    step: Option<u64>,
    limit: Option<usize>,
}

/// `GET /admin/jobs/{id}/rollouts`: the completions that a policy was trained on at `?step=N`, by
/// default at the last step that sampled.
///
/// # Errors
/// 404, 400 for an invalid parameter.
pub async fn rollouts(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    query: Result<Query<WhichRollouts>, QueryRejection>,
) -> Answer {
    let WhichRollouts { step, limit } = query::read(query)?;
    let limit = limit.unwrap_or(MAX_ROLLOUTS);
    if !(1..=MAX_ROLLOUTS).contains(&limit) {
        let message = format!("limit must be between 1 and {MAX_ROLLOUTS}.");
        return Err(ApiError::invalid("limit", message));
    }
    app.jobs.get(&id, None)?;
    let path = app.jobs.folder(&id).rollouts();
    let read = move || rollout_table::read(&path, step, limit);
    let read = tokio::task::spawn_blocking(read).await.map_err(ApiError::internal)?;
    let (rows, more) = read.map_err(ApiError::internal)?;
    Ok(Json(json!({"object": "list", "data": rows, "has_more": more})))
}

/// `GET /admin/jobs/{id}/plot.svg`.
///
/// # Errors
/// 404.
pub async fn curves(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let job = app.jobs.get(&id, None)?;
    let entries = app.jobs.events(&id)?;
    let draw = move || plot(&entries, &job.name).map_err(ApiError::internal);
    let svg = tokio::task::spawn_blocking(draw).await.map_err(ApiError::internal)??;
    Ok(([(header::CONTENT_TYPE, "image/svg+xml")], svg).into_response())
}

/// `GET /admin/jobs/{id}/report`: everything about a job on one HTML page; of an evaluation that has
/// ended what it found.
///
/// # Errors
/// 404.
pub async fn html_report(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let job = app.jobs.get(&id, None)?;
    let (folder, entries) = (app.jobs.folder(&id), app.jobs.events(&id)?);
    let write = move || -> Result<String, ApiError> {
        let order = folder.order().map_err(ApiError::internal)?;
        let evaluation = folder.artifacts().join(EvaluateOrder::HTML);
        if matches!(order, JobOrder::Evaluate(_)) && evaluation.exists() {
            return std::fs::read_to_string(evaluation).map_err(ApiError::internal);
        }
        let rows = |step| rollout_table::read(&folder.rollouts(), step, MAX_ROLLOUTS);
        let rollouts: Vec<_> = match (rows(Some(1)), rows(None)) {
            (Ok((first, _)), Ok((last, _))) if first == last => vec![last],
            (Ok((first, _)), Ok((last, _))) => vec![last, first],
            (Err(error), _) | (_, Err(error)) => return Err(ApiError::internal(error)),
        };
        report(&order, job.status.name(), &entries, &rollouts).map_err(ApiError::internal)
    };
    let page = tokio::task::spawn_blocking(write).await.map_err(ApiError::internal)??;
    Ok(([(header::CONTENT_TYPE, "text/html; charset=utf-8")], page).into_response())
}

/// `GET /admin/jobs/{id}/artifacts`.
///
/// # Errors
/// 404.
pub async fn artifacts(State(app): State<Arc<App>>, Path(id): Path<String>) -> Answer {
    let job = app.jobs.get(&id, None)?;
    Ok(Json(json!({"object": "list", "data": shown_artifacts(&app.jobs, &job)?})))
}

/// `GET /admin/jobs/{id}/artifacts/{artifact}`: the content of an artifact.
///
/// # Errors
/// 404.
pub async fn artifact(
    State(app): State<Arc<App>>,
    Path((id, artifact)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let job = app.jobs.get(&id, None)?;
    let all = app.jobs.store().artifacts(&job.id).map_err(ApiError::internal)?;
    let found = all.into_iter().find(|found| found.id == artifact);
    let found = found.ok_or_else(|| ApiError::not_found("The job has no artifact of that id."))?;
    let path = app.jobs.folder(&job.id).path().join(&found.file);
    let name = found.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
    files::download(path, &name).await
}

fn shown_artifacts(jobs: &Jobs, job: &StoredJob) -> Result<Vec<Value>, ApiError> {
    let all = jobs.store().artifacts(&job.id).map_err(ApiError::internal)?;
    let show = |artifact: crate::gateway::store::StoredArtifact| {
        let name = match artifact.kind.as_str() {
            // The name that requests use.
            "adapter" | "model" => job.name.clone(),
            _ => {
                let file = artifact.file.strip_prefix("artifacts").unwrap_or(&artifact.file);
                file.display().to_string()
            }
        };
        json!({
            "id": artifact.id,
            "type": artifact.kind,
            "name": name,
            "bytes": artifact.bytes,
            "sha256": artifact.sha256,
        })
    };
    Ok(all.into_iter().map(show).collect())
}

fn show(jobs: &Jobs, job: &StoredJob) -> Result<Value, ApiError> {
    let progress = jobs.progress(&job.id)?;
    let mut shown =
        progress.step.map_or(Ok(json!({})), serde_json::to_value).map_err(ApiError::internal)?;
    if let Some((done, total)) = progress.work {
        shown["done"] = done.into();
        shown["total"] = total.into();
    }
    if let Some(found) = progress.validation {
        for (name, value) in [
            ("validation_loss", found.loss),
            ("validation_accuracy", found.accuracy),
            ("validation_reward", found.reward()),
            ("bits_per_byte", found.bits_per_byte),
        ] {
            if let Some(value) = value {
                shown[name] = value.into();
            }
        }
    }
    if job.status != JobStatus::Running
        && let Value::Object(shown) = &mut shown
    {
        shown.remove("eta_seconds");
    }
    Ok(json!({
        "id": job.id,
        "object": "job",
        "kind": job.kind,
        "status": job.status.name(),
        "name": job.name,
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "progress": shown,
        "artifacts": shown_artifacts(jobs, job)?,
        "error": parsed(job.error.as_deref()),
        "spec": parsed(Some(&job.spec)),
    }))
}

/// Parses JSON from the store.
pub(in crate::gateway::api) fn parsed(text: Option<&str>) -> Value {
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null)
}
