//! `POST /v1/embeddings`.

use crate::gateway::api::wire::fields::{Fields, JsonBody, tokens, wrong};
use crate::gateway::api::wire::params::{check_tokens, take_bookkeeping, take_model};
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::Served;
use crate::ipc::{Call, ModelInfo, Prompt, Reply};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// OpenAI's bounds.
const MAX_INPUTS: usize = 2048;
const MAX_TOKENS_GIVEN: usize = 1 << 20;

#[derive(Debug, PartialEq)]
struct EmbeddingRequest {
    model: String,
    inputs: Vec<Prompt>,
    /// Whether vectors are little-endian `f32`s as base64 (as official clients request), not
    /// numbers.
    base64: bool,
    dimensions: Option<u32>,
    sticky: Option<String>,
}

#[derive(Debug, Serialize)]
struct Body {
    object: &'static str,
    data: Vec<Item>,
    model: String,
    usage: EmbeddingUsage,
}

#[derive(Debug, Serialize)]
struct Item {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Vector {
    Numbers(Vec<f32>),
    Base64(String),
}

#[derive(Debug, Serialize)]
struct EmbeddingUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

/// `POST /v1/embeddings`.
///
/// # Errors
/// 400 for an invalid request, 404 for an unknown model, 503 for the state of the engine, 504.
pub async fn handle(
    State(app): State<Arc<App>>,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    let request = EmbeddingRequest::read(fields)?;
    let key = request.sticky.as_deref();
    let served = app.registry.find_for(&request.model, key, &app.metrics).await?;
    let info = served.model.engine.info()?;
    request.check(&served, &info)?;
    let call = served.model.engine.call(Call::Embed { inputs: request.inputs });
    let limit = app.config.limits.request_timeout;
    let reply = tokio::time::timeout(limit, call).await.map_err(|_| {
        ApiError::timeout(format!(
            "The request took longer than the {} seconds that this server allows.",
            limit.as_secs()
        ))
    })??;
    let Reply::Embeddings { vectors, prompt_tokens } = reply else {
        return Err(ApiError::internal("the engine answered Embed with something else"));
    };
    let item = |(index, vector): (usize, Vec<f32>)| Item {
        object: "embedding",
        index,
        embedding: if request.base64 {
            Vector::Base64(base64(&vector))
        } else {
            Vector::Numbers(vector)
        },
    };
    let body = Body {
        object: "list",
        data: vectors.into_iter().enumerate().map(item).collect(),
        model: request.model,
        usage: EmbeddingUsage { prompt_tokens, total_tokens: prompt_tokens },
    };
    Ok(Json(body).into_response())
}

impl EmbeddingRequest {
    fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let model = take_model(&mut fields)?.ok_or_else(|| fields.missing("model"))?;
        let inputs = take_inputs(&mut fields)?;
        let base64 = match fields.string("encoding_format", 64)?.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(other) => {
                return Err(wrong("encoding_format", "\"float\" or \"base64\"", &json!(other)));
            }
        };
        let dimensions = fields.count("dimensions", 1, u32::MAX)?;
        let sticky = take_bookkeeping(&mut fields)?;
        fields.finish()?;
        Ok(Self { model, inputs, base64, dimensions, sticky })
    }

    /// Checks the parameters that depend on the model.
    fn check(&self, served: &Served, info: &ModelInfo) -> Result<(), ApiError> {
        if !info.can_embed {
            let message = format!("The model `{}` does not compute embeddings.", served.name);
            return Err(ApiError::invalid("model", message));
        }
        if served.adapter.is_some() {
            let message = format!(
                "`{}` is an adapter: embeddings are computed by its base `{}` only.",
                served.name, served.model.name
            );
            return Err(ApiError::invalid("model", message));
        }
        let size = info.embedding_size;
        if self.dimensions.is_some_and(|dimensions| dimensions != size) {
            let message = format!("dimensions must be {size}: this model's vectors are not cut");
            return Err(ApiError::invalid("dimensions", message));
        }
        for input in &self.inputs {
            if let Prompt::Tokens(tokens) = input {
                check_tokens("input", tokens, info)?;
            }
        }
        Ok(())
    }
}

/// A string, a list of strings, a list of token ids, or a list of such lists; none empty.
fn take_inputs(fields: &mut Fields) -> Result<Vec<Prompt>, ApiError> {
    const EXPECTED: &str =
        "a string, a list of strings, a list of token ids, or a list of those, none of them empty";
    // Text from a client is plain text: control tokens in it are not recognised.
    let text = |text| Prompt::Text { text, add_special: true, parse_special: false };
    let value = fields.take("input").ok_or_else(|| fields.missing("input"))?;
    let list = match value {
        Value::String(input) if !input.is_empty() => return Ok(vec![text(input)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(fields.wrong("input", EXPECTED, &other)),
    };
    if list[0].is_number() {
        if list.len() > MAX_TOKENS_GIVEN {
            return Err(ApiError::invalid("input", "input has too many tokens"));
        }
        return Ok(vec![Prompt::Tokens(tokens("input", &list)?)]);
    }
    if list.len() > MAX_INPUTS {
        let message = format!("input may be at most {MAX_INPUTS} texts, got {}", list.len());
        return Err(ApiError::invalid("input", message));
    }
    let inputs = list.into_iter().enumerate().map(|(index, value)| match value {
        Value::String(input) if !input.is_empty() => Ok(text(input)),
        Value::Array(ids) if !ids.is_empty() => {
            Ok(Prompt::Tokens(tokens(&format!("input[{index}]"), &ids)?))
        }
        other => Err(fields.wrong("input", EXPECTED, &other)),
    });
    inputs.collect()
}

/// Standard base64 of the vector's bytes, little-endian.
fn base64(vector: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for (place, shift) in [18, 12, 6, 0].into_iter().enumerate() {
            let digit = ALPHABET[(bits >> shift) as usize & 63];
            text.push(if place <= group.len() { char::from(digit) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<EmbeddingRequest, ApiError> {
        EmbeddingRequest::read(Fields::of(String::new(), body).unwrap())
    }

    #[test]
    fn base64_is_the_standard_one() {
        assert_eq!(base64(&[]), "");
        assert_eq!(base64(&[1.0]), "AACAPw==");
        assert_eq!(base64(&[1.0, -2.5]), "AACAPwAAIMA=");
        assert_eq!(base64(&[1.0, -2.5, 0.0]), "AACAPwAAIMAAAAAA");
    }

    #[test]
    fn every_form_of_input() {
        let text = |text: &str| Prompt::Text {
            text: text.into(),
            add_special: true,
            parse_special: false,
        };
        let cases = [
            (json!("a"), vec![text("a")]),
            (json!(["a", "b"]), vec![text("a"), text("b")]),
            (json!([1, 2]), vec![Prompt::Tokens(vec![1, 2])]),
            (json!([[1], [2, 3]]), vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]),
        ];
        for (input, expected) in cases {
            let request = read(json!({"model": "m", "input": input, "user": "u"})).unwrap();
            assert_eq!(request.inputs, expected, "{input}");
        }
        let request = read(json!({"model": "m", "input": "a", "encoding_format": "base64"}));
        assert!(request.unwrap().base64);
    }

    #[test]
    fn bad_requests_are_named() {
        let cases = [
            (json!({"input": "a"}), "model"),
            (json!({"model": "m"}), "input"),
            (json!({"model": "m", "input": ""}), "input"),
            (json!({"model": "m", "input": []}), "input"),
            (json!({"model": "m", "input": [""]}), "input"),
            (json!({"model": "m", "input": [[]]}), "input"),
            (json!({"model": "m", "input": [1, "a"]}), "input[1]"),
            (json!({"model": "m", "input": [[1.5]]}), "input[0][0]"),
            (json!({"model": "m", "input": "a", "encoding_format": "hex"}), "encoding_format"),
            (json!({"model": "m", "input": "a", "dimensions": 0}), "dimensions"),
            (json!({"model": "m", "input": "a", "truncate": "END"}), "truncate"),
        ];
        for (body, param) in cases {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        }
    }
}
