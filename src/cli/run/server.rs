//! The `ingot serve` that a chat starts for itself.

use crate::cli::CliError;
use crate::cli::http::{HttpError, Server};
use crate::cli::progress::spinner;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};

/// Lines of the server's log that are shown when it fails.
const LAST_LINES: usize = 12;

/// The child; stopped when dropped.
pub(super) struct ServeChild {
    child: Mutex<Child>,
    log: Arc<Mutex<VecDeque<String>>>,
    /// From here on, Ctrl-C stops an answer, not the program.
    chatting: Arc<AtomicBool>,
}

impl ServeChild {
    /// Starts the server on a free port and waits until it says where it listens.
    pub(super) fn start(
        model: &str,
        draft: Option<&str>,
        data_dir: &Path,
    ) -> Result<(Self, String), CliError> {
        let failed = |error| CliError::message(format!("The server cannot be started: {error}."));
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(program)
            .args(["serve", "--host", "127.0.0.1", "--port", "0", "--data-dir"])
            .arg(data_dir)
            .args(draft.map(|draft| format!("--draft-model={draft}")))
            .arg("--")
            .arg(model)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C stops an answer, not the server.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let pid = Pid::from_child(&child);
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let (found, address) = mpsc::channel();
        for stream in [stdout.map(boxed), stderr.map(boxed)].into_iter().flatten() {
            let (log, found) = (log.clone(), found.clone());
            std::thread::spawn(move || follow(stream, &log, &found));
        }
        drop(found);
        let chatting = Arc::new(AtomicBool::new(false));
        stop_with_us(pid, chatting.clone());
        let server = Self { child: Mutex::new(child), log, chatting };
        // Both threads end, and the channel with them, when the server does.
        match address.recv() {
            Ok(url) => Ok((server, url)),
            Err(_) => Err(server.failure(model)),
        }
    }

    fn failure(&self, model: &str) -> CliError {
        let lines: Vec<String> =
            self.log.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        CliError::message(format!(
            "The server for {model} ended before it was ready:\n{}",
            lines.join("\n")
        ))
    }

    fn has_ended(&self) -> bool {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        !matches!(child.try_wait(), Ok(None))
    }
}

impl Drop for ServeChild {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = kill_process(Pid::from_child(child), Signal::TERM);
        let patience = Instant::now() + Duration::from_secs(5);
        while Instant::now() < patience {
            match child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                _ => return,
            }
        }
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Waits until the model answers; returns its name on the server.
pub(super) async fn wait_ready(
    server: &Server,
    child: Option<&ServeChild>,
    model: &str,
) -> Result<String, CliError> {
    let spinner = spinner(format!("Loading {model}"));
    loop {
        spinner.tick();
        match server.connect().await {
            Ok(mut connection) => {
                match connection.send(server, Method::GET, "/ready", None).await {
                    Ok(_) => break,
                    // 503 while it loads.
                    Err(HttpError::Status { status: 503, .. }) => {}
                    Err(error) => return Err(CliError::message(format!("{error}."))),
                }
            }
            Err(error) if child.is_none() => return Err(CliError::message(format!("{error}."))),
            Err(_) => {}
        }
        if let Some(child) = child
            && child.has_ended()
        {
            // What it said last arrives a moment later.
            tokio::time::sleep(Duration::from_millis(100)).await;
            return Err(child.failure(model));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    spinner.finish_and_clear();
    if let Some(child) = child {
        child.chatting.store(true, Ordering::Relaxed);
    }
    let list = server
        .json(Method::GET, "/v1/models", None)
        .await
        .map_err(|error| CliError::message(format!("{error}.")))?;
    Ok(list["data"][0]["id"].as_str().unwrap_or(model).to_owned())
}

type Lines = Box<dyn std::io::Read + Send>;

fn boxed(stream: impl std::io::Read + Send + 'static) -> Lines {
    Box::new(stream)
}

/// Keeps the last lines, and sends on the first address among them.
fn follow(stream: Lines, log: &Mutex<VecDeque<String>>, found: &mpsc::Sender<String>) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        if let Some(url) = address_in(&line) {
            // Only the first is waited for.
            let _ = found.send(url);
        }
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.len() == LAST_LINES {
            log.pop_front();
        }
        log.push_back(line);
    }
}

/// `http://127.0.0.1:PORT` where a line holds it.
fn address_in(line: &str) -> Option<String> {
    let at = line.find("http://127.0.0.1:")?;
    let rest = &line[at + "http://127.0.0.1:".len()..];
    let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
    port.parse::<u16>().ok().filter(|port| *port != 0)?;
    Some(format!("http://127.0.0.1:{port}"))
}

/// A terminal that closes, a `kill`, or Ctrl-C while the model loads must not leave the server behind:
/// it has a process group of its own and would not hear of it.
fn stop_with_us(server: Pid, chatting: Arc<AtomicBool>) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            let kinds = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()];
            let [Ok(mut term), Ok(mut hangup), Ok(mut interrupt)] = kinds.map(signal) else {
                return;
            };
            // 128 + the signal's number, as shells report it.
            let status = loop {
                tokio::select! {
                    _ = term.recv() => break 143,
                    _ = hangup.recv() => break 129,
                    _ = interrupt.recv() => {
                        if !chatting.load(Ordering::Relaxed) {
                            break 130;
                        }
                    }
                }
            };
            let _ = kill_process(server, Signal::TERM);
            std::process::exit(status);
        });
    });
}

#[cfg(test)]
mod tests {
    use super::address_in;

    #[test]
    fn the_address_is_found_in_a_line() {
        let url = Some("http://127.0.0.1:4711".to_owned());
        assert_eq!(address_in("Listening on http://127.0.0.1:4711 (3 models)"), url);
        assert_eq!(address_in("  http://127.0.0.1:4711/v1"), url);
        assert_eq!(address_in("http://127.0.0.1:0 or none"), None);
        assert_eq!(address_in("nothing"), None);
    }
}
