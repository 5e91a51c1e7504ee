//! `POST /v1/score`: reward model scores of texts and conversations.

use super::template;
use crate::dataset::{Chat, Example, Rendered, RenderedPiece, Rendering, render};
use crate::gateway::api::wire::fields::{Fields, JsonBody, tokens};
use crate::gateway::api::wire::messages::checked;
use crate::gateway::api::wire::params::{check_tokens, take_bookkeeping, take_model};
use crate::gateway::app::App;
use crate::gateway::error::ApiError;
use crate::gateway::registry::{AdapterVersion, Model, Served};
use crate::ipc::{Call, Prompt, PromptPiece, Reply, Token};
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;

const MAX_INPUTS: usize = 2048;

#[derive(Debug, PartialEq)]
struct ScoreRequest {
    model: String,
    inputs: Vec<Input>,
    sticky: Option<String>,
}

/// One input to score.
#[derive(Debug, PartialEq)]
pub(in crate::gateway::api) enum Input {
    Text(String),
    Messages(Vec<Value>),
    Tokens(Vec<Token>),
}

/// `POST /v1/score`.
///
/// A text is scored at its end, a conversation at the end of its last answer, as in training.
///
/// # Errors
/// 400 for an invalid request, 404 for an unknown model, 503 for the state of the engine, 504.
pub async fn handle(
    State(app): State<Arc<App>>,
    JsonBody(fields): JsonBody,
) -> Result<Json<Value>, ApiError> {
    let ScoreRequest { model, inputs, sticky } = ScoreRequest::read(fields)?;
    let served = app.registry.find_for(&model, sticky.as_deref(), &app.metrics).await?;
    let (scores, prompt_tokens) = score_in_time(&app, served, inputs).await?;
    let item = |(index, score)| json!({"object": "score", "index": index, "score": score});
    let data: Vec<Value> = scores.into_iter().enumerate().map(item).collect();
    Ok(Json(json!({
        "object": "list",
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    })))
}

/// As [`score`], within the server's time limit.
pub(super) async fn score_in_time(
    app: &App,
    served: Served,
    inputs: Vec<Input>,
) -> Result<(Vec<f32>, u32), ApiError> {
    let scoring = score(served, inputs, app.config.limits.parse_control_tokens);
    let limit = app.config.limits.request_timeout;
    tokio::time::timeout(limit, scoring).await.map_err(|_| {
        ApiError::timeout(format!(
            "The request took longer than the {} seconds that this server allows.",
            limit.as_secs()
        ))
    })?
}

/// Returns the scores, and the number of prompt tokens.
pub(in crate::gateway::api) async fn score(
    served: Served,
    inputs: Vec<Input>,
    parse_control: bool,
) -> Result<(Vec<f32>, u32), ApiError> {
    let adapter = reward_model(&served)?.id;
    let info = served.model.engine.info()?;
    for input in &inputs {
        if let Input::Tokens(tokens) = input {
            check_tokens("input", tokens, &info)?;
        }
    }
    let model = served.model.clone();
    // On a blocking thread, because templates are programs and may be slow.
    let prompts = move || -> Result<Vec<Prompt>, ApiError> {
        inputs
            .into_iter()
            .enumerate()
            .map(|(at, input)| prompt(&model, at, input, parse_control))
            .collect()
    };
    let prompts = tokio::task::spawn_blocking(prompts).await.map_err(ApiError::internal)??;
    match served.model.engine.call(Call::Score { adapter, inputs: prompts }).await? {
        Reply::Scores { scores, .. } if scores.iter().any(|score| !score.is_finite()) => {
            Err(ApiError::internal("a score is no number"))
        }
        Reply::Scores { scores, prompt_tokens } => Ok((scores, prompt_tokens)),
        _ => Err(ApiError::internal("the engine answered Score with something else")),
    }
}

pub(super) fn reward_model(served: &Served) -> Result<&AdapterVersion, ApiError> {
    let adapter = served.adapter.as_deref().filter(|adapter| adapter.is_reward_model());
    adapter.ok_or_else(|| {
        let message = format!(
            "`{}` is no reward model: train one with a job of kind `reward`, and name what it made.",
            served.name
        );
        ApiError::invalid("model", message)
    })
}

/// The prompt of an input, formatted as in training.
fn prompt(model: &Model, at: usize, input: Input, parse_control: bool) -> Result<Prompt, ApiError> {
    let example = match input {
        Input::Tokens(tokens) => return Ok(Prompt::Tokens(tokens)),
        Input::Text(text) => Example::Text(text),
        Input::Messages(messages) => {
            let mut trained = vec![false; messages.len()];
            trained.iter_mut().last().into_iter().for_each(|last| *last = true);
            Example::Chat(Chat { messages, trained, tools: None })
        }
    };
    let bos = model.facts.tokenizer.bos.as_ref().map(|bos| bos.text.as_str());
    let control = model.control_tokens()?;
    let rendering = Rendering {
        template: template(model)?,
        bos,
        control: (!parse_control).then_some(control),
        now: None,
    };
    let Rendered { pieces, add_special, parse_special, ends } = render(&example, rendering)
        .map_err(|why| ApiError::invalid(format!("input[{at}]"), format!("{why}.")))?;
    let piece = |RenderedPiece { text, barriers, .. }| PromptPiece { text, barriers };
    let pieces = pieces.into_iter().map(piece).collect();
    Ok(Prompt::Pieces { pieces, add_special, parse_special, ends })
}

impl ScoreRequest {
    fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let model = take_model(&mut fields)?.ok_or_else(|| fields.missing("model"))?;
        let inputs = take_inputs(&mut fields)?;
        let sticky = take_bookkeeping(&mut fields)?;
        fields.finish()?;
        Ok(Self { model, inputs, sticky })
    }
}

/// Takes a text, or a list of texts, conversations and lists of token ids. A single conversation
/// need not be in a list.
fn take_inputs(fields: &mut Fields) -> Result<Vec<Input>, ApiError> {
    const EXPECTED: &str = "a text, a conversation (a list of messages), or a list of those or of \
                            lists of token ids, none of them empty";
    let value = fields.take("input").ok_or_else(|| fields.missing("input"))?;
    let list = match value {
        Value::String(text) if !text.is_empty() => return Ok(vec![Input::Text(text)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(fields.wrong("input", EXPECTED, &other)),
    };
    match &list[0] {
        Value::Object(_) => return Ok(vec![conversation("input", list)?]),
        Value::Number(_) => return Ok(vec![Input::Tokens(tokens("input", &list)?)]),
        _ => {}
    }
    if list.len() > MAX_INPUTS {
        let message = format!("input may be at most {MAX_INPUTS} texts, got {}", list.len());
        return Err(ApiError::invalid("input", message));
    }
    let inputs = list.into_iter().enumerate().map(|(index, value)| match value {
        Value::String(text) if !text.is_empty() => Ok(Input::Text(text)),
        Value::Array(list) if list.first().is_some_and(Value::is_object) => {
            conversation(&format!("input[{index}]"), list)
        }
        Value::Array(ids) if !ids.is_empty() => {
            Ok(Input::Tokens(tokens(&format!("input[{index}]"), &ids)?))
        }
        other => Err(fields.wrong("input", EXPECTED, &other)),
    });
    inputs.collect()
}

/// Reads a conversation that ends with the answer to score.
fn conversation(name: &str, list: Vec<Value>) -> Result<Input, ApiError> {
    let messages = checked(name, list)?;
    match messages.last().is_some_and(|last| last["role"] == "assistant") {
        true => Ok(Input::Messages(messages)),
        false => {
            let message = format!("the last message of {name} must be the assistant's: the answer");
            Err(ApiError::invalid(name, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<ScoreRequest, ApiError> {
        ScoreRequest::read(Fields::of(String::new(), body).unwrap())
    }

    #[test]
    fn every_form_of_input() {
        let talk = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        let Value::Array(messages) = talk.clone() else { unreachable!() };
        let cases = [
            (json!("a"), vec![Input::Text("a".into())]),
            (json!([1, 2]), vec![Input::Tokens(vec![1, 2])]),
            (talk.clone(), vec![Input::Messages(messages.clone())]),
            (
                json!(["a", talk, [3]]),
                vec![Input::Text("a".into()), Input::Messages(messages), Input::Tokens(vec![3])],
            ),
        ];
        for (input, expected) in cases {
            let request = read(json!({"model": "m", "input": input})).unwrap();
            assert_eq!(request.inputs, expected, "{input}");
        }
    }

    #[test]
    fn bad_requests_are_named() {
        let asked = json!([{"role": "user", "content": "a"}]);
        for (body, param) in [
            (json!({"input": "a"}), "model"),
            (json!({"model": "m"}), "input"),
            (json!({"model": "m", "input": ""}), "input"),
            (json!({"model": "m", "input": []}), "input"),
            (json!({"model": "m", "input": [[]]}), "input"),
            (json!({"model": "m", "input": asked}), "input"),
            (json!({"model": "m", "input": ["a", asked]}), "input[1]"),
            (json!({"model": "m", "input": [[{"role": "assistant"}]]}), "input[0][0].content"),
            (json!({"model": "m", "input": ["a", ["b"]]}), "input[1][0]"),
            (json!({"model": "m", "input": "a", "truncate": true}), "truncate"),
        ] {
            let error = read(body.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}: {error}");
        }
    }
}
