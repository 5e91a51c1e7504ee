//! OpenAI's endpoints, and those that stand beside them in other servers (`score`, `tokenize`).

pub mod chat;
pub mod completions;
pub mod embeddings;
pub mod files;
pub mod fine_tuning;
pub mod graders;
pub mod models;
pub mod score;
pub mod tokenize;

use crate::gateway::api::wire::format::response_format;
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{Model, Served};
use crate::ipc::{Call, FinishReason, Grammar};
use crate::job::spec::Spec;
use crate::template::{ChatTemplate, RenderInput, RenderedPrompt, TemplateError};
use chat::constraint::Part;
use serde::Serialize;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Fields that all bodies of one generated response share.
#[derive(Debug, Serialize)]
pub(in crate::gateway::api) struct Answer {
    id: String,
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

impl Answer {
    pub(in crate::gateway::api) fn new(prefix: &str, object: &'static str, model: &str) -> Self {
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

pub(in crate::gateway::api) fn finish_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::StopString(_) => "stop",
        FinishReason::Length => "length",
    }
}

/// Names the part of a grammar for which the engine refused a request: `refused` with its parameter
/// and what the part is for. Errors that are not about the grammar are returned as they are.
pub(in crate::gateway::api) async fn name_grammar_part(
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

/// Checks that the model of a job can enforce the form of its completions; `param` is the name of
/// the form in errors.
///
/// # Errors
/// 400 for an invalid form, 404 if the model is not loaded.
pub(in crate::gateway::api) async fn check_format(
    app: &App,
    spec: &Spec,
    param: &str,
) -> Result<(), ApiError> {
    let Some(format) = spec.task.settings().response_format() else { return Ok(()) };
    let grammar = response_format(param, format)?;
    let (Some(grammar), Some(model)) = (grammar, &spec.model) else { return Ok(()) };
    let engine = app.registry.find(model).await?.model.engine.clone();
    let checked = engine.call(Call::CheckGrammar { grammar }).await;
    checked.map(drop).map_err(|error| ApiError::from(error).with_param(param))
}

/// The model's chat template, or the reason why the model cannot chat.
pub(in crate::gateway::api) fn template(model: &Model) -> Result<&ChatTemplate, ApiError> {
    model.chat.as_ref().map_err(|error| ApiError::invalid("messages", error.to_string()))
}

/// Renders a conversation on a blocking thread, because templates are programs and may be slow.
///
/// Control tokens spelled in texts of users and tools are treated as text, unless `parse_control`.
pub(in crate::gateway::api) async fn render(
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
