//! `POST /v1/completions`: continues a text.

use super::{Answer, finish_reason, name_grammar_part};
use crate::gateway::api::openai::chat::constraint::Part;
use crate::gateway::api::wire::fields::{Fields, JsonBody, tokens};
use crate::gateway::api::wire::format::take_response_format;
use crate::gateway::api::wire::logprobs::TextLogprobs;
use crate::gateway::api::wire::params::{Common, MAX_TOP_LOGPROBS, check_tokens, take_max_tokens};
use crate::gateway::app::App;
use crate::gateway::auth::Identity;
use crate::gateway::error::ApiError;
use crate::gateway::generate;
use crate::gateway::registry::Served;
use crate::gateway::stream::{self, EventWriter, GenerationStream, Sse, Usage, UsageBody};
use crate::ipc::{
    Event, Generate, Grammar, GrammarSpec, ModelInfo, Prompt, RequestId, Token, TokenLogprob,
};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde::Serialize;
use serde_json::Value;
use std::sync::Arc;

/// Maximum number of prompts in one request, and of choices over all prompts.
const MAX_PROMPTS: usize = 128;
const MAX_CHOICES: usize = 256;
const MAX_TOKENS_GIVEN: usize = 1 << 20;
/// OpenAI's default for this endpoint.
const DEFAULT_MAX_TOKENS: u32 = 16;

/// A validated request.
#[derive(Debug)]
struct CompletionRequest {
    common: Common,
    prompts: Vec<Input>,
    /// The text after the gap that the model fills.
    suffix: Option<String>,
    echo: bool,
    logprobs: Option<u32>,
    grammar: Option<Grammar>,
    /// Whether prompts begin with the tokens that begin a text (such as BOS).
    add_special: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Input {
    Text(String),
    Tokens(Vec<Token>),
}

/// `POST /v1/completions`.
///
/// # Errors
/// 400 for an invalid request, 404 for an unknown model, 429 and 503 for the state of the engine.
pub async fn handle(
    State(app): State<Arc<App>>,
    Extension(identity): Extension<Identity>,
    JsonBody(fields): JsonBody,
) -> Result<Response, ApiError> {
    let request = CompletionRequest::read(fields)?;
    let (model, key) = (&request.common.model, request.common.sticky.as_deref());
    let served = app.registry.find_for(model, key, &app.metrics).await?;
    let info = served.model.engine.info()?;
    request.check(&info)?;
    let writer = Writer::new(&request);
    let stream = request.common.stream;
    let grammar = request.grammar.clone();
    let prompts = request.into_generates(&served, identity);
    let running = match (generate::start(&app, served.clone(), prompts).await, grammar) {
        (Err(error), Some(grammar)) => {
            let (param, what) = ("response_format".into(), None);
            let part = Part { param, what, grammar: grammar.clone() };
            return Err(name_grammar_part(error, &served, &grammar, &[part]).await);
        }
        (started, _) => started?,
    };
    match stream {
        Some(_) => Ok(stream::respond(running, writer, app.config.listen.slow_client_timeout)),
        None => whole(running, writer).await,
    }
}

impl CompletionRequest {
    fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let mut common = Common::take(&mut fields)?;
        let echo = fields.boolean("echo")?.unwrap_or(false);
        // An output of 0 tokens is useful only to get the log-probabilities of the prompt.
        let max_tokens = take_max_tokens(&mut fields, u32::from(!echo))?;
        common.stop.max_tokens = Some(max_tokens.unwrap_or(DEFAULT_MAX_TOKENS));
        let prompts = take_prompts(&mut fields)?;
        let choices = prompts.len() * common.choices as usize;
        if choices > MAX_CHOICES {
            let message = format!("prompts times n must be at most {MAX_CHOICES}, got {choices}");
            return Err(ApiError::invalid("n", message));
        }
        let suffix = fields.string("suffix", usize::MAX)?.filter(|suffix| !suffix.is_empty());
        if suffix.is_some() {
            if prompts.iter().any(|prompt| matches!(prompt, Input::Tokens(_))) {
                return Err(ApiError::invalid("suffix", "suffix needs a prompt of text"));
            }
            if echo {
                return Err(ApiError::invalid("echo", "echo cannot be combined with suffix"));
            }
        }
        let logprobs = fields.count("logprobs", 0, MAX_TOP_LOGPROBS)?;
        let grammar = take_response_format(&mut fields)?;
        let add_special = fields.boolean("add_special_tokens")?.unwrap_or(true);
        fields.finish()?;
        Ok(Self { common, prompts, suffix, echo, logprobs, grammar, add_special })
    }

    /// Checks the parameters that depend on the model.
    fn check(&self, info: &ModelInfo) -> Result<(), ApiError> {
        if !info.can_generate {
            let message = "This model computes embeddings only; it does not generate text.";
            return Err(ApiError::invalid("model", message));
        }
        if self.suffix.is_some() && !info.can_infill {
            let message = "suffix is not supported by this model: it has no infill tokens";
            return Err(ApiError::invalid("suffix", message).with_code("unsupported_parameter"));
        }
        for prompt in &self.prompts {
            if let Input::Tokens(tokens) = prompt {
                check_tokens("prompt", tokens, info)?;
            }
        }
        self.common.check_model(info)
    }

    fn into_generates(self, served: &Served, identity: Identity) -> Vec<Generate> {
        let Self { common, prompts, suffix, echo, logprobs, grammar, add_special } = self;
        let generate = |input| Generate {
            id: RequestId(0),
            prompt: match (input, &suffix) {
                (Input::Text(prefix), Some(suffix)) => {
                    Prompt::Infill { prefix, suffix: suffix.clone() }
                }
                // Raw prompts are often rendered templates, so control tokens in them are parsed.
                (Input::Text(text), None) => {
                    Prompt::Text { text, add_special, parse_special: true }
                }
                (Input::Tokens(tokens), _) => Prompt::Tokens(tokens),
            },
            choices: common.choices,
            sampling: common.sampling.clone(),
            stop: common.stop.clone(),
            logprobs,
            echo,
            grammar: grammar.clone().map(|grammar| GrammarSpec { grammar, trigger: None }),
            adapter: served.adapter.as_ref().map(|adapter| adapter.id),
            tenant: common.tenant(identity),
            priority: common.priority,
            max_drafted: common.max_drafted,
            fair_key: identity.key,
            rollout: false,
            render_special: common.render_special,
        };
        prompts.into_iter().map(generate).collect()
    }
}

/// A string, a list of strings, a list of token ids, or a list of such lists.
fn take_prompts(fields: &mut Fields) -> Result<Vec<Input>, ApiError> {
    const EXPECTED: &str = "a string, a list of strings, a list of token ids, or a list of those";
    let value = fields.take("prompt").ok_or_else(|| fields.missing("prompt"))?;
    let list = match value {
        Value::String(text) => return Ok(vec![Input::Text(text)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(fields.wrong("prompt", EXPECTED, &other)),
    };
    if list[0].is_number() {
        if list.len() > MAX_TOKENS_GIVEN {
            return Err(ApiError::invalid("prompt", "prompt has too many tokens"));
        }
        return Ok(vec![Input::Tokens(tokens("prompt", &list)?)]);
    }
    if list.len() > MAX_PROMPTS {
        let message = format!("prompt may be at most {MAX_PROMPTS} prompts, got {}", list.len());
        return Err(ApiError::invalid("prompt", message));
    }
    let inputs = list.into_iter().enumerate().map(|(index, value)| match value {
        Value::String(text) => Ok(Input::Text(text)),
        Value::Array(ids) if !ids.is_empty() => {
            Ok(Input::Tokens(tokens(&format!("prompt[{index}]"), &ids)?))
        }
        other => Err(fields.wrong("prompt", EXPECTED, &other)),
    });
    inputs.collect()
}

// ---------------------------------------------------------------------------------------------
// Responses

#[derive(Debug, Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    answer: &'a Answer,
    choices: &'a [Choice],
    /// Absent, or null until the last chunk of a stream that requested it.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

#[derive(Debug, Default, Serialize)]
struct Choice {
    text: String,
    index: usize,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
}

/// Converts events to choices, for a stream or a whole response.
#[derive(Debug)]
struct Writer {
    answer: Answer,
    /// Choices per prompt.
    choices: usize,
    include_usage: bool,
    logprobs: bool,
    /// Number of characters written so far, per choice over all prompts.
    offsets: Vec<usize>,
}

impl Writer {
    fn new(request: &CompletionRequest) -> Self {
        let choices = request.common.choices as usize;
        Self {
            answer: Answer::new("cmpl", "text_completion", &request.common.model),
            choices,
            include_usage: request.common.stream.is_some_and(|stream| stream.include_usage),
            logprobs: request.logprobs.is_some(),
            offsets: vec![0; choices * request.prompts.len()],
        }
    }

    /// The parts of choices in one event.
    fn parts(&mut self, prompt: usize, event: Event) -> Vec<Choice> {
        let base = prompt * self.choices;
        match event {
            Event::Prompt { text, logprobs } => (0..self.choices)
                .map(|choice| self.part(base + choice, text.clone(), logprobs.clone()))
                .collect(),
            Event::Delta { choice, text, logprobs, .. } => {
                vec![self.part(base + choice as usize, text, logprobs)]
            }
            Event::Finish { choice, reason, .. } => vec![Choice {
                index: base + choice as usize,
                finish_reason: Some(finish_reason(&reason)),
                ..Choice::default()
            }],
            _ => Vec::new(),
        }
    }

    fn part(&mut self, index: usize, text: String, tokens: Vec<TokenLogprob>) -> Choice {
        let logprobs = self.logprobs.then(|| {
            let mut logprobs = TextLogprobs::default();
            if let Some(offset) = self.offsets.get_mut(index) {
                logprobs.extend(tokens, offset);
            }
            logprobs
        });
        Choice { text, index, logprobs, finish_reason: None }
    }

    fn chunk(&self, choices: &[Choice], usage: Option<UsageBody>, out: &mut Sse) {
        let usage = self.include_usage.then_some(usage);
        out.json(&Body { answer: &self.answer, choices, usage });
    }
}

impl EventWriter for Writer {
    fn event(&mut self, prompt: usize, event: Event, out: &mut Sse) {
        for mut part in self.parts(prompt, event) {
            let empty = part.logprobs.as_ref().is_none_or(TextLogprobs::is_empty);
            if empty {
                part.logprobs = None;
                if part.text.is_empty() && part.finish_reason.is_none() {
                    continue;
                }
            }
            self.chunk(&[part], None, out);
        }
    }

    fn end(&mut self, usage: Usage, out: &mut Sse) {
        if self.include_usage {
            self.chunk(&[], Some(usage.body()), out);
        }
    }
}

/// The response to a request without streaming.
async fn whole(mut running: GenerationStream, mut writer: Writer) -> Result<Response, ApiError> {
    let choice = |index| Choice {
        index,
        logprobs: writer.logprobs.then(TextLogprobs::default),
        ..Choice::default()
    };
    let mut choices: Vec<Choice> = (0..writer.offsets.len()).map(choice).collect();
    while let Some(event) = running.next().await {
        let (prompt, event) = event?;
        for part in writer.parts(prompt, event) {
            let Some(choice) = choices.get_mut(part.index) else { continue };
            choice.text.push_str(&part.text);
            choice.finish_reason = part.finish_reason.or(choice.finish_reason);
            if let (Some(all), Some(more)) = (&mut choice.logprobs, part.logprobs) {
                all.append(more);
            }
        }
    }
    let usage = Some(Some(running.usage().body()));
    Ok(Json(Body { answer: &writer.answer, choices: &choices, usage }).into_response())
}

#[cfg(test)]
mod tests;
