//! The way to a model inside the gateway: chat and text completions, grader models and the rollouts
//! of jobs start their requests here.

use super::app::App;
use super::error::ApiError;
use super::registry::Served;
use super::stream::GenerationStream;
use crate::ipc::{Event, FinishReason, Generate};
use crate::job::rollout::Rollout;

/// Sends one engine request per prompt and waits until each is accepted. The requests are observed
/// in the metrics, and cancelled when the stream is dropped or the server's time limit is over.
///
/// # Errors
/// The error of the engine if it refuses a prompt (all prompts are then cancelled), or a time-out.
pub async fn start(
    app: &App,
    served: Served,
    prompts: Vec<Generate>,
) -> Result<GenerationStream, ApiError> {
    if served.adapter.as_ref().is_some_and(|adapter| adapter.is_reward_model()) {
        let name = &served.name;
        let message = format!("`{name}` is a reward model: it writes nothing; use /v1/score.");
        return Err(ApiError::invalid("model", message));
    }
    let engine = served.model.engine.clone();
    let name = served.target.clone();
    let mut running = GenerationStream::new(app.config.limits.request_timeout, Some(served));
    for prompt in prompts {
        if app.config.log.prompts {
            tracing::info!(model = %name, prompt = prompt.prompt.shown(), "prompt");
        }
        let mut observer = app.metrics.observe(&name);
        let generation = engine.generate(prompt).inspect_err(|error| observer.failed(error))?;
        running.push(generation, observer);
    }
    running.accepted().await?;
    Ok(running)
}

/// Runs a request to its end: its completions, one per choice.
///
/// # Errors
/// As [`start`], and the error of an engine that fails while the request runs.
pub async fn completions(
    app: &App,
    served: Served,
    request: Generate,
) -> Result<Vec<Rollout>, ApiError> {
    let mut found = vec![Rollout::default(); request.choices as usize];
    let mut running = start(app, served, vec![request]).await?;
    while let Some(event) = running.next().await {
        let (_, event) = event?;
        let (Event::Delta { choice, .. } | Event::Finish { choice, .. }) = event else { continue };
        let Some(completion) = found.get_mut(choice as usize) else { continue };
        match event {
            Event::Delta { text, logprobs, .. } => {
                completion.text.push_str(&text);
                for token in logprobs {
                    completion.tokens.push(token.token);
                    completion.log_probs.push(token.logprob.unwrap_or(f32::NAN));
                }
            }
            Event::Finish { reason, .. } => completion.ended = reason != FinishReason::Length,
            _ => {}
        }
    }
    Ok(found)
}
