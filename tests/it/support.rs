//! Servers for the tests: the real binary, on a free port, with its own data folder.

use crate::http::{Answer, Client};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a server may take to start, on a machine that also compiles.
const START: Duration = Duration::from_secs(60);
pub(crate) const ADMIN: &str = "sk-admin-of-the-tests";

/// A running `ingot serve`. Dropping it kills it, and shows its log if the test failed.
pub(crate) struct Server {
    child: Child,
    /// Process id of the gateway itself, which `child` becomes.
    pub pid: u32,
    pub client: Client,
    log: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    folder: Arc<TempDir>,
}

/// How to start a server.
pub(crate) struct Options {
    arguments: Vec<String>,
    folder: Arc<TempDir>,
    /// Shell commands that run first, in the same process.
    shell: Option<String>,
}

impl Options {
    /// The mock runner with `step` microseconds per step and defaults for everything else.
    pub(crate) fn mock(step: u32) -> Self {
        Self::bare(&["mock", "--runner", "mock"])
            .flag("--mock-step-us", step)
            .flag("--context-length", 8192)
            .flag("--kv-tokens", 65_536)
    }

    /// llama.cpp with these model files.
    pub(crate) fn models(paths: &[&Path]) -> Self {
        let paths: Vec<_> = paths.iter().map(|path| path.to_str().expect("UTF-8")).collect();
        Self::bare(&paths).flag("--threads", 1)
    }

    fn bare(arguments: &[&str]) -> Self {
        let folder = Arc::new(tempfile::tempdir().expect("a temporary folder"));
        let arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        Self { arguments, folder, shell: None }
    }

    /// Sets a flag. Flags that are not lists replace an earlier value.
    pub(crate) fn flag(mut self, name: &str, value: impl ToString) -> Self {
        let set = self.arguments.iter().position(|argument| argument == name);
        if let Some(at) = set.filter(|_| name != "--api-key") {
            self.arguments.drain(at..at + 2);
        }
        self.arguments.push(name.to_owned());
        self.arguments.push(value.to_string());
        self
    }

    /// Enables the admin routes.
    pub(crate) fn admin(self) -> Self {
        self.flag("--admin-key", ADMIN)
    }

    pub(crate) fn shell(mut self, commands: &str) -> Self {
        self.shell = Some(commands.to_owned());
        self
    }

    /// The data folder of the server; it exists before the server starts.
    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    pub(crate) fn command(&self) -> Command {
        let binary = env!("CARGO_BIN_EXE_ingot");
        let mut command = match &self.shell {
            None => Command::new(binary),
            Some(first) => {
                let mut command = Command::new("sh");
                command.arg("-c").arg(format!("{first}; exec \"$0\" \"$@\"")).arg(binary);
                command
            }
        };
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("INGOT_")) {
            command.env_remove(name);
        }
        command
            .arg("serve")
            .args(&self.arguments)
            .args(["--port", "0", "--data-dir"])
            .arg(self.folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Starts the server, and waits until it is ready.
    pub(crate) fn start(self) -> Server {
        let mut child = self.command().spawn().expect("the binary runs");
        let log = Arc::new(Mutex::new(String::new()));
        let address = Arc::new(Mutex::new(None));
        let out = child.stdout.take().expect("piped");
        let err = child.stderr.take().expect("piped");
        let readers = vec![
            read_log(out, log.clone(), address.clone()),
            read_log(err, log.clone(), Arc::default()),
        ];
        let folder = self.folder;
        let pid = child.id();
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut server = Server { child, pid, client: Client::new(nowhere), log, readers, folder };
        let end = Instant::now() + START;
        loop {
            if let Some(address) = *lock(&address) {
                server.client.address = address;
                break;
            }
            let ended = server.child.try_wait().expect("our child");
            assert!(ended.is_none(), "the server ended: {ended:?}\n{}", server.log());
            assert!(Instant::now() < end, "the server starts in time\n{}", server.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        server.wait_ready();
        server
    }

    /// Runs a server that exits by itself. Returns its status and standard error.
    pub(crate) fn run(self) -> (ExitStatus, String) {
        let child = self.command().spawn().expect("the binary runs");
        let output = child.wait_with_output().expect("the server ends");
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

fn read_log(
    from: impl Read + Send + 'static,
    log: Arc<Mutex<String>>,
    address: Arc<Mutex<Option<SocketAddr>>>,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if let Some(found) = line.strip_prefix("listening on http://") {
                *lock(&address) = found.trim().parse().ok();
            }
            let mut log = lock(&log);
            log.push_str(&line);
            log.push('\n');
        }
    })
}

impl Server {
    pub(crate) fn admin(&self) -> Client {
        self.client.with_key(ADMIN)
    }

    /// The data folder.
    pub(crate) fn data(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn log(&self) -> String {
        lock(&self.log).clone()
    }

    pub(crate) fn wait_ready(&self) {
        eventually(START, "the server is ready", || self.client.get("/ready").status == 200);
    }

    /// Process ids of the running engines.
    pub(crate) fn engines(&self) -> Vec<u32> {
        children(self.pid)
    }

    /// Process id of the only engine.
    pub(crate) fn engine(&self) -> u32 {
        let engines = self.engines();
        assert_eq!(engines.len(), 1, "there is one engine: {engines:?}");
        engines[0]
    }

    pub(crate) fn signal(&self, signal: Signal) {
        send(self.pid, signal);
    }

    /// Waits until the gateway exits.
    pub(crate) fn wait(&mut self, patience: Duration) -> ExitStatus {
        let end = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status;
            }
            assert!(Instant::now() < end, "the gateway ends in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn lives(&mut self) -> bool {
        self.child.try_wait().expect("our child").is_none()
    }

    /// The text of a completion, which must succeed.
    pub(crate) fn complete(&self, model: &str, prompt: &str, max_tokens: u32) -> String {
        text_of(&self.client.post("/v1/completions", &completion(model, prompt, max_tokens)).good())
    }

    /// The value of a metric in `/metrics`, summed over the label sets that contain `labels`.
    pub(crate) fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let text = self.client.get("/metrics").body;
        samples(&text).filter(|sample| sample.is(name, labels)).map(|sample| sample.value).sum()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let engines = self.engines();
        let _ = self.child.kill();
        let _ = self.child.wait();
        // An engine that a test has stopped with SIGSTOP does not notice that the gateway ended.
        engines.into_iter().for_each(|engine| send(engine, Signal::KILL));
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        if std::thread::panicking() {
            let log = self.log();
            let tail = log.len().saturating_sub(6000);
            let tail = log.floor_char_boundary(tail);
            eprintln!("--- log of the server ---\n{}--- end of the log ---", &log[tail..]);
        }
    }
}

/// A greedy completion request of exactly this many tokens.
pub(crate) fn completion(model: &str, prompt: &str, max_tokens: u32) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
           "ignore_eos": true})
}

/// The same as a streaming request.
pub(crate) fn streamed(model: &str, prompt: &str, max_tokens: u32) -> Value {
    let mut body = completion(model, prompt, max_tokens);
    body["stream"] = true.into();
    body
}

pub(crate) fn text_of(body: &Value) -> String {
    body["choices"][0]["text"].as_str().expect("a completion has text").to_owned()
}

/// Sends a signal to a process, which may have exited already.
pub(crate) fn send(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    let _ = kill_process(pid, signal);
}

/// Whether a process exists and is not a zombie.
pub(crate) fn exists(pid: u32) -> bool {
    stat(pid).is_some_and(|(_, state)| state != 'Z')
}

/// Parent process id and state of a process.
fn stat(pid: u32) -> Option<(u32, char)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.next()?.parse().ok()?, state))
}

fn children(parent: u32) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").expect("/proc is readable").flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| stat(pid).is_some_and(|(of, state)| of == parent && state != 'Z')).collect()
}

/// Waits until `check` is true.
pub(crate) fn eventually(patience: Duration, what: &str, mut check: impl FnMut() -> bool) {
    let end = Instant::now() + patience;
    while !check() {
        assert!(Instant::now() < end, "{what} within {patience:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// One line of `/metrics`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

impl Sample {
    pub(crate) fn is(&self, name: &str, labels: &[(&str, &str)]) -> bool {
        let has = |wanted: &(&str, &str)| {
            self.labels.iter().any(|(name, value)| (name.as_str(), value.as_str()) == *wanted)
        };
        self.name == name && labels.iter().all(has)
    }
}

/// The samples of a text in Prometheus format.
pub(crate) fn samples(text: &str) -> impl Iterator<Item = Sample> {
    text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).map(|line| {
        let (series, value) = line.rsplit_once(' ').expect("a name and a value");
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let pairs = labels.trim_end_matches('}').split(',').filter_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            Some((name.to_owned(), value.trim_matches('"').to_owned()))
        });
        let value = value.parse().expect("a number");
        Sample { name: name.to_owned(), labels: pairs.collect(), value }
    })
}

/// The default real model of the tests. Tests that need it fail if it is missing, so that they are
/// not skipped unnoticed.
pub(crate) fn real_model() -> PathBuf {
    let path = std::env::var_os("INGOT_TEST_MODEL").map(PathBuf::from);
    let path = path.expect("INGOT_TEST_MODEL must name the file of the default model");
    assert!(path.is_file(), "INGOT_TEST_MODEL names no file: {}", path.display());
    path
}

/// A lock, so that one test with a real model runs at a time: each uses all cores.
pub(crate) fn one_at_a_time() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    lock(&TURN)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a request in a thread of its own; returns its response and when it ended.
pub(crate) fn later(ask: impl FnOnce() -> std::io::Result<Answer> + Send + 'static) -> Later {
    Later(std::thread::spawn(move || (ask(), Instant::now())))
}

pub(crate) struct Later(JoinHandle<(std::io::Result<Answer>, Instant)>);

impl Later {
    pub(crate) fn join(self) -> (Answer, Instant) {
        let (answer, at) = self.0.join().expect("asking does not panic");
        (answer.expect("the server answers"), at)
    }
}
