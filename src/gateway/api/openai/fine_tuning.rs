//! `/v1/fine_tuning/jobs`: OpenAI's API of jobs, and the names of the models that jobs made.
//!
//! Source: OpenAI's API reference, "Fine-tuning", and the types of its Python client. A key sees
//! its own jobs; the admin key sees all.

use crate::gateway::api::admin::jobs::parsed;
use crate::gateway::api::openai::check_format;
use crate::gateway::api::openai::files::{Page, listed, seen_by};
use crate::gateway::api::wire::fields::{Fields, JsonBody};
use crate::gateway::api::wire::format::response_format as wire_format;
use crate::gateway::api::wire::query::{self, MetadataFilter, Pairs};
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::jobs::{NewJob, Requester, checkpoint_name};
use crate::gateway::store::{JobStatus, StoredJob};
use crate::grade::Grader;
use crate::job::spec::{Adapter, Data, Dpo, Export, Grpo, Sft, Spec, Task, Train, VERSION};
use crate::job::{Entry, JobEvent, JobSpec, Level, StepMetrics, Validation};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Path, Query, State};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Maximum number of entries on a page.
const MAX_PAGE: usize = 1_000;
/// Maximum number of metadata pairs, and of characters of their keys and values.
const METADATA: (usize, usize, usize) = (16, 64, 512);
/// Number of steps that `auto` aims at if there are few examples.
const FEW_STEPS: u64 = 100;
/// Maximum number of tokens of a completion that is sampled and graded.
const ANSWER_TOKENS: usize = 256;

type Answer = Result<Json<Value>, ApiError>;

/// Training method of a job.
#[derive(Debug, Default)]
struct Method {
    kind: MethodKind,
    hyperparameters: Hyperparameters,
    /// Only for reinforcement, which needs one.
    grader: Option<Grader>,
    response_format: Option<Value>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum MethodKind {
    #[default]
    Supervised,
    Dpo,
    Reinforcement,
}

impl MethodKind {
    /// Method of a job; `None` if the job is not one of OpenAI's kinds of fine-tuning.
    fn of(job: &StoredJob) -> Option<Self> {
        match job.kind.as_str() {
            "sft" => Some(Self::Supervised),
            "dpo" => Some(Self::Dpo),
            "grpo" => Some(Self::Reinforcement),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Supervised => "supervised",
            Self::Dpo => "dpo",
            Self::Reinforcement => "reinforcement",
        }
    }
}

/// Learning rate that `learning_rate_multiplier` multiplies.
fn learning_rate(task: &Task) -> f64 {
    let [of_adapter, _] = task.settings().learning_rates();
    of_adapter
}

/// Hyperparameters that a client requests. `None` is `auto`.
#[derive(Debug, Default, Clone, Copy)]
struct Hyperparameters {
    /// DPO only.
    beta: Option<f64>,
    n_epochs: Option<u64>,
    batch_size: Option<u64>,
    learning_rate_multiplier: Option<f64>,
    /// Reinforcement only: factor on the usual number of completions per group.
    compute_multiplier: Option<f64>,
    /// Reinforcement only: steps between two evaluations on the validation file.
    eval_interval: Option<u64>,
    /// Reinforcement only: completions per prompt of an evaluation.
    eval_samples: Option<u64>,
}

impl Hyperparameters {
    fn take(fields: &mut Fields, kind: MethodKind) -> Result<Self, ApiError> {
        let mut number = |key: &str, least, most| {
            auto_or(fields, key, |fields, key| fields.float(key, least..=most))
        };
        let learning_rate_multiplier = number("learning_rate_multiplier", 1e-4, 1e4)?;
        let (mut beta, mut compute_multiplier) = (None, None);
        match kind {
            MethodKind::Supervised => {}
            MethodKind::Dpo => beta = number("beta", 1e-4, 2.0)?,
            MethodKind::Reinforcement => {
                compute_multiplier = number("compute_multiplier", 0.25, 32.0)?;
            }
        }
        let mut count = |key: &str, most| {
            let found = auto_or(fields, key, |fields, key| fields.integer(key, 1..=most))?;
            Ok::<_, ApiError>(found.map(i64::unsigned_abs))
        };
        let (n_epochs, batch_size) = (count("n_epochs", 50)?, count("batch_size", 256)?);
        let (mut eval_interval, mut eval_samples) = (None, None);
        if kind == MethodKind::Reinforcement {
            (eval_interval, eval_samples) =
                (count("eval_interval", 1_000_000)?, count("eval_samples", 256)?);
            // Models that reason do so as their template specifies; no setting here changes it.
            fields.only_neutral("reasoning_effort", &["default".into(), "auto".into()])?;
        }
        Ok(Self {
            beta,
            n_epochs,
            batch_size,
            learning_rate_multiplier,
            compute_multiplier,
            eval_interval,
            eval_samples,
        })
    }

    /// Replaces `auto` values, depending on the number of examples.
    fn decided(self, kind: MethodKind, examples: u64) -> (u64, u64, f64) {
        let (batch, least, multiplier) = match kind {
            MethodKind::Supervised | MethodKind::Dpo => ((examples / 250).clamp(1, 8), 3, 1.0),
            // A batch consists of prompts, each with its group of completions.
            MethodKind::Reinforcement => (examples.clamp(1, 8), 1, 1.0),
        };
        let batch = self.batch_size.unwrap_or(batch);
        let enough = (FEW_STEPS * batch).div_ceil(examples.max(1));
        let epochs = self.n_epochs.unwrap_or(enough.clamp(least, 25));
        (epochs, batch, self.learning_rate_multiplier.unwrap_or(multiplier))
    }
}

/// Reads a field; `"auto"` counts as absent.
fn auto_or<T>(
    fields: &mut Fields,
    key: &str,
    take: impl FnOnce(&mut Fields, &str) -> Result<Option<T>, ApiError>,
) -> Result<Option<T>, ApiError> {
    match fields.take(key) {
        Some(Value::String(text)) if text == "auto" => Ok(None),
        Some(value) => {
            fields.put_back(key, value);
            take(fields, key)
        }
        None => Ok(None),
    }
}

/// `POST /v1/fine_tuning/jobs`.
///
/// # Errors
/// As [`crate::gateway::jobs::Jobs::create`].
pub async fn create(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    JsonBody(mut fields): JsonBody,
) -> Answer {
    let needed = |fields: &mut Fields, key: &str| {
        fields.string(key, crate::gateway::api::wire::MAX_NAME)?.ok_or_else(|| fields.missing(key))
    };
    let model = needed(&mut fields, "model")?;
    let training_file = needed(&mut fields, "training_file")?;
    let validation_file = fields.string("validation_file", crate::gateway::api::wire::MAX_NAME)?;
    let suffix = fields.string("suffix", 64)?;
    let seed = fields.integer("seed", 0..=i64::from(i32::MAX))?;
    let seed = seed.map_or_else(|| u64::from(rand::random::<u32>() >> 1), i64::unsigned_abs);
    let metadata = take_metadata(&mut fields)?;
    if fields.list("integrations", 100)?.is_some_and(|list| !list.is_empty()) {
        let message = "integrations are not supported: follow the job's events, or /metrics.";
        return Err(ApiError::invalid("integrations", message));
    }
    let Method { kind, hyperparameters, grader, response_format } = take_method(&mut fields)?;
    fields.finish()?;

    let owner = app.auth.owner(identity);
    let examples = examples(&app, &training_file).await;
    let (epochs, batch, multiplier) = hyperparameters.decided(kind, examples);
    let steps = (examples * epochs).div_ceil(batch).max(1);
    // Once per epoch, as OpenAI does, but at most ten times.
    let often = steps.div_ceil(epochs.min(10)).max(1);
    let eval_every = hyperparameters.eval_interval.unwrap_or(often);
    let beta = hyperparameters.beta.unwrap_or(Dpo::default().beta);
    let mut shown = json!({
        "n_epochs": epochs,
        "batch_size": batch,
        "learning_rate_multiplier": multiplier,
    });
    if kind == MethodKind::Dpo {
        // Rounded, so that an `f32` 0.1 is shown as 0.1 and not as 0.10000000149.
        shown["beta"] = json!((beta * 1e6).round() / 1e6);
    }
    let grpo = |grader| {
        let usual = Grpo { max_tokens: ANSWER_TOKENS, ..Grpo::with(grader) };
        let more = hyperparameters.compute_multiplier.unwrap_or(1.0);
        let num_generations = (usual.num_generations as f64 * more).round() as usize;
        let eval_samples = hyperparameters.eval_samples.map_or(1, |samples| samples as usize);
        Grpo { num_generations, eval_samples, response_format, ..usual }
    };
    let task = match (kind, grader) {
        (MethodKind::Supervised, _) => Task::Sft(Sft {}),
        (MethodKind::Dpo, _) => Task::Dpo(Dpo { beta, ..Dpo::default() }),
        (MethodKind::Reinforcement, Some(grader)) => Task::Grpo(grpo(grader)),
        (MethodKind::Reinforcement, None) => {
            let param = "method.reinforcement.grader";
            return Err(ApiError::invalid(param, format!("{param} is required.")));
        }
    };
    if let Task::Grpo(block) = &task {
        shown["compute_multiplier"] = json!(hyperparameters.compute_multiplier.unwrap_or(1.0));
        shown["eval_interval"] = json!(eval_every);
        shown["eval_samples"] = json!(block.eval_samples);
        shown["reasoning_effort"] = json!("default");
    }
    let request = json!({
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "metadata": metadata,
        "hyperparameters": shown,
    });
    let spec = Spec {
        version: VERSION,
        model: Some(model),
        name: None,
        suffix,
        seed,
        data: Data {
            human: None,
            train: training_file,
            validation: validation_file,
            shuffle: true,
            parse_control_tokens: app.config.limits.parse_control_tokens,
        },
        adapter: Adapter::usual(),
        export: Export::default(),
        train: Train {
            epochs: Some(epochs as f64),
            batch_size: Some(batch as usize),
            learning_rate: Some(learning_rate(&task) * multiplier),
            checkpoint_every: Some(often),
            eval_every: Some(eval_every),
            ..Train::default()
        },
        task,
    };
    check_format(&app, &spec, "method.reinforcement.response_format").await?;
    let requester = Requester { owner, admin: identity.admin, request: Some(request.to_string()) };
    let new = NewJob { spec: JobSpec::Train(Box::new(spec)), requester };
    let job = app.jobs.create(new).await?;
    show(&app, &job).map(Json)
}

/// Number of lines of a file. The file may be missing or owned by another key; job admission
/// reports that.
async fn examples(app: &App, id: &str) -> u64 {
    let plain = id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    let path = app.jobs.store().files_folder().join(id);
    let count = move || -> std::io::Result<u64> {
        use std::io::BufRead;
        let mut reader = std::io::BufReader::with_capacity(1 << 20, std::fs::File::open(path)?);
        let mut lines = 0;
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            lines += u64::from(!line.trim_ascii().is_empty());
            line.clear();
        }
        Ok(lines)
    };
    match plain {
        true => tokio::task::spawn_blocking(count).await.ok().and_then(Result::ok).unwrap_or(0),
        false => 0,
    }
}

fn take_metadata(fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    let (pairs, key, value) = METADATA;
    let wrong = || {
        ApiError::invalid(
            "metadata",
            format!(
                "metadata has at most {pairs} pairs of strings, of up to {key} and {value} \
                 characters."
            ),
        )
    };
    match fields.take("metadata") {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => {
            let fits = map.len() <= pairs
                && map.iter().all(|(name, text)| {
                    name.len() <= key && text.as_str().is_some_and(|text| text.len() <= value)
                });
            fits.then_some(map).ok_or_else(wrong)
        }
        Some(_) => Err(wrong()),
    }
}

/// Takes `method`, or the older `hyperparameters`.
fn take_method(fields: &mut Fields) -> Result<Method, ApiError> {
    let old = fields.object("hyperparameters")?;
    let Some(mut method) = fields.object("method")? else {
        let Some(mut old) = old else { return Ok(Method::default()) };
        let kind = MethodKind::Supervised;
        let hyperparameters = Hyperparameters::take(&mut old, kind)?;
        old.finish()?;
        return Ok(Method { kind, hyperparameters, grader: None, response_format: None });
    };
    let kind = match method.string("type", 64)?.as_deref() {
        Some("supervised") => MethodKind::Supervised,
        Some("dpo") => MethodKind::Dpo,
        Some("reinforcement") => MethodKind::Reinforcement,
        Some(other) => {
            let message = format!(
                "method.type must be `supervised`, `dpo` or `reinforcement`, not `{other}`."
            );
            return Err(ApiError::invalid("method.type", message));
        }
        None => return Err(method.missing("type")),
    };
    let (mut hyperparameters, mut grader) = (Hyperparameters::default(), None);
    let mut response_format = None;
    let block = method.object(kind.name())?;
    if block.is_none() && kind == MethodKind::Reinforcement {
        return Err(method.missing(kind.name()));
    }
    if let Some(mut block) = block {
        if kind == MethodKind::Reinforcement {
            let value = block.take("grader").ok_or_else(|| block.missing("grader"))?;
            let path = block.name("grader");
            grader = Some(
                Grader::parse_at(&path, value)
                    .map_err(crate::gateway::api::openai::graders::refused)?,
            );
            if let Some(format) = block.take("response_format") {
                // Read here so that a mistake is named before the job is created.
                if wire_format(&block.name("response_format"), &format)?.is_some() {
                    response_format = Some(format);
                }
            }
        }
        if let Some(mut inner) = block.object("hyperparameters")? {
            hyperparameters = Hyperparameters::take(&mut inner, kind)?;
            inner.finish()?;
        }
        block.finish()?;
    }
    method.finish()?;
    match old {
        None => Ok(Method { kind, hyperparameters, grader, response_format }),
        Some(_) => Err(ApiError::invalid(
            "hyperparameters",
            "Give hyperparameters inside method, or beside it, not both.",
        )),
    }
}

/// `GET /v1/fine_tuning/jobs`, the newest first.
///
/// # Errors
/// 400 for invalid page parameters.
pub async fn list(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    query: Result<Query<Page>, QueryRejection>,
    pairs: Pairs,
) -> Answer {
    let page = query::read(query)?;
    let filter = MetadataFilter::of(&query::read(pairs)?)?;
    let owner = seen_by(&app, identity);
    let mut jobs = app.jobs.store().jobs(owner.as_deref()).map_err(ApiError::internal)?;
    jobs.retain(|job| is_fine_tuning(job) && filter.takes(metadata(job).as_ref()));
    let (jobs, more) = page.cut(jobs, |job| &job.id, MAX_PAGE)?;
    let shown = jobs.iter().map(|job| show(&app, job)).collect::<Result<_, _>>()?;
    Ok(listed(shown, more))
}

/// The metadata that the client sent with the job.
fn metadata(job: &StoredJob) -> Option<Map<String, Value>> {
    let request: Value = serde_json::from_str(job.request.as_deref()?).ok()?;
    request["metadata"].as_object().cloned()
}

fn is_fine_tuning(job: &StoredJob) -> bool {
    MethodKind::of(job).is_some()
}

/// Finds a fine-tuning job that the request may see.
fn find(app: &App, identity: Identity, id: &str) -> Result<StoredJob, ApiError> {
    let job = app.jobs.get(id, seen_by(app, identity).as_deref())?;
    match is_fine_tuning(&job) {
        true => Ok(job),
        false => Err(ApiError::not_found(format!("`{id}` is no fine-tuning job."))),
    }
}

/// `GET /v1/fine_tuning/jobs/{id}`.
///
/// # Errors
/// 404.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Answer {
    show(&app, &find(&app, identity, &id)?).map(Json)
}

/// `POST /v1/fine_tuning/jobs/{id}/cancel`.
///
/// # Errors
/// As [`crate::gateway::jobs::Jobs::cancel`].
pub async fn cancel(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Answer {
    find(&app, identity, &id)?;
    show(&app, &app.jobs.cancel(&id, None)?).map(Json)
}

/// `POST /v1/fine_tuning/jobs/{id}/pause`.
///
/// # Errors
/// As [`crate::gateway::jobs::Jobs::pause`].
pub async fn pause(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Answer {
    find(&app, identity, &id)?;
    show(&app, &app.jobs.pause(&id, None)?).map(Json)
}

/// `POST /v1/fine_tuning/jobs/{id}/resume`.
///
/// # Errors
/// As [`crate::gateway::jobs::Jobs::resume`].
pub async fn resume(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
) -> Answer {
    find(&app, identity, &id)?;
    show(&app, &app.jobs.resume(&id, None)?).map(Json)
}

/// `GET /v1/fine_tuning/jobs/{id}/events`, the newest first.
///
/// # Errors
/// 404.
pub async fn events(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
    query: Result<Query<Page>, QueryRejection>,
) -> Answer {
    let page = query::read(query)?;
    let job = find(&app, identity, &id)?;
    let entries = app.jobs.events(&job.id)?;
    let shown = entries.iter().rev().map(|entry| event(&job.id, entry)).collect();
    let id = |event: &Value| event["id"].as_str().unwrap_or_default().to_owned();
    // Event ids are derived, not stored, so the event is looked up by its id text.
    let named: Vec<(String, Value)> =
        Vec::into_iter(shown).map(|event: Value| (id(&event), event)).collect();
    let (named, more) = page.cut(named, |(id, _)| id, MAX_PAGE)?;
    Ok(listed(named.into_iter().map(|(_, event)| event).collect(), more))
}

fn event(job: &str, entry: &Entry) -> Value {
    let level = match &entry.event {
        JobEvent::Message { level: Level::Warn } => "warn",
        JobEvent::Message { level: Level::Error } => "error",
        _ => "info",
    };
    let (kind, mut data) = match &entry.event {
        JobEvent::Step(step) => (
            "metrics",
            json!({
                "step": step.step,
                "total_steps": step.total_steps,
                "train_loss": step.loss,
                "train_mean_token_accuracy": step.accuracy,
                "train_mean_reward": step.reward(),
                "learning_rate": step.learning_rate,
                "tokens_per_second": step.tokens_per_second,
                "metrics": step.metrics,
            }),
        ),
        JobEvent::Validation(found) => (
            "metrics",
            json!({
                "step": found.step,
                "full_valid_loss": found.loss,
                "full_valid_mean_token_accuracy": found.accuracy,
                "full_valid_mean_reward": found.reward(),
                "metrics": found.metrics,
            }),
        ),
        JobEvent::Data { train, validation } => {
            ("message", json!({"train": train, "validation": validation}))
        }
        JobEvent::Checkpoint { step } => ("message", json!({"step": step})),
        JobEvent::Message { .. } | JobEvent::Sample { .. } | JobEvent::Progress { .. } => {
            ("message", json!({}))
        }
    };
    if let (Value::Object(data), "metrics") = (&mut data, kind) {
        data.retain(|_, value| !value.is_null());
    }
    json!({
        "object": "fine_tuning.job.event",
        "id": format!("ftevent-{}-{}", job.trim_start_matches("ftjob-"), entry.seq),
        "created_at": entry.at as i64,
        "level": level,
        "message": entry.message,
        "type": kind,
        "data": data,
    })
}

/// `GET /v1/fine_tuning/jobs/{id}/checkpoints`: checkpoints that can be used as models, the newest
/// first.
///
/// # Errors
/// 404.
pub async fn checkpoints(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    Path(id): Path<String>,
    query: Result<Query<Page>, QueryRejection>,
) -> Answer {
    let page = query::read(query)?;
    let job = find(&app, identity, &id)?;
    let folder = app.jobs.folder(&job.id);
    let (mut step, mut validation) = (None::<StepMetrics>, None::<Validation>);
    let mut found: Vec<(String, Value)> = Vec::new();
    for entry in app.jobs.events(&job.id)? {
        match entry.event {
            JobEvent::Step(seen) => step = Some(seen),
            JobEvent::Validation(seen) => validation = Some(seen),
            JobEvent::Checkpoint { step: at } if folder.checkpoint_adapter(at).exists() => {
                let (step, validation) = (step.clone(), validation.clone());
                let shown = checkpoint(&job, at, entry.at as i64, step, validation);
                found.retain(|(id, _)| shown["id"] != id.as_str());
                found.push((shown["id"].as_str().unwrap_or_default().to_owned(), shown));
            }
            _ => {}
        }
    }
    found.reverse();
    let (found, more) = page.cut(found, |(id, _)| id, MAX_PAGE)?;
    Ok(listed(found.into_iter().map(|(_, shown)| shown).collect(), more))
}

fn checkpoint(
    job: &StoredJob,
    at: u64,
    created_at: i64,
    step: Option<StepMetrics>,
    validation: Option<Validation>,
) -> Value {
    let mut metrics = Map::new();
    metrics.insert("step".into(), at.into());
    if let Some(step) = step {
        metrics.insert("train_loss".into(), step.loss.into());
        metrics.insert("train_mean_token_accuracy".into(), step.accuracy.into());
        metrics.insert("train_mean_reward".into(), step.reward().into());
    }
    if let Some(found) = validation {
        metrics.insert("full_valid_loss".into(), found.loss.into());
        metrics.insert("full_valid_mean_token_accuracy".into(), found.accuracy.into());
        metrics.insert("full_valid_mean_reward".into(), found.reward().into());
    }
    metrics.retain(|_, value| !value.is_null());
    json!({
        "object": "fine_tuning.job.checkpoint",
        "id": format!("ftckpt-{}-{at}", job.id.trim_start_matches("ftjob-")),
        "created_at": created_at,
        "fine_tuned_model_checkpoint": checkpoint_name(&job.name, at),
        "fine_tuning_job_id": job.id,
        "metrics": metrics,
        "step_number": at,
    })
}

fn show(app: &App, job: &StoredJob) -> Result<Value, ApiError> {
    let method = MethodKind::of(job).unwrap_or_default();
    let request = parsed(job.request.as_deref());
    let spec = parsed(Some(&job.spec));
    let succeeded = job.status == JobStatus::Succeeded;
    let eta = match job.status {
        JobStatus::Running => app.jobs.progress(&job.id)?.step.map(|step| step.eta_seconds),
        _ => None,
    };
    let now = crate::job::now();
    let error = match job.status {
        JobStatus::Failed => parsed(job.error.as_deref()),
        _ => Value::Null,
    };
    let or = |key: &str, other: &Value| match &request[key] {
        Value::Null => other.clone(),
        found => found.clone(),
    };
    let hyperparameters = match &request["hyperparameters"] {
        Value::Null => {
            // `None` if an older version cannot read the specification of a newer one.
            let task = Spec::deserialize(&spec).ok().map(|spec| spec.task);
            json!({
                "n_epochs": spec["train"]["epochs"].as_f64().unwrap_or(1.0).ceil() as u64,
                "batch_size": spec["train"]["batch_size"],
                "learning_rate_multiplier":
                    spec["train"]["learning_rate"].as_f64().zip(task.as_ref())
                        .map(|(rate, task)| rate / learning_rate(task)),
            })
        }
        found => found.clone(),
    };
    let mut of_method = json!({"hyperparameters": hyperparameters});
    if method == MethodKind::Reinforcement {
        of_method["grader"] = spec["grpo"]["grader"].clone();
        if !spec["grpo"]["response_format"].is_null() {
            of_method["response_format"] = spec["grpo"]["response_format"].clone();
        }
    }
    let result_files: Vec<String> =
        succeeded.then(|| app.jobs.result_file(&job.id)).into_iter().collect();
    Ok(json!({
        "object": "fine_tuning.job",
        "id": job.id,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": eta.map(|eta| (now + eta) as i64),
        "model": or("model", &spec["model"]),
        "fine_tuned_model": succeeded.then_some(&job.name),
        "organization_id": "ingot",
        "status": match job.status {
            JobStatus::Validating => "validating_files",
            // The API has no status for a paused job.
            JobStatus::Paused => "queued",
            other => other.name(),
        },
        "hyperparameters": hyperparameters,
        "method": {"type": method.name(), method.name(): of_method},
        "training_file": or("training_file", &spec["data"]["train"]),
        "validation_file": or("validation_file", &spec["data"]["validation"]),
        "result_files": result_files,
        "trained_tokens": job.trained_tokens,
        "seed": spec["seed"],
        "error": error,
        "integrations": [],
        "metadata": or("metadata", &json!({})),
        "suffix": request["suffix"],
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn method(body: &str) -> Result<Hyperparameters, ApiError> {
        let mut fields = Fields::parse(body.as_bytes())?;
        let taken = take_method(&mut fields)?;
        fields.finish()?;
        Ok(taken.hyperparameters)
    }

    #[test]
    fn hyperparameters_stand_in_either_place() {
        let inside = r#"{"method": {"type": "supervised", "supervised": {"hyperparameters":
            {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}}}}"#;
        let decided =
            |body: &str, examples| method(body).unwrap().decided(MethodKind::Supervised, examples);
        assert_eq!(decided(inside, 1000), (2, 4, 0.5));
        assert_eq!(decided(r#"{"hyperparameters": {"n_epochs": 4}}"#, 20), (4, 1, 1.0));
        // Few examples are trained on for more epochs.
        assert_eq!(decided("{}", 20), (5, 1, 1.0));
        assert_eq!(decided("{}", 10_000), (3, 8, 1.0));
        assert_eq!(decided("{}", 0), (25, 1, 1.0));
    }

    #[test]
    fn reinforcement_has_a_grader() {
        let body = r#"{"method": {"type": "reinforcement", "reinforcement": {
            "grader": {"type": "length", "name": "l", "unit": "characters", "max": 9},
            "hyperparameters": {"compute_multiplier": 2, "eval_interval": "auto",
                "eval_samples": 3, "reasoning_effort": "default"}}}}"#;
        let mut fields = Fields::parse(body.as_bytes()).unwrap();
        let taken = take_method(&mut fields).unwrap();
        assert_eq!((taken.kind, taken.grader.unwrap().name()), (MethodKind::Reinforcement, "l"));
        let found = taken.hyperparameters;
        assert_eq!(
            (found.compute_multiplier, found.eval_interval, found.eval_samples),
            (Some(2.0), None, Some(3))
        );
        assert_eq!(found.decided(MethodKind::Reinforcement, 100), (8, 8, 1.0));
        assert_eq!(found.decided(MethodKind::Reinforcement, 10_000), (1, 8, 1.0));
    }

    #[test]
    fn dpo_has_a_beta() {
        let body = r#"{"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.25}}}}"#;
        let taken = method(body).unwrap();
        assert_eq!((taken.beta, taken.n_epochs), (Some(0.25), None));
        assert_eq!(method(r#"{"method": {"type": "dpo"}}"#).unwrap().beta, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param) in [
            (r#"{"method": {"type": "reinforcement"}}"#, "method.reinforcement"),
            (
                r#"{"method": {"type": "reinforcement", "reinforcement": {}}}"#,
                "method.reinforcement.grader",
            ),
            (
                r#"{"method": {"type": "reinforcement", "reinforcement": {"grader":
                    {"type": "python", "name": "p", "source": "x"}}}}"#,
                "method.reinforcement.grader.type",
            ),
            (
                r#"{"method": {"type": "reinforcement", "reinforcement": {"grader":
                    {"type": "length", "name": "l", "unit": "characters", "max": 9}, "hyperparameters": {"beta": 1}}}}"#,
                "method.reinforcement.hyperparameters.beta",
            ),
            (
                r#"{"method": {"type": "reinforcement", "reinforcement": {"grader":
                    {"type": "length", "name": "l", "unit": "characters", "max": 9},
                    "hyperparameters": {"reasoning_effort": "high"}}}}"#,
                "method.reinforcement.hyperparameters.reasoning_effort",
            ),
            (
                r#"{"method": {"type": "reinforcement", "reinforcement": {"grader":
                    {"type": "length", "name": "l", "unit": "characters", "max": 9},
                    "response_format": {"type": "json_schema"}}}}"#,
                "method.reinforcement.response_format.json_schema",
            ),
            (
                r#"{"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}"#,
                "method.dpo.hyperparameters.beta",
            ),
            (
                r#"{"method": {"type": "dpo", "supervised": {"hyperparameters": {"n_epochs": 2}}}}"#,
                "method.supervised",
            ),
            (r#"{"method": {"type": "dance"}}"#, "method.type"),
            (r#"{"method": {}}"#, "method.type"),
            (r#"{"hyperparameters": {"n_epochs": 51}}"#, "hyperparameters.n_epochs"),
            (r#"{"hyperparameters": {"n_epochs": "some"}}"#, "hyperparameters.n_epochs"),
            (r#"{"hyperparameters": {"beta": 1}}"#, "hyperparameters.beta"),
            (r#"{"method": {"type": "supervised"}, "hyperparameters": {}}"#, "hyperparameters"),
            (
                r#"{"method": {"type": "supervised", "supervised": {"hyperparameters":
                    {"batch_size": 257}}}}"#,
                "method.supervised.hyperparameters.batch_size",
            ),
        ] {
            assert_eq!(method(body).unwrap_err().param.as_deref(), Some(param), "{body}");
        }
    }
}
