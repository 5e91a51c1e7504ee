//! `POST /tokenize`, `/detokenize` and `/apply-template`: looks at what a model is really given.

use super::fields::{Fields, JsonBody};
use super::messages::take_messages;
use super::params::{check_tokens, take_model};
use super::render;
use super::tools::take_tools;
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::Served;
use crate::ipc::{Call, Reply};
use crate::template::RenderInput;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

const MAX_TOKENS_GIVEN: usize = 1 << 20;

/// `POST /tokenize`: `{"content" | "text", "add_special", "parse_special", "with_pieces"}` to
/// `{"tokens"}`, with pieces as `{"id", "piece"}` (text, or bytes where it is no whole UTF-8).
///
/// # Errors
/// 400 for what the request says, 404 for its model, 503 for the state of the engine.
pub async fn tokenize(
    State(app): State<Arc<App>>,
    JsonBody(mut fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = resolve(&app, &mut fields).await?;
    let content = fields.string("content", usize::MAX)?;
    let content = content.or(fields.string("text", usize::MAX)?);
    let text = content.ok_or_else(|| fields.missing("content"))?;
    let add_special = fields.boolean("add_special")?.unwrap_or(false);
    let parse_special = fields.boolean("parse_special")?.unwrap_or(true);
    let with_pieces = fields.boolean("with_pieces")?.unwrap_or(false);
    fields.finish()?;
    let call = Call::Tokenize { text, add_special, parse_special };
    let Reply::Tokens { tokens, pieces } = served.model.engine.call(call).await? else {
        return Err(ApiError::internal("the engine answered Tokenize with something else"));
    };
    if !with_pieces {
        return Ok(Json(json!({ "tokens": tokens })).into_response());
    }
    let pieces = pieces.iter().map(|bytes| match std::str::from_utf8(bytes) {
        Ok(text) => json!(text),
        Err(_) => json!(bytes.as_slice()),
    });
    let tokens: Vec<Value> =
        tokens.iter().zip(pieces).map(|(id, piece)| json!({"id": id, "piece": piece})).collect();
    Ok(Json(json!({ "tokens": tokens })).into_response())
}

/// `POST /detokenize`: `{"tokens", "render_special"}` to `{"content"}`.
///
/// # Errors
/// As [`tokenize`].
pub async fn detokenize(
    State(app): State<Arc<App>>,
    JsonBody(mut fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = resolve(&app, &mut fields).await?;
    let tokens = fields.tokens("tokens", MAX_TOKENS_GIVEN)?;
    let tokens = tokens.ok_or_else(|| fields.missing("tokens"))?;
    let render_special = fields.boolean("render_special")?.unwrap_or(true);
    fields.finish()?;
    check_tokens("tokens", &tokens, &*served.model.engine.info()?)?;
    let call = Call::Detokenize { tokens, render_special };
    let Reply::Text(content) = served.model.engine.call(call).await? else {
        return Err(ApiError::internal("the engine answered Detokenize with something else"));
    };
    Ok(Json(json!({ "content": content })).into_response())
}

/// `POST /apply-template`: `{"messages", "tools", "chat_template_kwargs", "add_generation_prompt",
/// "continue_final_message"}` to `{"prompt"}`, as a chat completion would render it.
///
/// # Errors
/// As [`tokenize`], and what the template refuses.
pub async fn apply_template(
    State(app): State<Arc<App>>,
    JsonBody(mut fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = resolve(&app, &mut fields).await?;
    let messages = take_messages(&mut fields)?;
    let kwargs = fields.object("chat_template_kwargs")?.map(Fields::into_map);
    let continue_final = fields.boolean("continue_final_message")?.unwrap_or(false);
    let generation = fields.boolean("add_generation_prompt")?.unwrap_or(!continue_final);
    let tools = take_tools(&mut fields)?;
    fields.finish()?;
    let input = RenderInput {
        messages,
        tools: tools.map(|tools| tools.definitions),
        add_generation_prompt: generation,
        continue_final_message: continue_final,
        chat_template_kwargs: kwargs.unwrap_or_default(),
        now: None,
    };
    let prompt = render(served.model, input).await?;
    Ok(Json(json!({ "prompt": prompt })).into_response())
}

/// The model that the request names, or the only one there is.
async fn resolve(app: &App, fields: &mut Fields) -> Result<Served, ApiError> {
    if let Some(name) = take_model(fields)? {
        return app.registry.find(&name).await;
    }
    let models = app.registry.list();
    let mut models = models.iter().filter(|card| card.parent.is_none());
    match (models.next(), models.next()) {
        (Some(only), None) => app.registry.resolve(&only.id),
        (None, _) => Err(ApiError::unavailable("No model is loaded.")),
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "model",
            "Several models are loaded: name one with the parameter 'model'.",
        )),
    }
}
