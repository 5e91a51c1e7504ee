//! Work between two steps: admits and cancels requests, swaps adapters, embeds inputs.

use super::commands::{AdapterFacts, Command};
use super::kv::CacheKey;
use super::runner::RunnerError;
use super::sequence::{RequestFacts, Sequence, ValidRequest};
use super::speculate::MAX_DRAFTED;
use super::step::{Pooling, StepLoop};
use crate::ipc::{AdapterId, EngineError, EngineErrorKind, FinishReason, Reply, RequestId, Token};
use crossbeam_channel::RecvTimeoutError;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to wait for a command when there are no requests.
const IDLE: Duration = Duration::from_secs(1);
/// How long to wait when there are requests but none can run (their clients read slowly).
const BLOCKED: Duration = Duration::from_millis(10);
/// Larger than the number of requests that intake can hold: at this count, the oldest entries
/// belong to finished requests.
const MAX_EARLY_CANCELS: usize = 4096;

impl StepLoop {
    /// Handles the pending commands; waits for one first if the engine is idle. Returns false on
    /// shutdown.
    pub(super) fn drain_commands(&mut self, idle: bool) -> bool {
        if idle && self.early.is_empty() {
            let patience = if self.scheduler.is_empty() { IDLE } else { BLOCKED };
            match self.commands.recv_timeout(patience) {
                Ok(command) => {
                    if !self.handle(command) {
                        return false;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        while let Some(command) = self.early.pop_front().or_else(|| self.commands.try_recv().ok()) {
            if !self.handle(command) {
                return false;
            }
        }
        self.remove_retired_adapters();
        true
    }

    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Admit(admissible) => self.admit(*admissible),
            Command::Refuse(request, error) => {
                if !self.cancelled.remove(&request) {
                    self.output.failed(request, error);
                }
            }
            Command::Cancel(request) => self.cancel(request),
            Command::Finish(key) => {
                if self.scheduler.sequence_mut(key).is_some() {
                    self.finish(key, FinishReason::Stop);
                }
            }
            Command::Pause(request, paused) => {
                let mine = |sequence: &&mut Sequence| sequence.key.request == request;
                self.scheduler.sequences_mut().filter(mine).for_each(|s| s.paused = paused);
            }
            Command::Pool { call, inputs, scored_by } => self.pool(call, inputs, scored_by),
            Command::InstallAdapter { call, adapter, facts, handle } => {
                self.runner.install_adapter(adapter, handle);
                self.adapters.insert(adapter, facts);
                self.output.reply(call, Ok(Reply::Done));
            }
            Command::UnloadAdapter { call, adapter } => {
                self.retiring.push(adapter);
                self.output.reply(call, Ok(Reply::Done));
            }
            Command::Ping { call } => self.output.reply(call, Ok(Reply::Done)),
            Command::Shutdown => return false,
        }
        true
    }

    fn admit(&mut self, admissible: ValidRequest) {
        let request = &admissible.request;
        let id = request.id;
        if self.cancelled.remove(&id) {
            return;
        }
        if self.scheduler.is_full() {
            return self.output.failed(id, overloaded());
        }
        let adapter = match request.adapter {
            None => [0; 32],
            Some(adapter) => match self.adapters.get(&adapter) {
                Some(facts) => facts.digest,
                None => return self.output.failed(id, unknown_adapter(adapter)),
            },
        };
        let facts = Arc::new(RequestFacts {
            id,
            prompt_len: admissible.tokens.len(),
            cache_key: CacheKey { adapter, tenant: request.tenant },
            adapter: request.adapter,
            priority: request.priority,
            fair_key: request.fair_key,
            stop: request.stop.clone(),
            max_tokens: admissible.max_tokens,
            logprobs: request.logprobs,
            echo: request.echo,
            rollout: request.rollout.then_some(request.sampling.temperature),
            render_special: request.render_special,
            max_drafted: match self.runner.info().speculates {
                true => {
                    request.max_drafted.map_or(MAX_DRAFTED, |most| MAX_DRAFTED.min(most as usize))
                }
                false => 0,
            },
            choices: admissible.choices.len() as u32,
            arrived: admissible.arrived,
        });
        self.output.accepted(&facts);
        let mut choices = admissible.choices.into_iter();
        let first = choices.next().expect("a request has at least one choice");
        self.scheduler.push(Sequence::new(facts, admissible.tokens, first, choices.collect()));
    }

    /// Cancels a request: its pages are free before the next step.
    fn cancel(&mut self, request: RequestId) {
        self.output.forget(request);
        if !self.drop_sequences(request) {
            // The request is still in intake, or has just finished.
            if self.cancelled.len() >= MAX_EARLY_CANCELS {
                self.cancelled.pop_first();
            }
            self.cancelled.insert(request);
        }
    }

    fn remove_retired_adapters(&mut self) {
        let mut at = 0;
        while let Some(&adapter) = self.retiring.get(at) {
            let pools = self.poolings.iter().any(|pooling| pooling.adapter == Some(adapter));
            if pools || self.scheduler.uses_adapter(adapter) {
                at += 1;
                continue;
            }
            self.retiring.remove(at);
            self.adapters.remove(&adapter);
            self.runner.remove_adapter(adapter);
        }
    }

    fn pool(&mut self, call: u64, inputs: Vec<Vec<Token>>, scored_by: Option<AdapterId>) {
        let head = match scored_by.map(|adapter| (adapter, self.adapters.get(&adapter))) {
            None => None,
            Some((_, Some(AdapterFacts { head: Some(head), .. }))) => Some(head.clone()),
            Some((adapter, None)) => {
                return self.output.reply(call, Err(unknown_adapter(adapter)));
            }
            Some((_, Some(_))) => {
                let error = EngineError::invalid("model", "this adapter is no reward model");
                return self.output.reply(call, Err(error));
            }
        };
        self.poolings.push_back(Pooling {
            call,
            tokens: inputs.iter().map(Vec::len).sum::<usize>() as u32,
            inputs: VecDeque::from(inputs),
            done: 0,
            adapter: scored_by,
            head,
            vectors: Vec::new(),
            scores: Vec::new(),
        });
    }

    /// Computes the next rows of an input to be embedded or scored: as many as fit into the time of
    /// one step while others decode. Returns false if no input is waiting.
    pub(super) fn pool_chunk(&mut self) -> bool {
        let Some(pooling) = self.poolings.front_mut() else { return false };
        let result = match pooling.inputs.front() {
            Some(input) => {
                let left = input.len() - pooling.done;
                let rows = match self.runner.pools_in_chunks() {
                    true => left.min(self.scheduler.pooling_rows()),
                    false => left,
                };
                self.output.expect(self.scheduler.expected_pooling(rows));
                let started = Instant::now();
                let range = pooling.done..pooling.done + rows;
                let row = self.runner.pool(input, range, pooling.adapter);
                self.scheduler.observe_pooling(rows, started.elapsed());
                pooling.done += rows;
                row.and_then(|row| row.map_or(Ok(()), |row| pooling.take(row)))
            }
            None => Ok(()),
        };
        let over = pooling.inputs.is_empty() || result.is_err();
        if over && let Some(pooling) = self.poolings.pop_front() {
            let reply = match (result, pooling.head) {
                (Ok(()), None) => Ok(Reply::Embeddings {
                    vectors: pooling.vectors,
                    prompt_tokens: pooling.tokens,
                }),
                (Ok(()), Some(_)) => {
                    Ok(Reply::Scores { scores: pooling.scores, prompt_tokens: pooling.tokens })
                }
                (Err(error), _) => Err(EngineError::internal(error.to_string())),
            };
            self.output.reply(pooling.call, reply);
        }
        true
    }
}

impl Pooling {
    /// Turns the pooled row of the first input into the requested embedding or score.
    fn take(&mut self, row: Vec<f32>) -> Result<(), RunnerError> {
        self.inputs.pop_front();
        self.done = 0;
        let sum = |other: &[f32]| {
            row.iter().zip(other).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>()
        };
        match &self.head {
            Some(head) if head.len() == row.len() => self.scores.push(sum(head) as f32),
            Some(head) => {
                let (width, row) = (head.len(), row.len());
                return Err(RunnerError(format!("a head of {width} for rows of {row}")));
            }
            None => {
                let norm = sum(&row).sqrt();
                if !norm.is_finite() || norm == 0.0 {
                    return Err(RunnerError("the embedding is not finite".into()));
                }
                self.vectors.push(row.iter().map(|x| (f64::from(*x) / norm) as f32).collect());
            }
        }
        Ok(())
    }
}

/// The error for a full queue.
pub(super) fn overloaded() -> EngineError {
    EngineError {
        kind: EngineErrorKind::Overloaded,
        message: "the server has as many requests waiting as it may; try again shortly".into(),
        param: None,
    }
}

fn unknown_adapter(adapter: AdapterId) -> EngineError {
    EngineError {
        kind: EngineErrorKind::Unavailable,
        message: format!("adapter {} is not loaded in the engine; try again", adapter.0),
        param: Some("model".into()),
    }
}
