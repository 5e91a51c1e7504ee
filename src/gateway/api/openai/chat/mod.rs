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

use super::{name_grammar_part, render, template};
use crate::gateway::api::wire::fields::JsonBody;
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::generate;
use crate::gateway::stream::{self, GenerationStream};
use answer::{Writer, whole};
use axum::Extension;
use axum::extract::State;
use axum::response::Response;
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
    let stream = request.common.stream;
    let (running, writer) = start(&app, identity, request).await?;
    match stream {
        Some(_) => Ok(stream::respond(running, writer, app.config.listen.slow_client_timeout)),
        None => whole(running, writer).await,
    }
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
    let served = app.registry.find(&request.common.model).await?;
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
