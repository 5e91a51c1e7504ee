//! Computes masks on helper threads while the forward pass runs.

use super::trigger::TriggeredGrammar;
use crate::ipc::EngineError;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

/// A grammar returned by the worker.
pub struct Masked<K> {
    pub key: K,
    /// Its [`mask`](TriggeredGrammar::mask) has been computed and cached.
    pub grammar: TriggeredGrammar,
    /// An error affects only this sequence.
    pub result: Result<(), EngineError>,
}

/// Threads that compute masks. Grammars are moved in and returned; `K` identifies the sequence.
pub struct MaskWorker<K> {
    jobs: Option<Sender<(K, TriggeredGrammar)>>,
    done: Receiver<Masked<K>>,
    threads: Vec<JoinHandle<()>>,
    capacity: usize,
    outstanding: usize,
    /// Masks that were computed on the caller's thread because the queue was full.
    ready: Vec<Masked<K>>,
}

impl<K: Send + 'static> MaskWorker<K> {
    /// Starts `threads` threads (at least one) that hold at most `capacity` grammars, for example
    /// the most sequences of a batch.
    ///
    /// # Errors
    /// An internal error if no thread can be started.
    pub fn new(threads: usize, capacity: usize) -> Result<Self, EngineError> {
        let capacity = capacity.max(1);
        // Both channels have room for all outstanding grammars: no send ever blocks.
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

    /// Submits a grammar. Never blocks: beyond the capacity the mask is computed on the caller's
    /// thread.
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

    /// Waits for all submitted grammars and returns them in the order of completion.
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
            // The result is irrelevant: the thread catches its panics.
            let _ = thread.join();
        }
    }
}

fn compute<K>(key: K, mut grammar: TriggeredGrammar) -> Masked<K> {
    let result = ready(&mut grammar);
    Masked { key, grammar, result }
}

/// Computes the mask if it is needed and not cached. A panic fails the state.
///
/// # Errors
/// As [`TriggeredGrammar::mask`].
pub fn ready(grammar: &mut TriggeredGrammar) -> Result<(), EngineError> {
    let computed = catch_unwind(AssertUnwindSafe(|| grammar.mask().map(|_| ())));
    computed.unwrap_or_else(|_| Err(grammar.poison()))
}
