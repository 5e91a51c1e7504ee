//! Closed loop, waves, and open loop.

use super::super::CliError;
use super::super::http::{Connection, HttpError, Server};
use super::super::progress::request_bar;
use super::client::{Sample, stream};
use super::prompts::Prompts;
use super::report::Run;
use super::{BenchServeOptions, Endpoint};
use bytes::Bytes;
use hyper::Method;
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

pub(super) type Outcome = Result<Sample, HttpError>;

/// A server, and what to ask it.
pub(super) struct Load<'a> {
    pub options: &'a BenchServeOptions,
    pub server: Server,
    /// Used in turn.
    pub models: Vec<String>,
    pub prompts: Prompts,
}

/// The names to use as `model`.
pub(super) async fn models(
    options: &BenchServeOptions,
    server: &Server,
) -> Result<Vec<String>, CliError> {
    if !options.adapters.is_empty() {
        return Ok(options.adapters.clone());
    }
    if let Some(model) = &options.model {
        return Ok(vec![model.clone()]);
    }
    let list = server
        .json(Method::GET, "/v1/models", None)
        .await
        .map_err(|error| CliError::message(format!("{error}. Is the server running?")))?;
    match list["data"][0]["id"].as_str() {
        Some(id) => Ok(vec![id.to_owned()]),
        None => Err(CliError::message("The server lists no model: name one with --model.")),
    }
}

/// Bodies still to be sent, and idle connections: what the workers share.
struct Shared {
    server: Server,
    path: &'static str,
    timeout: Duration,
    queue: Mutex<VecDeque<Bytes>>,
    idle: Mutex<Vec<Connection>>,
    bar: ProgressBar,
}

impl Shared {
    async fn ask(&self, body: Bytes, slot: &mut Option<Connection>) -> Outcome {
        let outcome = stream(&self.server, slot, self.path, body, self.timeout, |_| {}).await;
        self.bar.inc(1);
        outcome
    }

    fn next(&self) -> Option<Bytes> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Load<'_> {
    pub(super) fn model(&self, index: u32) -> &str {
        &self.models[index as usize % self.models.len()]
    }

    /// Unmeasured requests, with prompts that no measured request has.
    pub(super) async fn warm_up(&self) -> Result<(), CliError> {
        for index in 0..self.options.warmup {
            let body = self.prompts.body(self.model(index), u32::MAX, index);
            let path = self.prompts.path();
            stream(&self.server, &mut None, path, body, self.options.timeout(), |_| {})
                .await
                .map_err(|error| {
                    CliError::message(format!("The warm-up request failed: {error}."))
                })?;
        }
        Ok(())
    }

    /// One repetition.
    pub(super) async fn run(&self, repetition: u32) -> Run {
        let requests = self.options.requests();
        // Made before the clock starts: the load generator shares cores with the server.
        let bodies: VecDeque<Bytes> = (0..requests)
            .map(|index| self.prompts.body(self.model(index), repetition, index))
            .collect();
        let bar = request_bar(u64::from(requests));
        bar.set_prefix(match self.options.endpoint {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "completions",
        });
        let shared = Arc::new(Shared {
            server: self.server.clone(),
            path: self.prompts.path(),
            timeout: self.options.timeout(),
            queue: Mutex::new(bodies),
            idle: Mutex::new(Vec::new()),
            bar: bar.clone(),
        });
        let start = Instant::now();
        let outcomes = match self.options.rate {
            Some(rate) => open_loop(shared, rate, self.options.seed ^ u64::from(repetition)).await,
            None if self.options.arrive_together => {
                waves(shared, self.options.concurrency.get()).await
            }
            None => closed_loop(shared, self.options.concurrency.get()).await,
        };
        let wall = start.elapsed();
        bar.finish_and_clear();
        Run::summarize(&outcomes, wall)
    }
}

async fn closed_loop(shared: Arc<Shared>, clients: u32) -> Vec<Outcome> {
    let mut workers = JoinSet::new();
    for _ in 0..clients {
        let shared = shared.clone();
        workers.spawn(async move {
            let mut slot = None;
            let mut outcomes = Vec::new();
            while let Some(body) = shared.next() {
                outcomes.push(shared.ask(body, &mut slot).await);
            }
            outcomes
        });
    }
    workers.join_all().await.into_iter().flatten().collect()
}

/// All requests of a wave are sent at the same moment, the next wave when all have ended.
async fn waves(shared: Arc<Shared>, size: u32) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    loop {
        let mut wave = JoinSet::new();
        for body in std::iter::from_fn(|| shared.next()).take(size as usize) {
            let mut slot = shared.idle().pop();
            let shared = shared.clone();
            wave.spawn(async move {
                let outcome = shared.ask(body, &mut slot).await;
                shared.idle().extend(slot);
                outcome
            });
        }
        if wave.is_empty() {
            return outcomes;
        }
        outcomes.extend(wave.join_all().await);
    }
}

/// Requests arrive when a Poisson process says so, whatever became of the earlier ones.
async fn open_loop(shared: Arc<Shared>, rate: f64, seed: u64) -> Vec<Outcome> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut arrival = tokio::time::Instant::now();
    let mut requests = JoinSet::new();
    while let Some(body) = shared.next() {
        tokio::time::sleep_until(arrival).await;
        let mut slot = shared.idle().pop();
        let shared = shared.clone();
        requests.spawn(async move {
            let outcome = shared.ask(body, &mut slot).await;
            shared.idle().extend(slot);
            outcome
        });
        // 1 - u lies in (0, 1], so the logarithm is finite.
        let gap = -(1.0 - random.random::<f64>()).ln() / rate;
        arrival += Duration::from_secs_f64(gap.min(3_600.0));
    }
    requests.join_all().await
}
