//! Calls of a job to the served model and to the models of graders and judges.

use super::{Policy, TrainError};
use crate::grade::{Answer, Failed, Question};
use crate::job::Control;
use crate::job::rollout::{CallCause, CallError, Rollout, RolloutRequest};
use crate::train::rollout::RolloutClient;
use std::path::Path;
use std::time::{Duration, Instant};

/// Number of attempts while the engine fails, and the longest wait between two attempts.
const TRIES: u32 = 30;
pub(super) const MAX_BACK_OFF: Duration = Duration::from_secs(10);
/// Interval at which a waiting job looks whether it has to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The served model, and what ends waiting for it.
#[derive(Clone, Copy)]
pub(super) struct Calls<'a> {
    policy: Policy<'a>,
    control: &'a Control,
}

/// Completions that are being sampled.
pub(super) struct StartedRollouts {
    request: RolloutRequest,
    /// The server has the request.
    sent: bool,
}

impl<'a> Calls<'a> {
    /// # Errors
    /// If the job has no served model.
    pub(super) fn new(
        policy: Option<Policy<'a>>,
        control: &'a Control,
    ) -> Result<Self, TrainError> {
        match policy {
            Some(policy) => Ok(Self { policy, control }),
            None => Err(TrainError::Spec("there is no served model to sample from".into())),
        }
    }

    /// Writes the adapter with the current weights, from which later completions are sampled.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn export(&self) -> Result<(), TrainError> {
        (self.policy.export)(self.policy.adapter)
    }

    /// Samples completions with the adapter that was exported last.
    ///
    /// # Errors
    /// If the server refuses, or is not available for too long.
    pub(super) fn generate(&self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, TrainError> {
        // An engine that was restarted has lost the adapter.
        self.patiently(|client| {
            client.load_policy(self.policy.adapter)?;
            client.generate(what)
        })
    }

    /// Begins to sample completions with the adapter that was exported last, while the caller does
    /// something else. The next call is [`Calls::collect`].
    ///
    /// # Errors
    /// If the server refuses, or has ended.
    pub(super) fn start(&self, request: RolloutRequest) -> Result<StartedRollouts, TrainError> {
        let mut client = self.policy.client.borrow_mut();
        let sent = client.load_policy(self.policy.adapter).and_then(|()| client.start(&request));
        match sent {
            Ok(()) => Ok(StartedRollouts { request, sent: true }),
            Err(error) if error.cause == CallCause::Refused => Err(error.into()),
            // The request is sent when its completions are needed.
            Err(error) => {
                tracing::warn!("the engine is asked later: {error}");
                Ok(StartedRollouts { request, sent: false })
            }
        }
    }

    /// Waits for completions. If the engine has failed, they are sampled again with the adapter
    /// that was exported last.
    ///
    /// # Errors
    /// As of [`Calls::generate`].
    pub(super) fn collect(
        &self,
        started: &mut StartedRollouts,
    ) -> Result<Vec<Vec<Rollout>>, TrainError> {
        // What was sent can be collected once.
        if std::mem::take(&mut started.sent) {
            let collected = self.policy.client.borrow_mut().collect(&started.request);
            match collected {
                Err(error) if error.cause == CallCause::Passing => {
                    tracing::warn!("the engine is asked again: {error}");
                }
                collected => return Ok(collected?),
            }
        }
        self.generate(&started.request)
    }

    /// Copies the adapter that was exported last to a file that outlives the process.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn keep_adapter(&self, file: &Path) -> std::io::Result<()> {
        let part = file.with_extension("part");
        std::fs::copy(self.policy.adapter, &part)?;
        std::fs::rename(part, file)
    }

    /// Exports the adapter of a file that [`Calls::keep_adapter`] wrote, in place of the current
    /// weights.
    ///
    /// # Errors
    /// If it cannot be read.
    pub(super) fn export_kept(&self, file: &Path) -> std::io::Result<()> {
        std::fs::copy(file, self.policy.adapter).map(drop)
    }

    /// # Errors
    /// As of [`Calls::generate`]. The failure of a single model is reported in its answer.
    pub(super) fn query(
        &self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, TrainError> {
        self.patiently(|client| client.query_graders(questions))
    }

    /// # Errors
    /// [`TrainError::Stopped`] if `stop` is set.
    pub(super) fn check_stop(&self) -> Result<(), TrainError> {
        match self.control.stops() {
            true => Err(TrainError::Stopped),
            false => Ok(()),
        }
    }

    /// # Errors
    /// [`TrainError::Stopped`] as soon as `stop` is set.
    pub(super) fn wait(&self, time: Duration) -> Result<(), TrainError> {
        let start = Instant::now();
        while start.elapsed() < time {
            self.check_stop()?;
            std::thread::sleep(LOOK_EVERY.min(time));
        }
        Ok(())
    }

    /// Repeats a request that fails temporarily, [`TRIES`] times at most: a dead engine is
    /// restarted.
    fn patiently<T>(
        &self,
        mut ask: impl FnMut(&mut dyn RolloutClient) -> Result<T, CallError>,
    ) -> Result<T, TrainError> {
        let mut pause = Duration::from_millis(200);
        for _ in 1..TRIES {
            match ask(&mut *self.policy.client.borrow_mut()) {
                Ok(answer) => return Ok(answer),
                Err(error) if error.cause == CallCause::Passing => {
                    tracing::warn!("the engine is asked again: {error}");
                    self.wait(pause)?;
                    pause = MAX_BACK_OFF.min(2 * pause);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(ask(&mut *self.policy.client.borrow_mut())?)
    }
}
