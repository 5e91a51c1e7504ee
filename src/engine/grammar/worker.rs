//! Computes masks on helper threads while the forward pass runs.

use super::trigger::TriggeredGrammar;
use crate::ipc::EngineError;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

/// A grammar that came back from the worker.
pub struct Masked<K> {
    pub key: K,
    /// Its [`mask`](TriggeredGrammar::mask) is ready and costs nothing now.
    pub grammar: TriggeredGrammar,
    /// An error concerns this sequence only.
    pub result: Result<(), EngineError>,
}

/// Threads that compute masks. Grammars move in and come back; `K` names the sequence.
pub struct MaskWorker<K> {
    jobs: Option<Sender<(K, TriggeredGrammar)>>,
    done: Receiver<Masked<K>>,
    threads: Vec<JoinHandle<()>>,
    capacity: usize,
    outstanding: usize,
    /// Computed here, because the threads were full.
    ready: Vec<Masked<K>>,
}

impl<K: Send + 'static> MaskWorker<K> {
    /// Starts `threads` threads (at least one) that hold at most `capacity` grammars, such as
    /// the most sequences of a batch.
    ///
    /// # Errors
    /// Internal where no thread can be started.
    pub fn new(threads: usize, capacity: usize) -> Result<Self, EngineError> {
        let capacity = capacity.max(1);
        // Room for everything outstanding on both sides: no send ever blocks.
        let (jobs, to_do) = bounded::<(K, TriggeredGrammar)>(capacity);
        let (finished, done) = bounded(capacity);
        let mut worker = Self {
            jobs: Some(jobs),
            done,
            threads: Vec::new(),
            capacity,
            outstanding: 0,
            ready: Vec::new(),
        };
        for i in 0..threads.max(1) {
            let (to_do, finished) = (to_do.clone(), finished.clone());
            let thread = std::thread::Builder::new()
                .name(format!("mask-{i}"))
                .spawn(move || {
                    for (key, grammar) in to_do {
                        if finished.send(compute(key, grammar)).is_err() {
                            break;
                        }
                    }
                })
                .map_err(|error| EngineError::internal(format!("no thread for masks: {error}")))?;
            worker.threads.push(thread);
        }
        Ok(worker)
    }

    /// Hands a grammar over. Never blocks: past the capacity the mask is computed here and now.
    pub fn submit(&mut self, key: K, grammar: TriggeredGrammar) {
        let job = (key, grammar);
        let refused = match &self.jobs {
            Some(jobs) if self.outstanding < self.capacity => {
                jobs.try_send(job).map_err(|error| error.into_inner()).err()
            }
            _ => Some(job),
        };
        match refused {
            None => self.outstanding += 1,
            Some((key, grammar)) => self.ready.push(compute(key, grammar)),
        }
    }

    /// Waits for everything that was submitted and gives it back, in the order in which it became
    /// ready.
    pub fn collect(&mut self) -> Vec<Masked<K>> {
        let mut all = std::mem::take(&mut self.ready);
        while self.outstanding > 0 {
            self.outstanding -= 1;
            // The threads catch panics, so they live as long as `jobs`.
            match self.done.recv() {
                Ok(masked) => all.push(masked),
                Err(_) => self.outstanding = 0,
            }
        }
        all
    }
}

impl<K> Drop for MaskWorker<K> {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // It has nothing to tell: its panics are caught.
            let _ = thread.join();
        }
    }
}

fn compute<K>(key: K, mut grammar: TriggeredGrammar) -> Masked<K> {
    let result = ready(&mut grammar);
    Masked { key, grammar, result }
}

/// Computes the mask, where one is needed and not at hand. A panic ends the walk.
///
/// # Errors
/// As [`TriggeredGrammar::mask`].
pub fn ready(grammar: &mut TriggeredGrammar) -> Result<(), EngineError> {
    let computed = catch_unwind(AssertUnwindSafe(|| grammar.mask().map(|_| ())));
    computed.unwrap_or_else(|_| Err(grammar.poison()))
}
