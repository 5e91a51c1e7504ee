//! Supervisor of one engine process: it starts the process, exchanges frames with it, and restarts
//! it when it dies.
//!
//! An [`Engine`] outlives its processes. When a process dies, every request in flight fails at once
//! with an error, and a new process is started after a back-off, with the same model and the same
//! adapters. A process counts as alive only while its step loop answers pings: the watchdog kills a
//! stopped or hung process, which is then restarted like a dead one.

use crate::ipc::{
    self, AdapterId, Call, EngineError, EngineErrorKind, Event, FrameError, FromEngine, Generate,
    LoadSpec, ModelInfo, Progress, Reply, RequestId, ToEngine,
};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::pin;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::level_filters::LevelFilter;

/// The gateway tells the engine to pause a request if more than this many of its events wait for
/// the client.
const PAUSE_ABOVE: usize = 256;
const RESUME_BELOW: usize = 32;
/// Number of log lines of the engine that are shown when it fails to load a model.
const LOG_LINES: usize = 40;
/// The watchdog waits for at least the duration of this many of the longest recent steps.
const STEPS_OF_PATIENCE: u32 = 4;
const PING_EVERY: Duration = Duration::from_millis(500);
/// Upper bound of the pause before a restart.
const MAX_BACK_OFF: Duration = Duration::from_secs(30);
/// A process that lived at least this long resets the back-off.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// State of an engine. Requests are accepted only in state `Ready`.
#[derive(Debug, Clone)]
pub enum EngineState {
    Loading,
    Ready(Arc<ModelInfo>),
    Restarting {
        reason: String,
    },
    /// The model cannot be loaded; `reason` ends with the last lines of the engine's log.
    Failed {
        reason: String,
    },
    Stopped,
}

/// A LoRA adapter that every process of this engine loads before it accepts requests.
#[derive(Debug, Clone)]
pub struct EngineAdapter {
    pub path: PathBuf,
    pub digest: [u8; 32],
    pub scale: f32,
}

pub struct Engine {
    name: String,
    spec: LoadSpec,
    watchdog: Duration,
    state: watch::Sender<EngineState>,
    connection: Mutex<Option<Arc<Connection>>>,
    adapters: Mutex<HashMap<AdapterId, EngineAdapter>>,
    progress: Mutex<Progress>,
    batch_sizes: Mutex<Vec<u32>>,
    log: Mutex<VecDeque<String>>,
    next_id: AtomicU64,
    restarts: AtomicU64,
    pid: AtomicU64,
    stop: watch::Sender<bool>,
}

/// Connection to one engine process.
struct Connection {
    send: mpsc::UnboundedSender<ToEngine>,
    requests: Mutex<HashMap<RequestId, Arc<Sink>>>,
    calls: Mutex<HashMap<u64, oneshot::Sender<Result<Reply, EngineError>>>>,
    dead: AtomicBool,
}

/// The gateway's sender of one request's events.
struct Sink {
    send: mpsc::UnboundedSender<Event>,
    waiting: AtomicUsize,
    paused: Mutex<bool>,
}

impl Sink {
    /// Recounts the waiting events while it holds the lock. A client that has caught up in the
    /// meantime is not paused; a client that catches up later finds the request paused and resumes
    /// it.
    fn pause_if_behind(&self, pause: impl FnOnce()) {
        if self.waiting.load(Ordering::Acquire) <= PAUSE_ABOVE {
            return;
        }
        let mut paused = lock(&self.paused);
        if !*paused && self.waiting.load(Ordering::Acquire) > PAUSE_ABOVE {
            *paused = true;
            pause();
        }
    }
}

/// A running request. Dropping it cancels the request in the engine.
pub struct Generation {
    id: RequestId,
    events: mpsc::UnboundedReceiver<Event>,
    sink: Arc<Sink>,
    connection: Arc<Connection>,
    over: bool,
}

impl Engine {
    /// Starts the first process; [`Engine::ready`] returns the result.
    pub fn start(name: String, spec: LoadSpec, watchdog: Duration) -> Arc<Self> {
        let engine = Arc::new(Self {
            name,
            spec,
            watchdog,
            state: watch::Sender::new(EngineState::Loading),
            connection: Mutex::default(),
            adapters: Mutex::default(),
            progress: Mutex::default(),
            batch_sizes: Mutex::default(),
            log: Mutex::default(),
            next_id: AtomicU64::new(1),
            restarts: AtomicU64::new(0),
            pid: AtomicU64::new(0),
            stop: watch::Sender::new(false),
        });
        tokio::spawn(engine.clone().supervise());
        engine
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn spec(&self) -> &LoadSpec {
        &self.spec
    }

    pub fn state(&self) -> EngineState {
        self.state.borrow().clone()
    }

    /// The loaded model, or the error that a request would get if there is none.
    pub fn info(&self) -> Result<Arc<ModelInfo>, EngineError> {
        match &*self.state.borrow() {
            EngineState::Ready(info) => Ok(info.clone()),
            EngineState::Loading => Err(unavailable("the model is still loading; try again soon")),
            EngineState::Restarting { reason } => {
                Err(unavailable(format!("the engine is being restarted ({reason}); try again")))
            }
            EngineState::Failed { reason } => {
                Err(unavailable(format!("the model could not be loaded: {reason}")))
            }
            EngineState::Stopped => Err(unavailable("the model has been unloaded")),
        }
    }

    /// Waits until the engine is ready or has failed to load its model.
    pub async fn ready(&self) -> Result<Arc<ModelInfo>, String> {
        let mut state = self.state.subscribe();
        loop {
            match &*state.borrow_and_update() {
                EngineState::Ready(info) => return Ok(info.clone()),
                EngineState::Failed { reason } => return Err(reason.clone()),
                EngineState::Stopped => return Err("the model has been unloaded".into()),
                EngineState::Loading | EngineState::Restarting { .. } => {}
            }
            if state.changed().await.is_err() {
                return Err("the engine is gone".into());
            }
        }
    }

    pub fn progress(&self) -> Progress {
        lock(&self.progress).clone()
    }

    /// Number of requests that were sent to the engine and have not ended.
    pub fn in_flight(&self) -> usize {
        lock(&self.connection).as_ref().map_or(0, |connection| lock(&connection.requests).len())
    }

    /// Batch sizes (rows per step) since the last call, for the metrics.
    pub fn take_batch_sizes(&self) -> Vec<u32> {
        std::mem::take(&mut lock(&self.batch_sizes))
    }

    pub fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// Process id of the running process, if there is one.
    pub fn pid(&self) -> Option<u32> {
        match self.pid.load(Ordering::Relaxed) {
            0 => None,
            pid => u32::try_from(pid).ok(),
        }
    }

    /// Sends a request and sets its `id`. Returns an error at once if the engine is not ready.
    pub fn generate(&self, mut request: Generate) -> Result<Generation, EngineError> {
        self.info()?;
        let connection = self.connection()?;
        request.id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let id = request.id;
        let (send, events) = mpsc::unbounded_channel();
        let sink = Arc::new(Sink { send, waiting: AtomicUsize::new(0), paused: Mutex::new(false) });
        lock(&connection.requests).insert(id, sink.clone());
        let generation =
            Generation { id, events, sink, connection: connection.clone(), over: false };
        // `Connection::fail_all` sets `dead` before it fails the sinks. If `dead` is not set here,
        // the sink inserted above will be failed with the others.
        if connection.dead.load(Ordering::Acquire) {
            return Err(unavailable("the engine process ended; it is being restarted"));
        }
        connection.send(ToEngine::Generate(Box::new(request)))?;
        Ok(generation)
    }

    /// Sends a call to the engine and waits for its reply.
    pub async fn call(&self, what: Call) -> Result<Reply, EngineError> {
        self.info()?;
        self.connection()?.call(self.next_id.fetch_add(1, Ordering::Relaxed), what).await
    }

    /// Loads an adapter into the running process and into every later one.
    pub async fn load_adapter(
        &self,
        adapter: AdapterId,
        what: EngineAdapter,
    ) -> Result<(), EngineError> {
        // Listed before the call, so that a process that starts in the meantime loads the adapter
        // too.
        let call = load_adapter_call(adapter, &what);
        lock(&self.adapters).insert(adapter, what);
        let loaded = self.call(call).await;
        if loaded.is_err() {
            lock(&self.adapters).remove(&adapter);
        }
        loaded.map(|_| ())
    }

    /// Unloads an adapter after the running requests that use it have ended. New requests must not
    /// use it.
    pub fn unload_adapter(self: &Arc<Self>, adapter: AdapterId) {
        lock(&self.adapters).remove(&adapter);
        let engine = self.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                // A dead engine has no adapters to unload.
                let _ = engine.call(Call::UnloadAdapter { adapter }).await;
            });
        }
    }

    /// Stops the process for good: running requests fail, and the state becomes `Stopped`.
    pub async fn stop(&self) {
        self.stop.send_replace(true);
        let mut state = self.state.subscribe();
        let stopped = state
            .wait_for(|state| matches!(state, EngineState::Stopped | EngineState::Failed { .. }));
        let _ = tokio::time::timeout(Duration::from_secs(10), stopped).await;
    }

    fn connection(&self) -> Result<Arc<Connection>, EngineError> {
        lock(&self.connection).clone().ok_or_else(|| unavailable("the engine is not running"))
    }

    /// Runs one process after another until the engine is stopped or its first load fails.
    async fn supervise(self: Arc<Self>) {
        let mut stop = self.stop.subscribe();
        let mut back_off = Duration::from_millis(100);
        let mut was_ready = false;
        loop {
            let born = Instant::now();
            let reason = tokio::select! {
                reason = self.run_process(&mut was_ready) => reason,
                _ = stop.wait_for(|stop| *stop) => break,
            };
            self.fail_all("the engine process ended while the request was running");
            if !was_ready {
                // The first load failed: the model cannot be loaded, so it is not retried.
                tracing::error!(model = self.name, "{reason}");
                self.state.send_replace(EngineState::Failed { reason });
                return;
            }
            if born.elapsed() > HEALTHY_AFTER {
                back_off = Duration::from_millis(100);
            }
            self.restarts.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(model = self.name, ?back_off, "engine restarts: {reason}");
            self.state.send_replace(EngineState::Restarting { reason });
            tokio::select! {
                () = tokio::time::sleep(back_off) => {}
                _ = stop.wait_for(|stop| *stop) => break,
            }
            back_off = (back_off * 2).min(MAX_BACK_OFF);
        }
        self.fail_all("the model was unloaded while the request was running");
        self.state.send_replace(EngineState::Stopped);
    }

    /// Spawns one process, loads the model and serves until the process is gone. Returns the reason
    /// of its end.
    async fn run_process(self: &Arc<Self>, was_ready: &mut bool) -> String {
        lock(&self.log).clear();
        let (mut child, socket) = match self.spawn() {
            Ok(spawned) => spawned,
            Err(error) => return format!("the engine process could not be started: {error}"),
        };
        self.pid.store(child.id().map_or(0, u64::from), Ordering::Relaxed);
        let logs = child.stderr.take().map(|stderr| tokio::spawn(self.clone().read_log(stderr)));
        let (read, write) = socket.into_split();
        let (send, outbox) = mpsc::unbounded_channel();
        let connection = Arc::new(Connection {
            send,
            requests: Mutex::default(),
            calls: Mutex::default(),
            dead: AtomicBool::new(false),
        });
        let _ = connection.send(ToEngine::Load(self.spec.clone()));
        let writer = tokio::spawn(write_frames(write, outbox));
        *lock(&self.connection) = Some(connection.clone());
        let ended = tokio::select! {
            ended = self.read_frames(read, &connection, was_ready) => ended,
            ended = self.watch(&connection) => ended,
        };
        if *was_ready {
            // The state is set before the first await, so that no request sees the engine as ready.
            let reason = "the engine process ended".to_owned();
            self.state.send_replace(EngineState::Restarting { reason });
        }
        connection.fail_all(&unavailable(
            "the engine process ended while the request was running; it is being restarted",
        ));
        writer.abort();
        let _ = child.start_kill();
        let status = child.wait().await;
        self.pid.store(0, Ordering::Relaxed);
        if let Some(logs) = logs {
            // The log pipe reaches its end once the process is gone.
            let _ = tokio::time::timeout(Duration::from_secs(1), logs).await;
        }
        match (ended, *was_ready) {
            (End::Said(reason), _) => self.with_log(reason),
            (End::Hung, _) => "the engine did not answer the watchdog and was killed".into(),
            (End::Gone, true) => format!("the engine process ended: {}", describe(status)),
            (End::Gone, false) => self.with_log(format!(
                "the engine process ended while it loaded the model: {}",
                describe(status)
            )),
        }
    }

    fn spawn(&self) -> std::io::Result<(Child, UnixStream)> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        // The engine's end of the socket pair is its standard input: no descriptor number has to be
        // agreed on, and the engine sees the end of the stream however the gateway dies.
        let child = Command::new("/proc/self/exe")
            .arg0("ingot")
            .arg("engine")
            .env(ipc::ENGINE_LOG, LevelFilter::current().to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Ctrl-C in a terminal signals the whole process group. The engine must outlive the
            // gateway's drain, so it gets a group of its own.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        Ok((child, UnixStream::from_std(ours)?))
    }

    async fn read_frames(
        self: &Arc<Self>,
        mut read: OwnedReadHalf,
        connection: &Arc<Connection>,
        was_ready: &mut bool,
    ) -> End {
        let mut buffer = Vec::new();
        loop {
            match ipc::next_frame(&mut read, &mut buffer).await {
                Ok(FromEngine::Loaded(info)) => {
                    *was_ready = true;
                    let engine = self.clone();
                    let connection = connection.clone();
                    tokio::spawn(async move { engine.become_ready(*info, &connection).await });
                }
                Ok(FromEngine::LoadFailed(reason)) => return End::Said(reason),
                Ok(FromEngine::Events(events)) => connection.deliver(events),
                Ok(FromEngine::Reply { call, result }) => {
                    if let Some(waiting) = lock(&connection.calls).remove(&call) {
                        let _ = waiting.send(result);
                    }
                }
                Ok(FromEngine::Progress(mut progress)) => {
                    let mut sizes = lock(&self.batch_sizes);
                    sizes.append(&mut progress.batch_sizes);
                    // Without a scrape for a long time, only the newest steps are kept.
                    let surplus = sizes.len().saturating_sub(100_000);
                    sizes.drain(..surplus);
                    drop(sizes);
                    *lock(&self.progress) = progress;
                }
                Err(FrameError::Closed | FrameError::Io(_)) => return End::Gone,
                Err(error) => return End::Said(format!("the engine sent a bad frame: {error}")),
            }
        }
    }

    /// Loads the adapters, then accepts requests.
    async fn become_ready(&self, info: ModelInfo, connection: &Connection) {
        let adapters: Vec<_> =
            lock(&self.adapters).iter().map(|(id, adapter)| (*id, adapter.clone())).collect();
        for (id, adapter) in adapters {
            let call = self.next_id.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = connection.call(call, load_adapter_call(id, &adapter)).await {
                tracing::error!(model = self.name, path = %adapter.path.display(), "{error}");
            }
        }
        if !connection.dead.load(Ordering::Acquire) {
            self.state.send_replace(EngineState::Ready(Arc::new(info)));
        }
    }

    /// Pings the step loop; returns when it stops answering. The time limit follows the duration of
    /// a step, so that a long prefill is not mistaken for a hang.
    async fn watch(&self, connection: &Connection) -> End {
        let mut state = self.state.subscribe();
        if state.wait_for(|state| matches!(state, EngineState::Ready(_))).await.is_err() {
            return End::Gone;
        }
        loop {
            tokio::time::sleep(PING_EVERY).await;
            let call = self.next_id.fetch_add(1, Ordering::Relaxed);
            let (asked, mut answer) = (Instant::now(), pin!(connection.call(call, Call::Ping)));
            loop {
                // The limit includes a step that was announced in the meantime.
                let Some(left) = self.patience().checked_sub(asked.elapsed()) else {
                    return End::Hung;
                };
                match tokio::time::timeout(left.min(PING_EVERY), &mut answer).await {
                    Ok(Ok(_)) => break,
                    Ok(Err(_)) => return End::Gone,
                    Err(_) => {}
                }
            }
        }
    }

    /// How long the step loop may be silent: a multiple of its longest recent or announced step.
    fn patience(&self) -> Duration {
        let step = Duration::from_secs_f32(lock(&self.progress).step_seconds.clamp(0.0, 600.0));
        self.watchdog.max(step * STEPS_OF_PATIENCE)
    }

    async fn read_log(self: Arc<Self>, stderr: tokio::process::ChildStderr) {
        let mut lines = BufReader::new(stderr.take(1 << 40)).split(b'\n');
        while let Ok(Some(line)) = lines.next_segment().await {
            let line = String::from_utf8_lossy(&line).trim().to_owned();
            let (level, text) = match line.split_once(' ') {
                Some((level @ ("ERROR" | "WARN" | "INFO" | "DEBUG" | "TRACE"), text)) => {
                    (level, text)
                }
                _ => ("INFO", line.as_str()),
            };
            let model = self.name.as_str();
            match level {
                "ERROR" => tracing::error!(target: "ingot::engine", model, "{text}"),
                "WARN" => tracing::warn!(target: "ingot::engine", model, "{text}"),
                "INFO" => tracing::info!(target: "ingot::engine", model, "{text}"),
                "TRACE" => tracing::trace!(target: "ingot::engine", model, "{text}"),
                _ => tracing::debug!(target: "ingot::engine", model, "{text}"),
            }
            let mut log = lock(&self.log);
            if log.len() == LOG_LINES {
                log.pop_front();
            }
            log.push_back(text.chars().take(500).collect());
        }
    }

    fn with_log(&self, reason: String) -> String {
        let log = lock(&self.log);
        let from = log.len().saturating_sub(8);
        let last: Vec<_> = log.iter().skip(from).filter(|line| !line.is_empty()).cloned().collect();
        if last.is_empty() {
            reason
        } else {
            format!("{reason}. The engine's last words: {}", last.join(" | "))
        }
    }

    fn fail_all(&self, reason: &str) {
        if let Some(connection) = lock(&self.connection).take() {
            connection.fail_all(&unavailable(reason));
        }
        let mut progress = lock(&self.progress);
        progress.running = 0;
        progress.waiting = 0;
        progress.paused = 0;
        progress.kv_pages_used = 0;
        progress.kv_pages_cached = 0;
    }
}

enum End {
    /// The engine reported the reason.
    Said(String),
    Gone,
    Hung,
}

impl Connection {
    fn send(&self, message: ToEngine) -> Result<(), EngineError> {
        self.send.send(message).map_err(|_| unavailable("the engine is not running"))
    }

    async fn call(&self, call: u64, what: Call) -> Result<Reply, EngineError> {
        let (send, receive) = oneshot::channel();
        lock(&self.calls).insert(call, send);
        if self.dead.load(Ordering::Acquire) {
            lock(&self.calls).remove(&call);
            return Err(unavailable("the engine is not running"));
        }
        self.send(ToEngine::Call { call, what })?;
        receive.await.unwrap_or_else(|_| Err(unavailable("the engine process ended")))
    }

    fn deliver(&self, events: Vec<(RequestId, Event)>) {
        let mut requests = lock(&self.requests);
        for (id, event) in events {
            let last = matches!(event, Event::Done { .. } | Event::Failed(_));
            let Some(sink) = requests.get(&id) else { continue };
            sink.waiting.fetch_add(1, Ordering::AcqRel);
            let _ = sink.send.send(event);
            if !last {
                sink.pause_if_behind(|| {
                    let _ = self.send(ToEngine::Pause(id));
                });
            }
            if last {
                requests.remove(&id);
            }
        }
    }

    /// Fails every request in flight with `error`.
    fn fail_all(&self, error: &EngineError) {
        self.dead.store(true, Ordering::Release);
        for (_, sink) in lock(&self.requests).drain() {
            let _ = sink.send.send(Event::Failed(error.clone()));
        }
        lock(&self.calls).clear();
    }
}

impl Generation {
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Ends a choice as if the model had ended it.
    pub fn finish(&self, choice: u32) {
        if !self.over {
            let _ = self.connection.send(ToEngine::Finish { request: self.id, choice });
        }
    }

    /// The next event; `None` after [`Event::Done`] or [`Event::Failed`]. Safe to cancel.
    pub async fn next(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        let event = self.events.recv().await;
        let waiting = self.sink.waiting.fetch_sub(1, Ordering::AcqRel).saturating_sub(1);
        if waiting < RESUME_BELOW && std::mem::take(&mut *lock(&self.sink.paused)) {
            let _ = self.connection.send(ToEngine::Resume(self.id));
        }
        self.over = matches!(event, None | Some(Event::Done { .. } | Event::Failed(_)));
        event
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.over {
            lock(&self.connection.requests).remove(&self.id);
            let _ = self.connection.send(ToEngine::Cancel(self.id));
        }
    }
}

async fn write_frames(mut write: OwnedWriteHalf, mut outbox: mpsc::UnboundedReceiver<ToEngine>) {
    while let Some(message) = outbox.recv().await {
        match ipc::encode(&message) {
            Ok(bytes) => {
                if write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            Err(error) => tracing::error!("a message to the engine was dropped: {error}"),
        }
    }
}

fn load_adapter_call(adapter: AdapterId, what: &EngineAdapter) -> Call {
    Call::LoadAdapter { adapter, path: what.path.clone(), digest: what.digest, scale: what.scale }
}

fn unavailable(message: impl Into<String>) -> EngineError {
    EngineError { kind: EngineErrorKind::Unavailable, message: message.into(), param: None }
}

fn describe(status: std::io::Result<std::process::ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

/// A poisoned lock only means that another thread panicked between two plain assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
