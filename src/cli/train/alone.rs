//! A job without a server.

use super::{Screen, located};
use crate::cli::{CliError, PullBar};
use crate::config::{ByteSize, HubAccess};
use crate::dataset::check;
use crate::gateway::jobs::rows;
use crate::gateway::memory::available;
use crate::gateway::store::{ModelRef, PulledModel, Store, ensure, hex};
use crate::gguf::{Gguf, is_hugging_face};
use crate::job::spec::{Kind, Resolved, Spec};
use crate::job::{
    self, Artifact, ArtifactKind, Folder, Follower, Order, Outcome, ResourceEstimate,
};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};
use std::path::Path;
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
    if let Some(Outcome::Failed(_)) = folder.outcome().map_err(io)? {
        // Something may have been mended since.
        std::fs::remove_dir_all(folder.path()).map_err(io)?;
    }
    folder.create(&order).map_err(io)?;
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
        Some(Outcome::Failed(failure)) => Err(CliError::message(failure.message)),
        None => Err(CliError::message(format!(
            "The job's process ended without a word; see {}. The same command goes on from the \
             last checkpoint.",
            folder.log().display()
        ))),
    }
}

/// Looks everything up. The id is that of the specification and its files, so that the same ones find
/// the same folder.
fn order(store: &Store, mut spec: Spec, beside: &Path) -> Result<Order, CliError> {
    let settings = spec.resolve().map_err(CliError::Message)?;
    if spec.kind == Kind::Grpo {
        return Err(CliError::message(
            "A job of kind `grpo` samples from a served model: start `ingot serve MODEL \
             --admin-key KEY`, and give its address with --url.",
        ));
    }
    let train = located(beside, &spec.data.train)?;
    let validation = spec.data.validation.as_ref().map(|path| located(beside, path)).transpose()?;
    if let Some(dataset) = spec.kind.dataset() {
        for path in validation.iter().chain([&train]) {
            check(path, dataset, 1).map_err(|error| {
                CliError::message(format!("{} cannot be trained on: {error}.", path.display()))
            })?;
        }
    }
    let model = match &spec.model {
        Some(model) => {
            // A folder may be named as the data are: from where the specification is.
            let near = beside.join(model);
            let pulled = match is_hugging_face(&near) {
                true => pull(store, &near.to_string_lossy())?,
                false => pull(store, model)?,
            };
            spec.model = Some(pulled.name.clone());
            Some(pulled)
        }
        None => None,
    };
    check_needs(model.as_ref().map(|model| model.path.as_path()), &spec, &settings)?;
    let from = spec.pretrain.as_ref().and_then(|block| block.tokenizer.as_ref());
    let from = from.and_then(|tokenizer| tokenizer.from.as_ref());
    let tokenizer = from.map(|name| pull(store, name)).transpose()?;
    let mut init = None;
    if let Some(name) = spec.adapter.as_ref().and_then(|adapter| adapter.init.as_ref()) {
        let stored = store.adapter(name)?.map(|stored| store.folder().join(stored.file));
        init = Some(match stored {
            Some(path) => path,
            None if beside.join(name).exists() => beside.join(name),
            None => {
                return Err(CliError::message(format!(
                    "adapter.init: there is no adapter `{name}` in the data folder, and no such \
                     file or folder."
                )));
            }
        });
    }
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(&spec).unwrap_or_default());
    for path in validation.iter().chain([&train]) {
        let absolute = path.canonicalize().unwrap_or_else(|_| path.clone());
        hash.update(absolute.as_os_str().as_encoded_bytes());
        // Another text is another job.
        if let Ok(file) = std::fs::metadata(&absolute) {
            hash.update(file.len().to_le_bytes());
            hash.update(format!("{:?}", file.modified().ok()));
        }
    }
    let parent = model.as_ref().map(|model| Path::new(&model.source).to_owned());
    let parent = parent.filter(|folder| is_hugging_face(folder));
    if let (Some(_), Some(model)) = (&parent, &model) {
        // The folder may hold another model than the last time.
        hash.update(model.sha256.as_deref().unwrap_or_default());
    }
    let id = format!("ftjob-{}", &hex(&hash.finalize())[..24]);
    let name = job::name_of(&spec, &id);
    let mut order = Order::new(id, spec.filled(&settings), name, absolute(train)?);
    order.validation = validation.map(absolute).transpose()?;
    order.init = init.map(absolute).transpose()?;
    order.parent = parent;
    order.model = model.map(|model| model.path);
    order.tokenizer = tokenizer.map(|model| model.path);
    Ok(order)
}

fn pull(store: &Store, model: &str) -> Result<PulledModel, CliError> {
    let reference = ModelRef::parse(model)?;
    let mut bar = PullBar::new(reference.model_name());
    let pulled = ensure(store, &reference, &HubAccess::from_env(), &mut |event| bar.show(event));
    bar.finish();
    Ok(pulled?)
}

fn absolute(path: std::path::PathBuf) -> Result<std::path::PathBuf, CliError> {
    path.canonicalize()
        .map_err(|error| CliError::message(format!("{} cannot be used: {error}.", path.display())))
}

fn check_needs(model: Option<&Path>, spec: &Spec, settings: &Resolved) -> Result<(), CliError> {
    let refused = |why: String| CliError::message(format!("The model cannot be trained: {why}."));
    let header = model.map(Gguf::open_header).transpose();
    let header = header.map_err(|error| refused(error.to_string()))?;
    let needs = ResourceEstimate::of(header.as_ref(), spec, settings).map_err(refused)?;
    let available = available();
    match needs.memory <= available {
        true => Ok(()),
        false => Err(CliError::message(format!(
            "The job needs about {} of memory, but {} is available: use a smaller max_length or \
             micro_batch, activation_checkpointing, a smaller model, or an adapter.",
            ByteSize(needs.memory),
            ByteSize(available)
        ))),
    }
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
    let (adapter, model) = rows(order, artifacts);
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
