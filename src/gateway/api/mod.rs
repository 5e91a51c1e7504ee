//! The HTTP API: one file per family of endpoints, wire types beside their handler.
//!
//! | file | what |
//! |---|---|
//! | `chat.rs`, `chat_answer.rs` | `/v1/chat/completions`: request, answer |
//! | `completions.rs`, `embeddings.rs`, `score.rs`, `tokenize.rs` | their endpoints |
//! | `graders.rs` | graders, checked and tried |
//! | `policy.rs` | what jobs ask for over their own connections |
//! | `models.rs`, `admin.rs`, `health.rs`, `openapi.rs` | their endpoints |
//! | `files.rs`, `fine_tuning.rs`, `jobs.rs` | files, OpenAI's jobs, the operator's jobs |
//! | `query.rs` | query parameters that a route knows |
//! | `form.rs` | multipart forms within bounds |
//! | `fields.rs` | strict reading of JSON bodies |
//! | `params.rs`, `format.rs`, `messages.rs`, `tools.rs` | parameters, validated once |
//! | `constraint.rs` | what a grammar makes of tools and formats |
//! | `logprobs.rs` | both of OpenAI's forms |

pub mod admin;
pub mod chat;
mod chat_answer;
pub mod completions;
mod constraint;
pub mod embeddings;
pub mod fields;
pub mod files;
pub mod fine_tuning;
mod form;
mod format;
pub mod graders;
pub mod health;
pub mod jobs;
mod logprobs;
mod messages;
pub mod models;
pub mod openapi;
mod params;
pub mod policy;
pub mod query;
pub mod score;
pub mod tokenize;
mod tools;

use crate::gateway::error::ApiError;
use crate::gateway::registry::{Model, Served};
use crate::ipc::{Call, FinishReason, Grammar};
use crate::template::{ChatTemplate, RenderInput, RenderedPrompt, TemplateError};
use constraint::Part;
use http::Uri;
use serde::Serialize;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of a name or source, at most.
const MAX_NAME: usize = 200;

/// What every body of one generated answer has in common.
#[derive(Debug, Serialize)]
struct Answer {
    id: String,
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Answer {
    fn new(prefix: &str, object: &'static str, model: &str) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            id: format!("{prefix}-{:032x}", rand::random::<u128>()),
            object,
            created: now.map_or(0, |now| now.as_secs()),
            model: model.to_owned(),
            system_fingerprint: concat!("ingot-", env!("CARGO_PKG_VERSION")),
        }
    }
}

fn finish_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::StopString(_) => "stop",
        FinishReason::Length => "length",
    }
}

/// Compiles a client's grammar in the engine, so that a bad one is a 400 before anything is generated,
/// which names the part of `parts` that is at fault.
async fn check_grammar(served: &Served, grammar: &Grammar, parts: &[Part]) -> Result<(), ApiError> {
    let check = async |grammar: &Grammar| {
        let call = Call::CheckGrammar { grammar: grammar.clone() };
        served.model.engine.call(call).await.map(drop).map_err(ApiError::from)
    };
    let Err(whole) = check(grammar).await else { return Ok(()) };
    if !whole.status.is_client_error() {
        return Err(whole);
    }
    for part in parts {
        let error = match parts.len() {
            // Most grammars are one part, and that is what was checked.
            1 if part.grammar == *grammar => whole.clone(),
            _ => match check(&part.grammar).await {
                Ok(()) => continue,
                Err(error) => error,
            },
        };
        let message = match &part.what {
            Some(what) => format!("{what}: {}", error.message),
            None => error.message.clone(),
        };
        return Err(ApiError { message, ..error }.with_param(&part.param));
    }
    // Each is fine alone: they are too much together.
    let param = parts.last().map_or("response_format", |part| &part.param);
    Err(whole.with_param(param))
}

/// The model's chat template, or why it cannot chat.
fn template(model: &Model) -> Result<&ChatTemplate, ApiError> {
    model.chat.as_ref().map_err(|error| ApiError::invalid("messages", error.to_string()))
}

/// Renders a conversation, away from the threads that serve sockets: templates are programs.
///
/// Control tokens that are spelled in users' and tools' texts are text, unless `parse_control`.
async fn render(
    model: Arc<Model>,
    input: RenderInput,
    parse_control: bool,
) -> Result<RenderedPrompt, ApiError> {
    let render = move || {
        let control = if parse_control { None } else { Some(model.control_tokens()?) };
        template(&model)?.render_guarded(&input, control).map_err(refused)
    };
    match tokio::task::spawn_blocking(render).await {
        Ok(prompt) => prompt,
        Err(error) => Err(ApiError::internal(format!("the chat template: {error}"))),
    }
}

fn refused(error: TemplateError) -> ApiError {
    let param = match &error {
        TemplateError::Dropped { index, .. } => format!("messages[{index}]"),
        _ => "messages".into(),
    };
    ApiError::invalid(param, error.to_string())
}

/// Endpoints that clients know from elsewhere: 404, but it says so.
pub async fn later(uri: Uri) -> ApiError {
    ApiError::not_found(format!(
        "{} is not served yet; it comes later. Use /v1/chat/completions or /v1/completions.",
        uri.path().chars().take(100).collect::<String>()
    ))
    .with_code("not_implemented")
}

/// The paths of [`later`].
pub const LATER: [&str; 5] =
    ["/v1/responses", "/v1/messages", "/v1/rerank", "/v1/infill", "/infill"];
