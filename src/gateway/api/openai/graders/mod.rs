//! `/v1/fine_tuning/alpha/graders`: validates and runs graders, and queries grader models.
//!
//! Source: OpenAI's API reference, "Graders", and the types of its Python client. `remote.rs` asks
//! models of other servers.

mod remote;

use crate::gateway::api::openai::chat::{self, ChatRequest};
use crate::gateway::api::openai::score::{Input, score};
use crate::gateway::api::wire::fields::{Fields, JsonBody};
use crate::gateway::api::wire::format::json_schema;
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::grade::{
    Answer, Ask, Context, Failed, Grader, GraderError, Message, Question, Reasoning, Sampling,
};
use crate::ipc::{Event, TokenLogprob};
use axum::Json;
use axum::extract::{Extension, State};
use http::StatusCode;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::Instant;

/// Number of the likeliest tokens among which the words of a choice are looked for.
const TOP_TOKENS: u32 = 20;
/// Default maximum of tokens that a model may generate for a score.
const NUMBER_TOKENS: u32 = 64;

/// `POST /v1/fine_tuning/alpha/graders/validate`: returns the grader with every default filled in.
///
/// # Errors
/// 400 if the grader is invalid.
pub async fn validate(JsonBody(mut fields): JsonBody) -> Result<Json<Value>, ApiError> {
    let grader = take_grader(&mut fields)?;
    fields.finish()?;
    Ok(Json(json!({"grader": grader})))
}

/// `POST /v1/fine_tuning/alpha/graders/run`: grades one sample.
///
/// # Errors
/// 400 if the request is invalid. A grader that fails is reported in the response, as by OpenAI.
pub async fn run(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    JsonBody(mut fields): JsonBody,
) -> Result<Json<Value>, ApiError> {
    let started = Instant::now();
    let grader = take_grader(&mut fields)?;
    let sample = fields.string("model_sample", usize::MAX)?;
    let sample = sample.ok_or_else(|| fields.missing("model_sample"))?;
    let item = fields.object("item")?.map(Fields::into_map).unwrap_or_default();
    fields.finish()?;
    let item = Value::Object(item);
    let context = Context::new(&item, &sample);
    let questions = grader.questions(&context);
    let mut answers = Vec::with_capacity(questions.len());
    for question in &questions {
        answers.push(answer(&app, identity, question).await);
    }
    let graded = grader.grade(&context, &answers);
    let usage = |usage: &crate::grade::Usage| {
        json!({
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens(),
        })
    };
    let per_model: Map<String, Value> =
        graded.usage.iter().map(|(model, used)| (model.clone(), usage(used))).collect();
    let total: u64 = graded.usage.values().map(crate::grade::Usage::total_tokens).sum();
    Ok(Json(json!({
        "reward": graded.reward,
        "sub_rewards": graded.sub_rewards,
        "metadata": {
            "name": grader.name(),
            "type": grader.kind(),
            "errors": graded.errors,
            // Not in OpenAI's API: the reasons for the error flags.
            "reasons": graded.reasons,
            "execution_time": started.elapsed().as_secs_f64(),
            "scores": graded.sub_rewards,
            "token_usage": (!questions.is_empty()).then_some(total),
            "sampled_model_name": null,
        },
        "model_grader_token_usage_per_model": per_model,
    })))
}

fn take_grader(fields: &mut Fields) -> Result<Grader, ApiError> {
    let grader = fields.object("grader")?.ok_or_else(|| fields.missing("grader"))?;
    Grader::parse(Value::Object(grader.into_map())).map_err(refused)
}

/// The API error for an invalid grader.
pub(in crate::gateway::api) fn refused(error: GraderError) -> ApiError {
    ApiError::invalid(error.param, error.message)
}

/// Answers a grader's question with a model of this server.
pub async fn answer(
    app: &Arc<App>,
    identity: Identity,
    question: &Question,
) -> Result<Answer, Failed> {
    let failed = |error: ApiError| {
        // Other states of a model or a queue may pass.
        let passing = [StatusCode::NOT_FOUND, StatusCode::TOO_MANY_REQUESTS];
        let permanent = error.status.is_client_error() && !passing.contains(&error.status);
        Failed { refused: false, permanent, message: error.message }
    };
    // Only the operator may have requests sent to other servers.
    if let Some(model) = app.remote_models.find(&question.model).filter(|_| identity.admin) {
        return remote::answer(&app.remote_models, model, &question.ask).await.map_err(failed);
    }
    // A share of a published name must not mix two models among the scores.
    let model = &app.registry.main_target(&question.model);
    match &question.ask {
        Ask::Number { messages, range, sampling } => {
            number(app, identity, model, messages, *range, sampling).await.map_err(failed)
        }
        Ask::Choice { messages, labels, reasoning } => {
            let reasoning = reasoning.as_ref();
            choice(app, identity, model, messages, labels, reasoning).await.map_err(failed)
        }
        Ask::Score { messages } => {
            let served = app.registry.find(&question.model).await.map_err(failed)?;
            let input = Input::Messages(messages.iter().map(plain).collect());
            let parse_control = app.config.limits.parse_control_tokens;
            let scored = score(served, vec![input], parse_control).await;
            let (scores, tokens) = scored.map_err(failed)?;
            Ok(Answer {
                number: scores.first().map(|score| f64::from(*score)),
                prompt_tokens: u64::from(tokens),
                completion_tokens: 0,
                reasoning: None,
            })
        }
    }
}

/// The form of a number that a model must write.
fn number_schema((least, most): (f64, f64)) -> Value {
    json!({
        "type": "object",
        "properties": {"result": {"type": "number", "minimum": least, "maximum": most}},
        "required": ["result"],
        "additionalProperties": false,
    })
}

fn plain(message: &Message) -> Value {
    json!({"role": message.role, "content": message.content})
}

/// Runs a chat completion whose output a grammar restricts to a number.
async fn number(
    app: &Arc<App>,
    identity: Identity,
    model: &str,
    messages: &[Message],
    range: (f64, f64),
    sampling: &Sampling,
) -> Result<Answer, ApiError> {
    let schema = number_schema(range);
    let mut request = ChatRequest::plain(model, messages.iter().map(plain).collect());
    request.format = Some(json_schema("grader", &schema)?);
    let common = &mut request.common;
    common.stop.max_tokens = Some(sampling.max_completions_tokens.unwrap_or(NUMBER_TOKENS));
    if let Some(temperature) = sampling.temperature {
        common.sampling.temperature = temperature as f32;
    }
    if let Some(top_p) = sampling.top_p {
        common.sampling.top_p = top_p as f32;
    }
    if let Some(seed) = sampling.seed {
        common.sampling.seed = seed.cast_unsigned();
    }
    let (running, writer) = chat::start(app, identity, request).await?;
    let (text, usage) = chat::text(running, writer).await?;
    let result: Value = serde_json::from_str(&text).unwrap_or_default();
    Ok(Answer {
        number: result["result"].as_f64(),
        prompt_tokens: usage.prompt_tokens.into(),
        completion_tokens: usage.completion_tokens.into(),
        reasoning: None,
    })
}

/// The probability that the answer's first token is the first of two words, relative to both.
async fn choice(
    app: &Arc<App>,
    identity: Identity,
    model: &str,
    messages: &[Message],
    labels: &[String; 2],
    reasoning: Option<&Reasoning>,
) -> Result<Answer, ApiError> {
    let mut messages: Vec<Value> = messages.iter().map(plain).collect();
    let (mut prompt_tokens, mut completion_tokens, mut written) = (0, 0, None);
    if let Some(Reasoning { max_tokens, then }) = reasoning {
        let mut request = ChatRequest::plain(model, messages.clone());
        request.without_reasoning();
        request.common.stop.max_tokens = Some(*max_tokens);
        request.common.sampling.temperature = 0.0;
        let (running, writer) = chat::start(app, identity, request).await?;
        let (text, usage) = chat::text(running, writer).await?;
        messages.push(json!({"role": "assistant", "content": text}));
        messages.push(json!({"role": "user", "content": then}));
        (prompt_tokens, completion_tokens) = (usage.prompt_tokens, usage.completion_tokens);
        written = Some(text);
    }
    let mut request = ChatRequest::plain(model, messages);
    request.without_reasoning();
    request.logprobs = Some(TOP_TOKENS);
    request.common.stop.max_tokens = Some(1);
    request.common.sampling.temperature = 0.0;
    let (mut running, _) = chat::start(app, identity, request).await?;
    let mut first = None;
    while let Some(event) = running.next().await {
        if let (_, Event::Delta { logprobs, .. }) = event? {
            first = first.or_else(|| logprobs.into_iter().next());
        }
    }
    let usage = running.usage();
    Ok(Answer {
        number: first.and_then(|TokenLogprob { top, .. }| {
            let top = top.iter().map(|(_, bytes, logprob)| (&bytes[..], f64::from(*logprob)));
            preference(top, labels)
        }),
        prompt_tokens: (prompt_tokens + usage.prompt_tokens).into(),
        completion_tokens: (completion_tokens + usage.completion_tokens).into(),
        reasoning: written,
    })
}

/// The share of the first label in the probability of both, as the beginning of an answer: with or
/// without a space or a parenthesis. A label that is not among the likeliest tokens has the
/// probability of the least likely of these. `None` if neither label is among them.
fn preference<'a>(
    top: impl Iterator<Item = (&'a [u8], f64)> + Clone,
    labels: &[String; 2],
) -> Option<f64> {
    let least = top.clone().map(|(_, logprob)| logprob).reduce(f64::min)?;
    let of = |label: &String| {
        let is = |bytes: &[u8]| {
            std::str::from_utf8(bytes)
                .is_ok_and(|text| text.trim_matches([' ', '\n', '(', ')', '*', '"']) == label)
        };
        let found = top.clone().filter(|(bytes, _)| is(bytes));
        found.map(|(_, logprob)| logprob.exp()).reduce(|sum, x| sum + x)
    };
    let [first, second] = [of(&labels[0]), of(&labels[1])];
    first.or(second)?;
    let [first, second] = [first, second].map(|p| p.unwrap_or(least.exp()));
    // Both may be too small for a number.
    Some(first / (first + second)).filter(|share| share.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preference_is_the_share_of_the_first_label() {
        let labels = ["A".to_owned(), "B".to_owned()];
        let of = |top: &[(&str, f64)]| {
            preference(top.iter().map(|(text, p)| (text.as_bytes(), p.ln())), &labels)
        };
        let close = |found: Option<f64>, right: f64| {
            assert!((found.unwrap() - right).abs() < 1e-6, "{found:?}, not {right}");
        };
        close(of(&[("A", 0.6), ("B", 0.2), ("I", 0.1)]), 0.75);
        // All spellings count.
        close(of(&[("A", 0.3), (" A", 0.2), ("(A", 0.1), ("B", 0.2), ("Answer", 0.1)]), 0.75);
        // A label that is not listed is at most as likely as the last one.
        close(of(&[("B", 0.9), ("I", 0.1)]), 0.1);
        assert_eq!(of(&[("I", 0.9), ("a", 0.1)]), None);
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("A", 0.0), ("B", 0.0)]), None);
    }
}
