//! `POST /v1/chat/completions`: generates the next message of a conversation.
//!
//! | file | content |
//! |---|---|
//! | `request.rs` | the validated request |
//! | `constraint/` | grammars from tools and formats |
//! | `answer.rs` | responses, whole or in chunks |

mod answer;
pub(super) mod constraint;
mod request;

pub(super) use answer::text;
pub(super) use request::ChatRequest;

use super::score::{Input, reward_model, score_in_time};
use super::{name_grammar_part, render, template};
use crate::gateway::api::wire::fields::JsonBody;
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::generate;
use crate::gateway::stream::{self, GenerationStream};
use answer::{Answers, Writer, whole};
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use request::BestOf;
use serde_json::json;
use std::sync::Arc;

/// `POST /v1/chat/completions`.
///
/// # Errors
/// 400 for an invalid request, 404 for an unknown model, 429 and 503 for the state of the engine.
pub async fn handle(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    let request = ChatRequest::read(fields)?;
    if let Some(best) = request.best.clone() {
        return best_of(&app, identity, request, best).await;
    }
    let stream = request.common.stream;
    let (running, writer) = start(&app, identity, request).await?;
    match stream {
        Some(_) => Ok(stream::respond(running, writer, app.config.listen.slow_client_timeout)),
        None => whole(running, writer).await,
    }
}

/// Generates several answers, and returns those that the reward model scores highest.
async fn best_of(
    app: &App,
    identity: Identity,
    request: ChatRequest,
    best: BestOf,
) -> Result<Response, ApiError> {
    let scorer = app.registry.find(&best.reward_model).await;
    let scorer = scorer.map_err(|error| error.with_param("reward_model"))?;
    reward_model(&scorer).map_err(|error| error.with_param("reward_model"))?;
    let messages = request.messages.clone();
    let (running, writer) = start(app, identity, request).await?;
    let mut answers = Answers::collect(running, writer).await?;
    let conversation = |text: String| {
        let answer = json!({"role": "assistant", "content": text});
        Input::Messages(messages.iter().cloned().chain([answer]).collect())
    };
    let inputs = answers.texts().into_iter().map(conversation).collect();
    let scored = score_in_time(app, scorer, inputs).await;
    let (scores, _) = scored.map_err(|error| error.with_param("reward_model"))?;
    answers.keep_best(&scores, best.keep);
    Ok(answers.respond())
}

/// Renders a conversation and starts its request.
///
/// # Errors
/// As [`handle`].
pub(in crate::gateway::api) async fn start(
    app: &App,
    identity: Identity,
    mut request: ChatRequest,
) -> Result<(GenerationStream, Writer), ApiError> {
    let (model, key) = (&request.common.model, request.common.sticky.as_deref());
    let served = app.registry.find_for(model, key, &app.metrics).await?;
    let info = served.model.engine.info()?;
    request.check(&info)?;
    request.map_effort(&served.model)?;
    let parse_control = app.config.limits.parse_control_tokens;
    let prompt = render(served.model.clone(), request.render_input(), parse_control).await?;
    let template = template(&served.model)?;
    let constraint = constraint::build(template, &info, &prompt.text, &request)?;
    let writer = Writer::new(&request, &constraint);
    let (grammar, parts) = (constraint.grammar.clone(), constraint.parts.clone());
    let generate = request.into_generate(&served, identity, prompt, constraint);
    match (generate::start(app, served.clone(), vec![generate]).await, grammar) {
        (Ok(running), _) => Ok((running, writer)),
        (Err(error), Some(spec)) => {
            Err(name_grammar_part(error, &served, &spec.grammar, &parts).await)
        }
        (Err(error), None) => Err(error),
    }
}

#[cfg(test)]
mod tests;
