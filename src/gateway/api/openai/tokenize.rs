//! `POST /tokenize`, `/detokenize` and `/apply-template`: show the exact input of a model.

use super::render;
use crate::gateway::api::wire::fields::{Fields, JsonBody};
use crate::gateway::api::wire::messages::take_messages;
use crate::gateway::api::wire::params::{check_tokens, take_model};
use crate::gateway::api::wire::tools::take_tools;
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::Served;
use crate::gguf::SpecialToken;
use crate::ipc::{Call, Reply, Token};
use crate::template::{RenderInput, RenderedPrompt};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_bytes::ByteBuf;
use serde_json::{Value, json};
use std::sync::Arc;

const MAX_TOKENS_GIVEN: usize = 1 << 20;

/// `POST /tokenize`, in llama-server's format or vLLM's.
///
/// llama-server: `{"content", "add_special", "parse_special", "with_pieces"}` to `{"tokens"}`, with
/// pieces as `{"id", "piece"}` (text, or bytes if the piece is not complete UTF-8). vLLM:
/// `{"prompt", "add_special_tokens", "return_token_strs"}` or `{"messages", …}` (as
/// [`apply_template`]) to `{"tokens", "count", "max_model_len", "token_strs"}`.
///
/// # Errors
/// 400 for an invalid request, 404 for an unknown model, 503 for the state of the engine.
pub async fn tokenize(
    State(app): State<Arc<App>>,
    JsonBody(mut fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = resolve(&app, &mut fields).await?;
    let text = fields.string("content", usize::MAX)?.or(fields.string("text", usize::MAX)?);
    if let Some(text) = text {
        let add_special = fields.boolean("add_special")?.unwrap_or(false);
        let parse_special = fields.boolean("parse_special")?.unwrap_or(true);
        let with_pieces = fields.boolean("with_pieces")?.unwrap_or(false);
        fields.finish()?;
        let call = Call::Tokenize { text, add_special, parse_special };
        let (tokens, pieces) = tokens_of(&served, call).await?;
        if !with_pieces {
            return Ok(Json(json!({ "tokens": tokens })).into_response());
        }
        let piece = |bytes: &ByteBuf| match std::str::from_utf8(bytes) {
            Ok(text) => json!(text),
            Err(_) => json!(bytes.as_slice()),
        };
        let each = tokens.iter().zip(&pieces);
        let tokens: Vec<Value> =
            each.map(|(id, bytes)| json!({"id": id, "piece": piece(bytes)})).collect();
        return Ok(Json(json!({ "tokens": tokens })).into_response());
    }
    let with_strings = fields.boolean("return_token_strs")?.unwrap_or(false);
    let call = match fields.string("prompt", usize::MAX)? {
        Some(text) => {
            let add_special = fields.boolean("add_special_tokens")?.unwrap_or(true);
            fields.finish()?;
            Call::Tokenize { text, add_special, parse_special: true }
        }
        None if fields.has("messages") => {
            let add_special = fields.boolean("add_special_tokens")?.unwrap_or(false);
            let prompt = rendered(&app, &served, fields).await?;
            Call::TokenizeRendered { text: prompt.text, barriers: prompt.barriers, add_special }
        }
        None => {
            let message = "Missing required parameter: give 'content' (llama-server's form), \
                           'prompt' or 'messages' (vLLM's).";
            return Err(
                ApiError::invalid("content", message).with_code("missing_required_parameter")
            );
        }
    };
    let (tokens, pieces) = tokens_of(&served, call).await?;
    let strings = with_strings
        .then(|| pieces.iter().map(|bytes| String::from_utf8_lossy(bytes)).collect::<Vec<_>>());
    Ok(Json(json!({
        "count": tokens.len(),
        "max_model_len": served.model.engine.info()?.context_length,
        "tokens": tokens,
        "token_strs": strings,
    }))
    .into_response())
}

async fn tokens_of(served: &Served, call: Call) -> Result<(Vec<Token>, Vec<ByteBuf>), ApiError> {
    match served.model.engine.call(call).await? {
        Reply::Tokens { tokens, pieces } => Ok((tokens, pieces)),
        _ => Err(ApiError::internal("the engine answered Tokenize with something else")),
    }
}

/// `POST /detokenize`: `{"tokens", "render_special"}` to `{"content", "prompt"}`: the same text
/// under llama-server's name and vLLM's.
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
    let Reply::Text(text) = served.model.engine.call(call).await? else {
        return Err(ApiError::internal("the engine answered Detokenize with something else"));
    };
    Ok(Json(json!({"content": text, "prompt": text})).into_response())
}

/// `GET /tokenizer_info`: special tokens and chat template of the only loaded model, under the
/// names of Hugging Face's `tokenizer_config.json`, as in vLLM. lm-evaluation-harness uses this
/// endpoint.
///
/// # Errors
/// 400 if several models are loaded, 503 if none is.
pub async fn tokenizer_info(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let served = resolve(&app, &mut Fields::of(String::new(), json!({}))?).await?;
    let info = served.model.engine.info()?;
    let facts = &served.model.facts.tokenizer;
    let text = |token: &Option<SpecialToken>| token.as_ref().map(|token| token.text.clone());
    Ok(Json(json!({
        "tokenizer_class": facts.model,
        "model_max_length": info.context_length,
        "bos_token": text(&facts.bos),
        "eos_token": text(&facts.eos),
        "unk_token": text(&facts.unk),
        "pad_token": text(&facts.pad),
        "add_bos_token": facts.add_bos,
        "add_eos_token": facts.add_eos,
        "chat_template": facts.chat_template,
    }))
    .into_response())
}

/// `POST /apply-template`: `{"messages", "tools", "chat_template_kwargs", "add_generation_prompt",
/// "continue_final_message"}` to `{"prompt"}`, as a chat completion would render it.
///
/// # Errors
/// As [`tokenize`], and the errors that the template raises.
pub async fn apply_template(
    State(app): State<Arc<App>>,
    JsonBody(mut fields): JsonBody,
) -> Result<Response, ApiError> {
    let served = resolve(&app, &mut fields).await?;
    let prompt = rendered(&app, &served, fields).await?;
    Ok(Json(json!({ "prompt": prompt.text })).into_response())
}

/// Renders the prompt of a conversation; takes all remaining fields.
async fn rendered(
    app: &App,
    served: &Served,
    mut fields: Fields,
) -> Result<RenderedPrompt, ApiError> {
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
    render(served.model.clone(), input, app.config.limits.parse_control_tokens).await
}

/// Resolves the model that the request names, or the only loaded model.
async fn resolve(app: &App, fields: &mut Fields) -> Result<Served, ApiError> {
    if let Some(name) = take_model(fields)? {
        return app.registry.find(&name).await;
    }
    let models = app.registry.list();
    let mut models = models.iter().filter(|card| card.root == card.id);
    match (models.next(), models.next()) {
        (Some(only), None) => app.registry.resolve(&only.id),
        (None, _) => Err(ApiError::unavailable("No model is loaded.")),
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "model",
            "Several models are loaded: name one with the parameter 'model'.",
        )),
    }
}
