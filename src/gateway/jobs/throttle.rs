//! Pauses jobs while requests run.
//!
//! A job process has the lowest CPU priority, but it still evicts a request's data from the caches
//! and occupies its cores between two tokens. So the process is stopped (SIGSTOP) while requests
//! run. Under sustained load it gets a tenth of the time in slices, so that it still makes
//! progress. With priority alone, the p99 time between tokens was 1.2 to 1.6 times as long; see
//! docs/log/training.md, "Jobs".

use std::time::{Duration, Instant};

/// Requests often follow each other: the job stays stopped for this long after the last one.
const QUIET: Duration = Duration::from_millis(100);
/// Under sustained load a job runs for this long …
const SLICE: Duration = Duration::from_millis(100);
/// … after it was stopped for this long.
const WAIT: Duration = Duration::from_millis(900);

/// Decides whether the job process may run.
#[derive(Debug)]
pub(super) struct Throttle {
    runs: bool,
    /// Time of the last change of `runs`.
    since: Instant,
    busy: Option<Instant>,
}

impl Throttle {
    pub(super) fn new(now: Instant) -> Self {
        Self { runs: true, since: now, busy: None }
    }

    /// Updates the state; `Some` if it changes. `busy` says whether requests run now.
    pub(super) fn look(&mut self, busy: bool, now: Instant) -> Option<bool> {
        if busy {
            self.busy = Some(now);
        }
        let quiet = self.busy.is_none_or(|busy| now - busy >= QUIET);
        let runs = match (quiet, self.runs) {
            (true, _) => true,
            // At the first request after a quiet time the job has run for longer than a slice, so
            // it stops at once.
            (false, true) => now - self.since < SLICE,
            (false, false) => now - self.since >= WAIT,
        };
        if runs == self.runs {
            return None;
        }
        (self.runs, self.since) = (runs, now);
        Some(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_halts_for_requests_and_moves_under_lasting_load() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut throttle = Throttle::new(start);
        assert_eq!(throttle.look(false, at(1_000)), None);
        assert_eq!(throttle.look(true, at(1_010)), Some(false));
        assert_eq!(throttle.look(false, at(1_020)), None);
        assert_eq!(throttle.look(false, at(1_111)), Some(true));
        let (mut ran, mut last, mut runs) = (0, 1_111, true);
        for ms in (1_112..61_112).step_by(5) {
            if runs {
                ran += ms - last;
            }
            last = ms;
            runs = throttle.look(true, at(ms)).unwrap_or(runs);
        }
        assert!((4_000..=8_000).contains(&ran), "{ran} ms of 60 s");
    }
}
