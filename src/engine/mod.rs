//! The engine process: one loaded model, its scheduler and its KV cache.
//!
//! Threads: the *reader* reads frames from the socket; *intake* threads tokenize and validate
//! requests; the *step loop* (the main thread of this process) owns the model, the scheduler and
//! the cache; the *loader* reads adapter files; the *writer* encodes frames. The threads
//! communicate through channels; they share only the vocabulary.
//!
//! A request passes through `input_processor` → `scheduler` → `kv` → `runner` → `sampler` → `text` →
//! `output`. Speculative tokens are drafted and verified in the same step (`speculate`). Text is
//! assembled on the step loop, not on a separate thread: it costs microseconds, and a stop string
//! then ends its sequence in the same step that completes the string.

mod commands;
mod cost;
pub mod grammar;
mod handle_commands;
mod input_processor;
pub mod kv;
mod output_processor;
mod postprocess;
pub mod runner;
pub mod sampler;
mod scheduler;
mod sequence;
mod speculate;
mod step;
#[cfg(test)]
mod tests;
mod text;

use crate::gguf::{Gguf, score_head};
use crate::ipc::{self, Call, EngineError, FrameError, FromEngine, LoadSpec, RequestId, ToEngine};
use commands::{AdapterFacts, Command};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use input_processor::{InputProcessor, Job};
use rustix::process::{Signal, getpid, kill_process};
use sequence::SeqKey;
use std::io::{BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Instant;
use tracing::level_filters::LevelFilter;

/// Most requests and calls that may wait to be tokenized.
const INTAKE_QUEUE: usize = 1024;

fn log_level() -> LevelFilter {
    let named = std::env::var(crate::ipc::ENGINE_LOG).ok().and_then(|level| level.parse().ok());
    named.unwrap_or(LevelFilter::INFO)
}

/// Runs the `engine` role: serves the gateway over standard input until the gateway closes it.
pub fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .with_max_level(log_level())
        .init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), FrameError> {
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut reader = BufReader::new(socket.try_clone()?);
    let (router, work, to_write) = channels();
    std::thread::Builder::new()
        .name("writer".into())
        .spawn(move || write_frames(socket, &to_write))?;
    let ToEngine::Load(spec) = ipc::read_frame(&mut reader)? else {
        tracing::error!("the first frame must name a model");
        return Ok(());
    };
    // Start reading before the model loads, so that the gateway's death is noticed during loading.
    std::thread::Builder::new().name("reader".into()).spawn(move || router.receive(reader))?;
    load_and_serve(&spec, work)?;
    Ok(())
}

/// An engine on threads of this process, without the socket. The baseline for measuring the cost of
/// the process boundary.
pub struct Local {
    router: FrameRouter,
    frames: Receiver<FromEngine>,
}

impl Local {
    /// Starts to load the model; the first frame reports success or failure.
    pub fn start(spec: LoadSpec) -> std::io::Result<Self> {
        let (router, work, frames) = channels();
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || load_and_serve(&spec, work))?;
        Ok(Self { router, frames })
    }

    pub fn send(&self, frame: ToEngine) {
        self.router.pass_on(frame);
    }

    pub fn frames(&self) -> &Receiver<FromEngine> {
        &self.frames
    }
}

/// The channel ends that the engine's own threads hold.
struct Work {
    commands: Sender<Command>,
    to_do: Receiver<Command>,
    to_check: Receiver<Job>,
    to_load: Receiver<AdapterJob>,
    frames: Sender<FromEngine>,
}

fn channels() -> (FrameRouter, Work, Receiver<FromEngine>) {
    let (frames, to_write) = unbounded();
    let (commands, to_do) = unbounded();
    let (jobs, to_check) = bounded(INTAKE_QUEUE);
    let (adapters, to_load) = unbounded();
    let router = FrameRouter { commands: commands.clone(), jobs, adapters, frames: frames.clone() };
    (router, Work { commands, to_do, to_check, to_load, frames }, to_write)
}

/// Loads the model and runs its step loop on this thread until shutdown.
fn load_and_serve(spec: &LoadSpec, work: Work) -> std::io::Result<()> {
    let frames = work.frames.clone();
    let loaded = runner::load(spec);
    let loaded = loaded.and_then(|runner| Ok((runner::load_draft(&*runner, spec)?, runner)));
    let failed = match loaded {
        Ok((draft, runner)) => match serve(runner, draft, spec, work)? {
            Ok(()) => return Ok(()),
            Err(error) => error.message,
        },
        Err(error) => error.to_string(),
    };
    let _ = frames.send(FromEngine::LoadFailed(failed));
    // The gateway ends this process when it has read the failure.
    loop {
        std::thread::park();
    }
}

fn serve(
    runner: Box<dyn runner::ModelRunner>,
    draft: Option<Box<dyn runner::ModelRunner>>,
    spec: &LoadSpec,
    work: Work,
) -> std::io::Result<Result<(), EngineError>> {
    let Work { commands, to_do, to_check, to_load, frames } = work;
    let mut info = runner.info().clone();
    // A sequence longer than the whole cache could never run.
    info.context_length = info.context_length.min(info.kv_pages * info.page_tokens);
    InputProcessor::new(runner.tokenizer(), info.clone()).open(&to_check, &commands, &frames)?;
    let loader = runner.adapter_loader();
    let replies = frames.clone();
    std::thread::Builder::new()
        .name("loader".into())
        .spawn(move || load_adapters(&*loader, &to_load, &commands, &replies))?;
    Ok(step::StepLoop::new(runner, draft, spec, to_do, frames.clone()).map(|steps| {
        let _ = frames.send(FromEngine::Loaded(Box::new(info)));
        steps.run();
    }))
}

struct AdapterJob {
    call: u64,
    adapter: ipc::AdapterId,
    path: std::path::PathBuf,
    digest: [u8; 32],
    scale: f32,
}

/// Routes incoming frames to the threads that handle them.
struct FrameRouter {
    commands: Sender<Command>,
    jobs: Sender<Job>,
    adapters: Sender<AdapterJob>,
    frames: Sender<FromEngine>,
}

impl FrameRouter {
    /// Reads frames until the gateway closes the socket, then ends the process at once: no client
    /// is left to serve, and the model's memory should be freed.
    fn receive(self, mut from: BufReader<UnixStream>) {
        loop {
            match ipc::read_frame(&mut from) {
                Ok(ToEngine::Shutdown) => {
                    let _ = self.commands.send(Command::Shutdown);
                }
                Ok(frame) => self.pass_on(frame),
                Err(_) => {
                    let _ = kill_process(getpid(), Signal::KILL);
                    return;
                }
            }
        }
    }

    fn pass_on(&self, frame: ToEngine) {
        let command = match frame {
            ToEngine::Generate(request) => {
                let id = request.id;
                return self.check(Job::Generate(request, Instant::now()), |error| {
                    Answer::Refuse(id, error)
                });
            }
            ToEngine::Call { call, what } => match what {
                Call::LoadAdapter { adapter, path, digest, scale } => {
                    let _ = self.adapters.send(AdapterJob { call, adapter, path, digest, scale });
                    return;
                }
                Call::UnloadAdapter { adapter } => Command::UnloadAdapter { call, adapter },
                Call::Ping => Command::Ping { call },
                what => {
                    return self
                        .check(Job::Call { call, what }, |error| Answer::Reply(call, error));
                }
            },
            ToEngine::Cancel(request) => Command::Cancel(request),
            ToEngine::Finish { request, choice } => Command::Finish(SeqKey { request, choice }),
            ToEngine::Pause(request) => Command::Pause(request, true),
            ToEngine::Resume(request) => Command::Pause(request, false),
            ToEngine::Load(_) | ToEngine::Shutdown => return,
        };
        let _ = self.commands.send(command);
    }

    /// Hands a job to intake, or refuses the job if the intake queue is full.
    fn check(&self, job: Job, answer: impl FnOnce(EngineError) -> Answer) {
        if let Err(TrySendError::Full(_)) = self.jobs.try_send(job) {
            match answer(handle_commands::overloaded()) {
                Answer::Refuse(request, error) => {
                    let _ = self.commands.send(Command::Refuse(request, error));
                }
                Answer::Reply(call, error) => {
                    let _ = self.frames.send(FromEngine::Reply { call, result: Err(error) });
                }
            }
        }
    }
}

enum Answer {
    Refuse(RequestId, EngineError),
    Reply(u64, EngineError),
}

fn load_adapters(
    loader: &dyn runner::AdapterLoader,
    jobs: &Receiver<AdapterJob>,
    commands: &Sender<Command>,
    replies: &Sender<FromEngine>,
) {
    for AdapterJob { call, adapter, path, digest, scale } in jobs {
        match loader.prepare(&path, scale) {
            Ok(handle) => {
                let head = Gguf::open_header(&path).ok().and_then(|file| score_head(&file));
                let facts = AdapterFacts { digest, head: head.map(Into::into) };
                let _ = commands.send(Command::InstallAdapter { call, adapter, facts, handle });
            }
            Err(error) => {
                let result = Err(EngineError::invalid("adapter", error.to_string()));
                let _ = replies.send(FromEngine::Reply { call, result });
            }
        }
    }
}

fn write_frames(mut socket: UnixStream, frames: &Receiver<FromEngine>) {
    for frame in frames {
        let written = ipc::encode(&frame).and_then(|bytes| Ok(socket.write_all(&bytes)?));
        if let Err(error) = written {
            tracing::warn!("a frame could not be sent: {error}");
        }
    }
}
