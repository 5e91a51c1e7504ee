//! The HTTP API: one file per family of endpoints, wire types beside their handler.
//!
//! | file | content |
//! |---|---|
//! | `chat.rs`, `chat_answer.rs` | `/v1/chat/completions`: request, response |
//! | `completions.rs`, `embeddings.rs`, `score.rs`, `tokenize.rs` | endpoints of these names |
//! | `graders.rs` | validation and trial runs of graders |
//! | `models.rs`, `admin.rs`, `health.rs`, `openapi.rs` | endpoints of these names |
//! | `files.rs`, `fine_tuning.rs`, `jobs.rs` | files, OpenAI's jobs API, the operator's jobs API |
//! | `query.rs` | check of query parameters |
//! | `form.rs` | multipart forms with size limits |
//! | `fields.rs` | strict reader of JSON bodies |
//! | `params.rs`, `format.rs`, `messages.rs`, `tools.rs` | parameters, validated once |
//! | `constraint.rs` | grammars from tools and formats |
//! | `logprobs.rs` | OpenAI's two formats of log-probabilities |

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

/// Maximum length of a name or source, in bytes.
const MAX_NAME: usize = 200;

/// Fields that all bodies of one generated response share.
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

/// Names the part of a grammar for which the engine refused a request: `refused` with its parameter
/// and what the part is for. Errors that are not about the grammar are returned as they are.
async fn name_grammar_part(
    refused: ApiError,
    served: &Served,
    grammar: &Grammar,
    parts: &[Part],
) -> ApiError {
    if !refused.status.is_client_error() || refused.param.as_deref() != Some(grammar.param()) {
        return refused;
    }
    for part in parts {
        let error = match parts.len() {
            // Most grammars consist of one part.
            1 if part.grammar == *grammar => refused.clone(),
            _ => {
                let call = Call::CheckGrammar { grammar: part.grammar.clone() };
                match served.model.engine.call(call).await {
                    Ok(_) => continue,
                    Err(error) => ApiError::from(error),
                }
            }
        };
        let message = match &part.what {
            Some(what) => format!("{what}: {}", error.message),
            None => error.message.clone(),
        };
        return ApiError { message, ..error }.with_param(&part.param);
    }
    // Each part is valid alone; only their combination is refused.
    let param = parts.last().map_or("response_format", |part| &part.param);
    refused.with_param(param)
}

/// The model's chat template, or the reason why the model cannot chat.
fn template(model: &Model) -> Result<&ChatTemplate, ApiError> {
    model.chat.as_ref().map_err(|error| ApiError::invalid("messages", error.to_string()))
}

/// Renders a conversation on a blocking thread, because templates are programs and may be slow.
///
/// Control tokens spelled in texts of users and tools are treated as text, unless `parse_control`.
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

/// Endpoints that other servers have: 404 with a message that says so.
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
