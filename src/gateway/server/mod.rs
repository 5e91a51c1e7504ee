//! HTTP server: starts all parts, serves until a signal arrives, then drains.
//!
//! | file | content |
//! |---|---|
//! | `startup.rs` | models and adapters of the command line, and the output about them |
//! | `accept.rs` | connections |
//! | `socket.rs` | socket of one connection: write time-out, OpenAI-shaped protocol errors |
//! | `guard.rs` | checks of every request: id, caught panics, host, drain |
//! | `keys.rs` | keys of clients and of the operator |
//! | `body.rs` | request bodies: JSON within limits, and draining of unread bytes |
//! | `routes.rs` | table of routes, each with its access rule |
//! | `log.rs` | log output |

mod accept;
mod body;
mod guard;
mod keys;
mod log;
mod routes;
mod socket;
mod startup;

pub use routes::router;

use crate::config::ServeConfig;
use crate::gateway::app::App;
use crate::gateway::job_calls;
use crate::gateway::registry::Registry;
use crate::gateway::store::{BadRef, PullError, Store, StoreError};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Worker threads of the runtime. The gateway only moves bytes; the cores are for the engines.
const WORKERS: usize = 2;
/// Threads for blocking disk access: headers, templates, downloads, the database.
const BLOCKING_THREADS: usize = 8;
/// Time limit for sending the last bytes after every request has ended.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// Reason why the server did not start; each message names what to change.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("The runtime cannot be started: {0}.")]
    Runtime(std::io::Error),
    #[error("--log-level is not a level or a list of filters: {0}.")]
    LogLevel(String),
    #[error("Cannot listen on {address}: {source}. Choose another --port, or stop what uses it.")]
    Bind { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Reference(#[from] BadRef),
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error("{name}: {reason}")]
    Model { name: String, reason: String },
    #[error("The adapter {name} cannot be loaded: {reason}")]
    Adapter { name: String, reason: String },
}

/// Runs the gateway until SIGTERM or SIGINT, then drains. A second signal ends the process at once.
///
/// # Errors
/// [`ServeError`] if it cannot start.
pub fn serve(config: ServeConfig) -> Result<(), ServeError> {
    log::start(&config.log).map_err(ServeError::LogLevel)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_name("ingot-gateway")
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    let served = runtime.block_on(run(Arc::new(config)));
    // A download in progress keeps its thread; the part that it has written is resumed later.
    runtime.shutdown_background();
    served
}

async fn run(config: Arc<ServeConfig>) -> Result<(), ServeError> {
    let mut signals = Signals::new().map_err(ServeError::Runtime)?;
    let store = Arc::new(Store::open(&config.data_dir)?);
    let address = config.listen.address;
    let bound = |source| ServeError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(bound)?;
    let address = listener.local_addr().map_err(bound)?;

    let registry = Registry::new(config.clone(), store);
    let (send, connections) = mpsc::unbounded_channel();
    let app = App::new(config.clone(), registry, send);
    tokio::spawn(job_calls::serve(app.clone(), connections));
    let connections = accept::Connections::start(listener, app.clone());

    let started = tokio::select! {
        started = startup::load_all(&app) => Some(started),
        () = signals.next() => None,
    };
    let result = match started {
        Some(Ok(())) => {
            app.life.started();
            app.jobs.start();
            startup::announce(&app, address);
            signals.next().await;
            drain(&app, &mut signals).await;
            Ok(())
        }
        Some(Err(error)) => Err(error),
        None => Ok(()),
    };
    app.jobs.stop().await;
    // Requests that outlived the grace time end with an error, which is then still sent.
    app.registry.stop().await;
    connections.stop(FLUSH_TIME).await;
    result
}

/// Refuses new requests and waits for the running ones, at most for the grace time.
async fn drain(app: &App, signals: &mut Signals) {
    app.life.drain();
    let grace = app.config.listen.grace_time;
    tracing::info!(running = app.life.running(), ?grace, "draining");
    tokio::select! {
        () = app.life.idle() => {}
        () = tokio::time::sleep(grace) => {
            tracing::warn!(running = app.life.running(), "the grace time is over");
        }
        () = signals.next() => {
            tracing::warn!("second signal: leaving at once");
            std::process::exit(1);
        }
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests;
