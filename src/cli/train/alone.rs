//! A job without a server.

use super::{Screen, located};
use crate::cli::{CliError, PullBar};
use crate::config::{ByteSize, HubAccess};
use crate::dataset::check;
use crate::gateway::jobs::{fits, rows};
use crate::gateway::memory::available;
use crate::gateway::store::{ModelRef, PulledModel, Store, ensure, hex};
use crate::gguf::is_hugging_face;
use crate::job::spec::{Resolved, Spec};
use crate::job::{
    self, Artifact, ArtifactKind, BaseModel, Folder, Follower, InitAdapter, Order, Outcome,
    ResolveError, ResolvedJob, Sources,
};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How often the job's events are read.
const LOOK_EVERY: Duration = Duration::from_millis(200);

pub(super) async fn run(
    data: &Path,
    spec: Spec,
    beside: &Path,
    again: bool,
) -> Result<ExitCode, CliError> {
    let store = Store::open(data)?;
    let order = order(&store, spec, beside)?;
    let folder = Folder::new(store.jobs_folder().join(&order.id));
    let io = |error: std::io::Error| {
        let path = folder.path().display();
        CliError::message(format!("The job's folder {path} cannot be used: {error}."))
    };
    if again && folder.path().exists() {
        std::fs::remove_dir_all(folder.path()).map_err(io)?;
    }
    if let Some(Outcome::Failed { .. }) = folder.outcome().map_err(io)? {
        // Something may have been mended since.
        std::fs::remove_dir_all(folder.path()).map_err(io)?;
    }
    folder.create(&order.clone().into()).map_err(io)?;
    let settings = order.spec.resolve().map_err(CliError::Message)?;
    if folder.outcome().map_err(io)?.is_none() && !follow(&folder, &settings).await? {
        eprintln!("Stopped. The same command goes on from the last checkpoint.");
        return Ok(ExitCode::from(130));
    }
    match folder.outcome().map_err(io)? {
        Some(Outcome::Succeeded { artifacts, .. }) => {
            list(&store, &order, &artifacts)?;
            tell(&folder, &order, &artifacts);
            Ok(ExitCode::SUCCESS)
        }
        Some(Outcome::Failed { failure, .. }) => Err(CliError::message(failure.message)),
        None => Err(CliError::message(format!(
            "The job's process ended without a word; see {}. The same command goes on from the \
             last checkpoint.",
            folder.log().display()
        ))),
    }
}

/// Finds the files that the specification names. The id is a digest of the specification and its files,
/// so that the same command finds the same folder.
fn order(store: &Store, spec: Spec, beside: &Path) -> Result<Order, CliError> {
    spec.resolve().map_err(CliError::Message)?;
    let task = spec.task.settings();
    if task.samples() {
        return Err(CliError::message(format!(
            "A job of kind `{}` samples from a served model: start `ingot serve MODEL \
             --admin-key KEY`, and give its address with --url.",
            spec.task.name()
        )));
    }
    let train = located(beside, &spec.data.train)?;
    let validation = spec.data.validation.as_ref().map(|path| located(beside, path)).transpose()?;
    if let Some(dataset) = task.dataset() {
        for path in validation.iter().chain([&train]) {
            check(path, dataset, 1).map_err(|error| {
                CliError::message(format!("{} cannot be trained on: {error}.", path.display()))
            })?;
        }
    }
    let mut sources = sources(store, &spec, beside)?;
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |file| file.len());
    sources.data_bytes = validation.iter().chain([&train]).map(size).sum();
    let cannot = |error: ResolveError| CliError::message(format!("{error}."));
    let job = ResolvedJob::new(spec, sources).map_err(cannot)?;
    let disk = rustix::fs::statvfs(store.folder())
        .map_err(|error| CliError::message(format!("The data folder cannot be read: {error}.")))?;
    fits(&job.estimate, available(), disk.f_bavail.saturating_mul(disk.f_frsize))
        .map_err(|error| CliError::message(error.message))?;
    let id = id(&job, validation.iter().chain([&train]));
    Ok(job.order(id, absolute(train)?, validation.map(absolute).transpose()?))
}

/// Finds the models that a specification names, and gets those that are not here yet.
fn sources(store: &Store, spec: &Spec, beside: &Path) -> Result<Sources, CliError> {
    let mut sources = Sources::default();
    if let Some(model) = &spec.model {
        // A folder may be named as the data are: from where the specification is.
        let near = beside.join(model);
        let found = match is_hugging_face(&near) {
            true => pull(store, &near.to_string_lossy())?,
            false => pull(store, model)?,
        };
        let PulledModel { name, path, sha256, source, .. } = found;
        let parent = Some(PathBuf::from(source)).filter(|folder| is_hugging_face(folder));
        sources.base = Some(BaseModel { name, path, sha256, parent, adapter: None });
    }
    if let Some(name) = spec.adapter.as_ref().and_then(|adapter| adapter.init.as_ref()) {
        let (path, base) = match store.adapter(name)? {
            Some(stored) => (store.folder().join(stored.file), Some(stored.base_model)),
            None if beside.join(name).exists() => (beside.join(name), None),
            None => {
                return Err(CliError::message(format!(
                    "adapter.init: there is no adapter `{name}` in the data folder, and no such \
                     file or folder."
                )));
            }
        };
        sources.init = Some(InitAdapter { path: absolute(path)?, base });
    }
    if let Some(name) = spec.tokenizer_from() {
        sources.tokenizer = Some(pull(store, name)?.path);
    }
    if let Some(name) = spec.task.settings().teacher() {
        sources.teacher = Some(pull(store, name)?.path);
    }
    Ok(sources)
}

/// The id of a job: a digest of its specification, its data files and its model.
fn id<'a>(job: &ResolvedJob, data: impl Iterator<Item = &'a PathBuf>) -> String {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(&job.spec).unwrap_or_default());
    for path in data {
        let absolute = path.canonicalize().unwrap_or_else(|_| path.clone());
        hash.update(absolute.as_os_str().as_encoded_bytes());
        // A file that was written again makes another job.
        if let Ok(file) = std::fs::metadata(&absolute) {
            hash.update(file.len().to_le_bytes());
            hash.update(format!("{:?}", file.modified().ok()));
        }
    }
    if let Some(digest) = job.digest_of_folder() {
        // A Hugging Face folder may hold another model than the last time.
        hash.update(digest);
    }
    format!("ftjob-{}", &hex(&hash.finalize())[..24])
}

fn pull(store: &Store, model: &str) -> Result<PulledModel, CliError> {
    let reference = ModelRef::parse(model)?;
    let mut bar = PullBar::new(reference.model_name());
    let pulled = ensure(store, &reference, &HubAccess::from_env(), &mut |event| bar.show(event));
    bar.finish();
    Ok(pulled?)
}

fn absolute(path: PathBuf) -> Result<PathBuf, CliError> {
    path.canonicalize()
        .map_err(|error| CliError::message(format!("{} cannot be used: {error}.", path.display())))
}

/// Runs the process and shows what it says. `false`: it was stopped by a signal.
async fn follow(folder: &Folder, settings: &Resolved) -> Result<bool, CliError> {
    let cannot = |error: std::io::Error| {
        CliError::message(format!("The job's process cannot be run: {error}."))
    };
    let mut events = Follower::new(folder.events(), 0);
    let _ = events.read();
    let mut process = job::spawn(folder, settings.threads, None).map_err(cannot)?;
    let child = &mut process.child;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(cannot)?;
    let mut screen = Screen::new();
    let mut told = false;
    let status = loop {
        let stop = tokio::select! {
            status = child.wait() => break status.map_err(cannot)?,
            () = tokio::time::sleep(LOOK_EVERY) => false,
            _ = interrupt.recv() => true,
            _ = terminate.recv() => true,
        };
        if stop && told {
            // Twice: somebody is in a hurry.
            child.start_kill().map_err(cannot)?;
        } else if stop {
            told = true;
            let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
            pid.map(|pid| kill_process(pid, Signal::TERM));
        }
        events.read().unwrap_or_default().iter().for_each(|entry| screen.show(entry));
    };
    events.read().unwrap_or_default().iter().for_each(|entry| screen.show(entry));
    drop(screen);
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        Some(job::DONE) => Ok(true),
        Some(job::DISK_FULL) => Err(CliError::message(
            "The disk of the data folder is full: make room, and give the same command; it goes \
             on from the last checkpoint.",
        )),
        _ if told => Ok(false),
        Some(job::STOPPED) => Ok(false),
        _ => Ok(true),
    }
}

/// Lists what was made in the store, where `ingot serve` finds it.
fn list(store: &Store, order: &Order, artifacts: &[Artifact]) -> Result<(), CliError> {
    let (adapter, model) = rows(&order.clone().into(), artifacts);
    if let Some(adapter) = adapter {
        store.put_adapter(&adapter)?;
    }
    if let Some(model) = model {
        store.put_model(&model)?;
    }
    Ok(())
}

/// What there is now, and what to do with it.
fn tell(folder: &Folder, order: &Order, artifacts: &[Artifact]) {
    let name = &order.name;
    println!("{name}");
    for made in artifacts {
        eprintln!("  {}  {}", folder.path().join(&made.file).display(), ByteSize(made.bytes));
    }
    let adapter = artifacts.iter().any(|made| made.kind == ArtifactKind::Adapter);
    match (&order.spec.model, adapter) {
        (Some(base), true) => {
            eprintln!("Serve it: `ingot serve {base}`, and ask for the model `{name}`.");
        }
        _ => eprintln!("Serve it: `ingot serve {name}`."),
    }
}
