//! Endpoints of a job's own connection: sampling completions from the policy that it trains, and
//! querying grader models. The requests are the types of [`crate::job::rollout`].

use super::graders::answer;
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::jobs::JobConnection;
use crate::gateway::stream::GenerationStream;
use crate::grade::Question;
use crate::ipc::{Event, FinishReason, Generate, Prompt, SamplingParams, StopParams};
use crate::job::rollout::{Rollout, RolloutRequest};
use axum::extract::State;
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::sync::Arc;

/// Priority of a job's requests: below all client requests.
const PRIORITY: i32 = -1;
/// Maximum number of a job's requests that wait in the engine at once, to leave room in the queue
/// for clients.
const AT_ONCE: usize = 16;
/// Identity of jobs. No key of the configuration has these numbers, so jobs share prefix-cache
/// entries with no client.
const OF_JOBS: Identity = Identity { key: u64::MAX, tenant: u64::MAX, admin: true };

type At = State<(Arc<App>, Arc<JobConnection>)>;

/// Loads an adapter from a file; later completions are sampled with it.
///
/// # Errors
/// If the adapter does not fit the model.
pub async fn adopt(State((_, link)): At, body: Bytes) -> Result<Bytes, ApiError> {
    link.adopt(read::<PathBuf>(&body)?).await?;
    written(&())
}

/// Samples completions.
///
/// # Errors
/// 404 if the model is not loaded any more, 503 if the engine is not available.
pub async fn rollouts(State((app, link)): At, body: Bytes) -> Result<Bytes, ApiError> {
    let asked: RolloutRequest = read(&body)?;
    let served = link.policy().await?;
    let adapter = served.adapter.as_ref().map(|adapter| adapter.id);
    let request = |(prompt, seed): (&Vec<u32>, &u64)| Generate {
        choices: asked.answers,
        sampling: SamplingParams {
            temperature: asked.temperature,
            seed: *seed,
            ..SamplingParams::default()
        },
        stop: StopParams { max_tokens: Some(asked.max_tokens), ..StopParams::default() },
        logprobs: Some(0),
        adapter,
        tenant: OF_JOBS.tenant,
        fair_key: OF_JOBS.key,
        priority: PRIORITY,
        rollout: true,
        ..Generate::plain(0, Prompt::Tokens(prompt.clone()))
    };
    let requests: Vec<_> = asked.prompts.iter().zip(&asked.seeds).map(request).collect();
    let empty = Rollout { tokens: vec![], log_probs: vec![], text: String::new(), ended: false };
    let mut found = vec![vec![empty; asked.answers as usize]; requests.len()];
    for (some, found) in requests.chunks(AT_ONCE).zip(found.chunks_mut(AT_ONCE)) {
        let _counted = link.count(some.len());
        let mut running = GenerationStream::start(&app, served.clone(), some.to_vec()).await?;
        while let Some(event) = running.next().await {
            let (prompt, event) = event?;
            take(&mut found[prompt], event);
        }
    }
    written(&found)
}

fn take(answers: &mut [Rollout], event: Event) {
    match event {
        Event::Delta { choice, text, logprobs, .. } => {
            let Some(answer) = answers.get_mut(choice as usize) else { return };
            answer.text.push_str(&text);
            for found in logprobs {
                answer.tokens.push(found.token);
                answer.log_probs.push(found.logprob.unwrap_or(f32::NAN));
            }
        }
        Event::Finish { choice, reason, .. } => {
            let Some(answer) = answers.get_mut(choice as usize) else { return };
            answer.ended = reason != FinishReason::Length;
        }
        _ => {}
    }
}

/// Sends graders' questions to their models.
///
/// # Errors
/// If the questions cannot be parsed.
pub async fn answers(State((app, link)): At, body: Bytes) -> Result<Bytes, ApiError> {
    let questions: Vec<Question> = read(&body)?;
    let mut answers = Vec::with_capacity(questions.len());
    for some in questions.chunks(AT_ONCE) {
        let _counted = link.count(some.len());
        let asked = some.iter().map(|question| answer(&app, OF_JOBS, question));
        answers.extend(futures_util::future::join_all(asked).await);
    }
    written(&answers)
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    rmp_serde::from_slice(body).map_err(|error| ApiError::bad_request(error.to_string()))
}

fn written(answer: &impl Serialize) -> Result<Bytes, ApiError> {
    rmp_serde::to_vec_named(answer).map(Bytes::from).map_err(ApiError::internal)
}
