//! The job process, `ingot job FOLDER`: what it does around the work of the job's kind. It locks the
//! folder, listens for the request to stop, carries out the order and writes the outcome.

use super::{
    Artifact, ArtifactKind, Control, DISK_FULL, DONE, EventLog, Failure, Folder, JobOrder, Outcome,
    STOPPED, WAITS,
};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{getpid, setpriority_process};
use sha2::{Digest, Sha256};
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Lowest CPU priority, so that serving comes first.
const NICE: i32 = 19;
/// Highest OOM score, so that the system kills the job first when memory runs out.
const OOM_SCORE: &str = "1000";
/// How long to wait for an earlier process of the same job to exit.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why a job process ended without an outcome.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("the disk is full: {0}")]
    DiskFull(String),
    /// The job waits for something outside of it, which the folder names.
    #[error("{0}")]
    Waits(String),
    #[error("another process works on this job")]
    Busy,
    #[error("the job's folder: {0}")]
    Folder(#[from] io::Error),
}

/// Why the work failed or waits, or that the disk was full.
#[derive(Debug)]
pub enum JobFailure {
    Failed(Failure),
    Waits(Failure),
    DiskFull(String),
}

/// A failure with this code.
pub fn failed(code: &str, param: Option<&str>, message: impl std::fmt::Display) -> JobFailure {
    let param = param.map(str::to_owned);
    JobFailure::Failed(Failure { code: code.into(), message: message.to_string(), param })
}

/// Classifies an error: `DiskFull` if any error in its source chain is a lack of space, else a
/// failure with this code.
pub fn classify(code: &str, param: Option<&str>, error: &(dyn Error + 'static)) -> JobFailure {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
        {
            return JobFailure::DiskFull(error.to_string());
        }
        cause = error.source();
    }
    failed(code, param, error)
}

impl From<io::Error> for JobFailure {
    fn from(error: io::Error) -> Self {
        classify("io_error", None, &error)
    }
}

/// What the work of a kind of job gets.
#[derive(Debug)]
pub struct JobWork<'a> {
    pub folder: &'a Folder,
    pub log: &'a mut EventLog,
    pub control: &'a Control,
}

impl JobWork<'_> {
    /// An empty folder for temporary files. What an earlier attempt left is deleted.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn clear_cache(&self) -> io::Result<()> {
        let _ = fs::remove_dir_all(self.folder.cache());
        fs::create_dir_all(self.folder.cache())
    }

    /// An empty folder for artifacts. What an earlier attempt left is deleted.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn clear_artifacts(&self) -> io::Result<()> {
        let _ = fs::remove_dir_all(self.folder.artifacts());
        fs::create_dir_all(self.folder.artifacts())
    }

    /// A file in the folder of artifacts as an artifact, after it is synced to disk.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn artifact(&self, kind: ArtifactKind, name: impl AsRef<Path>) -> io::Result<Artifact> {
        let file = Path::new("artifacts").join(name);
        let (bytes, sha256) = digest(&self.folder.path().join(&file))?;
        Ok(Artifact { kind, file, bytes, sha256 })
    }

    /// Ends the process if it was asked to stop. For work without checkpoints, which starts again
    /// from its beginning: its files are deleted here, because no destructor runs. What a killed
    /// process leaves is deleted when the work starts again, or when the gateway ends the job.
    pub fn exit_if_stopped(&self) {
        if self.control.stops() {
            let _ = self.log.sync();
            let _ = fs::remove_dir_all(self.folder.artifacts());
            let _ = fs::remove_dir_all(self.folder.cache());
            std::process::exit(STOPPED.into());
        }
    }
}

/// Size and SHA-256 of a file, after it is synced to disk.
fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    file.sync_all()?;
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => {
                hash.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
    let digest = hash.finalize();
    Ok((bytes, digest.iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// Entry point of the job process. `work` carries out the order; it returns `None` if it was asked
/// to stop.
pub fn main(
    folder: &Path,
    work: impl FnOnce(&JobOrder, JobWork<'_>) -> Result<Option<Outcome>, JobFailure>,
) -> ExitCode {
    tracing_subscriber::fmt().with_writer(io::stderr).with_target(false).with_ansi(false).init();
    // Both calls are optional: a container may forbid them.
    let _ = setpriority_process(Some(getpid()), NICE);
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let folder = Folder::new(folder);
    let control = Arc::new(Control::new(&folder));
    if let Err(error) = listen(&control) {
        tracing::error!("signals cannot be received: {error}");
        return ExitCode::FAILURE;
    }
    match run(&folder, &control, work) {
        Ok(true) => ExitCode::from(DONE),
        Ok(false) => ExitCode::from(STOPPED),
        Err(error) => {
            tracing::error!("{error}");
            match error {
                JobError::DiskFull(_) => ExitCode::from(DISK_FULL),
                JobError::Waits(_) => ExitCode::from(WAITS),
                JobError::Busy | JobError::Folder(_) => ExitCode::FAILURE,
            }
        }
    }
}

/// Stops the job at SIGTERM, and when standard input is closed.
fn listen(control: &Arc<Control>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut terminate = {
        let _inside = runtime.enter();
        signal(SignalKind::terminate())?
    };
    let told = control.clone();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        runtime.block_on(terminate.recv());
        told.stop();
    })?;
    let alone = control.clone();
    std::thread::Builder::new().name("starter".into()).spawn(move || {
        let mut input = io::stdin().lock();
        while matches!(input.read(&mut [0; 64]), Ok(1..)) {}
        alone.stop();
    })?;
    Ok(())
}

/// Carries out the order. `true`: the job has ended and its folder holds the outcome. `false`:
/// `control` stopped it.
///
/// # Errors
/// [`JobError`]; when started again, the job resumes, from its last checkpoint if its kind has
/// some.
pub fn run(
    folder: &Folder,
    control: &Control,
    work: impl FnOnce(&JobOrder, JobWork<'_>) -> Result<Option<Outcome>, JobFailure>,
) -> Result<bool, JobError> {
    let _lock = lock(folder.path())?;
    if folder.outcome()?.is_some() {
        tidy(folder);
        return Ok(true);
    }
    let order = folder.order()?;
    let mut log = EventLog::open(&folder.events())?;
    let outcome = match work(&order, JobWork { folder, log: &mut log, control }) {
        Ok(None) => return Ok(false),
        Ok(Some(outcome)) => outcome,
        Err(JobFailure::DiskFull(message)) => return Err(JobError::DiskFull(message)),
        Err(JobFailure::Waits(what)) => {
            folder.wait_for(&what).map_err(folder_error)?;
            return Err(JobError::Waits(what.message));
        }
        Err(JobFailure::Failed(failure)) => Outcome::Failed { failure, artifacts: Vec::new() },
    };
    folder.end(&outcome).map_err(folder_error)?;
    tidy(folder);
    Ok(true)
}

fn folder_error(error: io::Error) -> JobError {
    match classify("", None, &error) {
        JobFailure::DiskFull(message) => JobError::DiskFull(message),
        JobFailure::Failed(_) | JobFailure::Waits(_) => JobError::Folder(error),
    }
}

/// Deletes files that a job does not need after its end. The adapters of its checkpoints are kept.
fn tidy(folder: &Folder) {
    let _ = fs::remove_dir_all(folder.cache());
    let _ = fs::remove_file(folder.fresh());
    for entry in fs::read_dir(folder.checkpoints()).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Locks the folder; the lock is held while the file is open.
fn lock(folder: &Path) -> Result<File, JobError> {
    let file = File::create(folder.join("lock"))?;
    let start = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::WOULDBLOCK) => return Err(JobError::Busy),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}
