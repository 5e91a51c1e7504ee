//! The served model that a job with a grader trains: the connection to it, and its adapter's file.

use super::artifacts::facts;
use super::gateway_client::GatewayClient;
use crate::job::Order;
use crate::job::spec::Spec;
use crate::job::{JobFailure, failed};
use crate::train::export;
use crate::train::model::{Model, Training};
use crate::train::recipes::TrainError;
use std::cell::RefCell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Error message if the job was started without a gateway.
const ALONE: &str = "a job of this kind samples from the served model: give it to a server \
                     (`ingot train SPEC --url URL`)";

/// Connects to the gateway if the kind of job samples completions.
pub(super) fn connect(spec: &Spec) -> Result<Option<RefCell<GatewayClient>>, JobFailure> {
    if !spec.task.settings().samples() {
        return Ok(None);
    }
    match GatewayClient::open()? {
        Some(client) => Ok(Some(RefCell::new(client))),
        None => Err(failed("no_server", None, ALONE)),
    }
}

/// Writes the model's adapter to a path, in the engine's format.
pub(super) fn exporter<'a>(
    model: &'a Model,
    training: &'a Training,
    order: &Order,
) -> impl Fn(&Path) -> Result<(), TrainError> + 'a {
    let facts = facts(order, None);
    move |path| {
        let Training::Lora(lora) = training else {
            return Err(TrainError::Spec("adapter: it is missing".into()));
        };
        let written = export::lora_gguf(model, lora, &facts, path);
        written.map(drop).map_err(|error| io::Error::other(error).into())
    }
}

/// The file to which the policy's adapter is written at every step, on a memory file system if
/// there is one. It is deleted when this value is dropped.
pub(super) struct AdapterFile(PathBuf);

impl AdapterFile {
    /// Also deletes the files that killed processes of the job left.
    pub(super) fn new(job: &str, cache: &Path) -> Self {
        let memory = Path::new("/dev/shm");
        let folder = if memory.is_dir() { memory } else { cache };
        let start = format!("ingot-{job}-");
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            if file.file_name().to_str().is_some_and(|name| name.starts_with(&start)) {
                let _ = fs::remove_file(file.path());
            }
        }
        Self(folder.join(format!("{start}{}.gguf", std::process::id())))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for AdapterFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
