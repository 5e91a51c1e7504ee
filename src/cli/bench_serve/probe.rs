//! What a long prompt does to the streams that are running.

use super::super::CliError;
use super::client::stream;
use super::load::Load;
use super::report::{ProbeRun, Times};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// The streams run alone for this long.
const HEAD_START: Duration = Duration::from_secs(2);
/// How long to wait for every stream to give its first token.
const FIRST_TOKENS: Duration = Duration::from_secs(120);

/// Starts the streams, sends the prompt, and sorts the streams' gaps by whether it was being read.
pub(super) async fn run(
    load: &Load<'_>,
    tokens: u32,
    repetition: u32,
) -> Result<ProbeRun, CliError> {
    let clients = load.options.concurrency.get();
    let mut streams = JoinSet::new();
    let mut arrivals = Vec::new();
    for index in 0..clients {
        let body = load.prompts.body(load.model(index), repetition, index);
        let (server, path) = (load.server.clone(), load.prompts.path());
        let timeout = load.options.timeout();
        let times = Arc::new(Mutex::new(Vec::<Instant>::new()));
        arrivals.push(times.clone());
        streams.spawn(async move {
            let on_text = |now| times.lock().unwrap_or_else(PoisonError::into_inner).push(now);
            stream(&server, &mut None, path, body, timeout, on_text).await.map(drop)
        });
    }
    let started = |times: &Arc<Mutex<Vec<Instant>>>| {
        !times.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    };
    let patience = Instant::now() + FIRST_TOKENS;
    while !arrivals.iter().all(started) && Instant::now() < patience && !streams.is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if let Some(Ok(Err(error))) = streams.try_join_next() {
            return Ok(ProbeRun { error: Some(error.to_string()), ..ProbeRun::default() });
        }
    }
    tokio::time::sleep(HEAD_START).await;

    let body = load.prompts.probe_body(load.model(0), tokens, repetition);
    let sent = Instant::now();
    let path = load.prompts.path();
    let probe = stream(&load.server, &mut None, path, body, load.options.timeout(), |_| {}).await;
    let probe = match probe {
        Ok(sample) => sample,
        Err(error) => {
            return Ok(ProbeRun { error: Some(error.to_string()), ..ProbeRun::default() });
        }
    };
    let first = sent + probe.first_token;
    // Let the gap that the end of the prompt falls into come to its end.
    tokio::time::sleep(Duration::from_millis(500)).await;
    while let Some(finished) = streams.try_join_next() {
        if let Ok(Err(error)) = finished {
            return Ok(ProbeRun { error: Some(error.to_string()), ..ProbeRun::default() });
        }
    }
    let running = streams.len();
    streams.abort_all();

    let (mut before, mut during) = (Vec::new(), Vec::new());
    for times in arrivals {
        let times = times.lock().unwrap_or_else(PoisonError::into_inner);
        for pair in times.windows(2) {
            let gap = pair[1] - pair[0];
            if pair[1] <= sent {
                before.push(gap);
            } else if pair[0] < first {
                during.push(gap);
            }
        }
    }
    let short = running < clients as usize;
    Ok(ProbeRun {
        streams: running,
        probe_time_to_first_token_ms: probe.first_token.as_secs_f64() * 1e3,
        probe_prompt_tokens: probe.prompt_tokens,
        before_ms: Times::of(before),
        during_ms: Times::of(during),
        error: short.then(|| {
            format!(
                "only {running} of {clients} streams were still running after the prompt was read; \
                 raise --output-tokens, and add --ignore-eos"
            )
        }),
    })
}
