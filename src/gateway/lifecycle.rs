//! Lifecycle of the server: starting, running, draining.

use std::sync::Arc;
use tokio::sync::watch;

/// State of the server and number of running requests.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    state: Arc<watch::Sender<State>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    started: bool,
    draining: bool,
    running: usize,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self { state: Arc::new(watch::Sender::new(State::default())) }
    }
}

impl Lifecycle {
    /// Records that the models of the command line are loaded.
    pub fn started(&self) {
        self.state.send_modify(|state| state.started = true);
    }

    /// Whether [`Lifecycle::started`] was called.
    pub fn is_started(&self) -> bool {
        self.state.borrow().started
    }

    /// Stops accepting requests.
    pub fn drain(&self) {
        self.state.send_modify(|state| state.draining = true);
    }

    /// Whether [`Lifecycle::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.state.borrow().draining
    }

    /// Number of running requests.
    pub fn running(&self) -> usize {
        self.state.borrow().running
    }

    /// Counts a request until the guard is dropped; `None` while draining.
    pub fn enter(&self) -> Option<RunningRequest> {
        let mut entered = false;
        self.state.send_if_modified(|state| {
            entered = !state.draining;
            state.running += usize::from(entered);
            false
        });
        entered.then(|| RunningRequest(self.clone()))
    }

    /// Waits until no request is running.
    pub async fn idle(&self) {
        let mut state = self.state.subscribe();
        // The sender lives in `self`, so the wait cannot fail.
        let _ = state.wait_for(|state| state.running == 0).await;
    }
}

/// Guard of one running request.
#[derive(Debug)]
pub struct RunningRequest(Lifecycle);

impl Drop for RunningRequest {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| state.running = state.running.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn a_drain_waits_for_those_inside_and_lets_nobody_in() {
        let life = Lifecycle::default();
        let inside = life.enter().unwrap();
        life.drain();
        assert!(life.enter().is_none());
        assert!(tokio::time::timeout(Duration::from_millis(20), life.idle()).await.is_err());
        drop(inside);
        tokio::time::timeout(Duration::from_secs(1), life.idle()).await.unwrap();
        assert_eq!(life.running(), 0);
    }
}
