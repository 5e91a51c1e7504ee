//! Responses of `/v1/chat/completions`, whole or in chunks.

use super::ChatRequest;
use super::constraint::Constraint;
use crate::gateway::api::openai::{Answer, finish_reason};
use crate::gateway::api::wire::logprobs::ChatLogprobs;
use crate::gateway::api::wire::tools::Choice as ToolChoice;
use crate::gateway::error::ApiError;
use crate::gateway::stream::{EventWriter, GenerationStream, Sse, Usage, UsageBody};
use crate::ipc::{Event, FinishReason, TokenLogprob};
use crate::template::{CallIds, Delta, OutputParser};
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// Converts engine events to a response.
#[derive(Debug)]
pub(in crate::gateway::api) struct Writer {
    answer: Answer,
    include_usage: bool,
    logprobs: bool,
    choices: Vec<Choice>,
    /// A choice that must end now.
    to_finish: Option<u32>,
}

/// State of one choice in progress.
#[derive(Debug)]
struct Choice {
    parser: OutputParser,
    /// Tokens whose log-probabilities were not sent yet: the parser may still hold their text.
    pending: Vec<TokenLogprob>,
    begun: bool,
    /// The choice was ended because the model repeats itself; further text is ignored.
    over: bool,
}

impl Writer {
    pub(in crate::gateway::api) fn new(request: &ChatRequest, constraint: &Constraint) -> Self {
        let choice = |_| Choice {
            parser: OutputParser::new(
                constraint.family,
                constraint.reasoning.clone(),
                request.tools.is_some(),
                request.tools.as_ref().is_none_or(|tools| tools.parallel),
                CallIds::new(rand::random()),
            )
            .must_call(
                request.tools.as_ref().is_some_and(|tools| tools.choice != ToolChoice::Auto),
            ),
            pending: Vec::new(),
            begun: false,
            over: false,
        };
        let stream = request.common.stream;
        let object = if stream.is_some() { "chat.completion.chunk" } else { "chat.completion" };
        Self {
            answer: Answer::new("chatcmpl", object, &request.common.model),
            include_usage: stream.is_some_and(|stream| stream.include_usage),
            logprobs: request.logprobs.is_some(),
            choices: (0..request.common.choices).map(choice).collect(),
            to_finish: None,
        }
    }
}

impl Choice {
    /// Parses a piece of text.
    fn read(&mut self, text: &str) -> Vec<Delta> {
        if self.over {
            return Vec::new();
        }
        let deltas = self.parser.push(text);
        filled(deltas)
    }

    /// Ends the parsing; returns the last deltas and the finish reason.
    fn finish(&mut self, reason: &FinishReason) -> (Vec<Delta>, &'static str) {
        let cut = self.over || *reason != FinishReason::Stop;
        let deltas = filled(self.parser.finish(cut));
        let reason = match finish_reason(reason) {
            // The reason is the same whether or not the engine ended the choice in time.
            _ if self.over => "tool_calls",
            "stop" if self.parser.calls_are_complete() => "tool_calls",
            other => other,
        };
        (deltas, reason)
    }

    /// Whether the choice must end now because the model repeats itself. True only once.
    fn repeats_itself(&mut self) -> bool {
        !std::mem::replace(&mut self.over, self.parser.repeats_itself()) && self.over
    }
}

fn filled(mut deltas: Vec<Delta>) -> Vec<Delta> {
    deltas.retain(|delta| match delta {
        Delta::Reasoning(text) | Delta::Content(text) => !text.is_empty(),
        Delta::ToolCallStart { .. } | Delta::ToolCallArguments { .. } => true,
    });
    deltas
}

// ---------------------------------------------------------------------------------------------
// Streams

#[derive(Debug, Serialize)]
struct Chunk<'a> {
    #[serde(flatten)]
    answer: &'a Answer,
    choices: &'a [ChunkChoice],
    /// Absent, or null until the last chunk, if the client asked for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

#[derive(Debug, Serialize)]
struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

#[derive(Debug, Default, Serialize)]
struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta; 1]>,
}

#[derive(Debug, Serialize)]
struct CallDelta {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: FunctionDelta,
}

#[derive(Debug, Serialize)]
struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl From<Delta> for ChunkDelta {
    fn from(delta: Delta) -> Self {
        match delta {
            Delta::Reasoning(text) => Self { reasoning_content: Some(text), ..Self::default() },
            Delta::Content(text) => Self { content: Some(text), ..Self::default() },
            Delta::ToolCallStart { index, id, name } => {
                let function = FunctionDelta { name: Some(name), arguments: String::new() };
                let call = CallDelta { index, id: Some(id), kind: Some("function"), function };
                Self { tool_calls: Some([call]), ..Self::default() }
            }
            Delta::ToolCallArguments { index, json_fragment } => {
                let function = FunctionDelta { name: None, arguments: json_fragment };
                let call = CallDelta { index, id: None, kind: None, function };
                Self { tool_calls: Some([call]), ..Self::default() }
            }
        }
    }
}

impl Writer {
    fn chunk(&self, choices: &[ChunkChoice], usage: Option<UsageBody>, out: &mut Sse) {
        let usage = self.include_usage.then_some(usage);
        out.json(&Chunk { answer: &self.answer, choices, usage });
    }

    /// Writes one delta of a choice, with the pending log-probabilities.
    fn delta(
        &mut self,
        index: usize,
        delta: ChunkDelta,
        finish_reason: Option<&'static str>,
        out: &mut Sse,
    ) {
        let choice = &mut self.choices[index];
        let first = !std::mem::replace(&mut choice.begun, true);
        let pending = std::mem::take(&mut choice.pending);
        let logprobs = (self.logprobs && !pending.is_empty()).then(|| {
            let mut logprobs = ChatLogprobs::default();
            logprobs.extend(pending);
            logprobs
        });
        if first {
            let role = Some("assistant");
            let delta = ChunkDelta { role, content: Some(String::new()), ..ChunkDelta::default() };
            let opening = ChunkChoice { index, delta, logprobs: None, finish_reason: None };
            self.chunk(&[opening], None, out);
        }
        self.chunk(&[ChunkChoice { index, delta, logprobs, finish_reason }], None, out);
    }
}

impl EventWriter for Writer {
    fn event(&mut self, _prompt: usize, event: Event, out: &mut Sse) {
        match event {
            Event::Delta { choice, text, logprobs, .. } => {
                let index = choice as usize;
                let Some(choice) = self.choices.get_mut(index) else { return };
                choice.pending.extend(logprobs);
                let deltas = choice.read(&text);
                if choice.repeats_itself() {
                    self.to_finish = Some(index as u32);
                }
                for delta in deltas {
                    self.delta(index, delta.into(), None, out);
                }
            }
            Event::Finish { choice, reason, .. } => {
                let index = choice as usize;
                let Some(choice) = self.choices.get_mut(index) else { return };
                let (deltas, reason) = choice.finish(&reason);
                for delta in deltas {
                    self.delta(index, delta.into(), None, out);
                }
                self.delta(index, ChunkDelta::default(), Some(reason), out);
            }
            _ => {}
        }
    }

    fn to_finish(&mut self) -> Option<u32> {
        self.to_finish.take()
    }

    fn end(&mut self, usage: Usage, out: &mut Sse) {
        if self.include_usage {
            self.chunk(&[], Some(usage.body()), out);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Whole responses

#[derive(Debug, Serialize)]
struct Body<'a> {
    #[serde(flatten)]
    answer: &'a Answer,
    choices: Vec<BodyChoice>,
    usage: UsageBody,
}

#[derive(Debug, Serialize)]
struct BodyChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    /// The score of the reward model, in best-of-n sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    reward: Option<f32>,
}

#[derive(Debug, Default, Serialize)]
struct Message {
    role: &'static str,
    /// Null if there are only tool calls.
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<MessageCall>,
}

#[derive(Debug, Serialize)]
struct MessageCall {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    function: MessageFunction,
}

#[derive(Debug, Serialize)]
struct MessageFunction {
    name: String,
    arguments: String,
}

impl Message {
    fn add(&mut self, delta: Delta) {
        match delta {
            Delta::Reasoning(text) => {
                self.reasoning_content.get_or_insert_default().push_str(&text);
            }
            Delta::Content(text) => self.content.get_or_insert_default().push_str(&text),
            Delta::ToolCallStart { id, name, .. } => {
                let function = MessageFunction { name, arguments: String::new() };
                self.tool_calls.push(MessageCall { id, kind: "function", function });
            }
            Delta::ToolCallArguments { index, json_fragment } => {
                if let Some(call) = self.tool_calls.get_mut(index) {
                    call.function.arguments.push_str(&json_fragment);
                }
            }
        }
    }
}

/// The response to a request without streaming.
pub(in crate::gateway::api) async fn whole(
    running: GenerationStream,
    writer: Writer,
) -> Result<Response, ApiError> {
    Ok(Answers::collect(running, writer).await?.respond())
}

/// All choices of a request that has ended.
pub(super) struct Answers {
    answer: Answer,
    choices: Vec<BodyChoice>,
    usage: UsageBody,
}

impl Answers {
    pub(super) async fn collect(
        running: GenerationStream,
        mut writer: Writer,
    ) -> Result<Self, ApiError> {
        let (choices, usage) = collect(running, &mut writer).await?;
        Ok(Self { answer: writer.answer, choices, usage: usage.body() })
    }

    /// The text of each choice.
    pub(super) fn texts(&self) -> Vec<String> {
        let texts = self.choices.iter().map(|choice| choice.message.content.clone());
        texts.map(Option::unwrap_or_default).collect()
    }

    /// Keeps the choices with the highest scores, in descending order.
    pub(super) fn keep_best(&mut self, scores: &[f32], keep: usize) {
        for (choice, score) in self.choices.iter_mut().zip(scores) {
            choice.reward = Some(*score);
        }
        self.choices
            .sort_by(|a, b| b.reward.unwrap_or_default().total_cmp(&a.reward.unwrap_or_default()));
        self.choices.truncate(keep);
        (0..).zip(&mut self.choices).for_each(|(index, choice)| choice.index = index);
    }

    pub(super) fn respond(self) -> Response {
        let Self { answer, choices, usage } = self;
        Json(Body { answer: &answer, choices, usage }).into_response()
    }
}

/// The text of the only message of a request, and its token counts.
pub(in crate::gateway::api) async fn text(
    running: GenerationStream,
    mut writer: Writer,
) -> Result<(String, Usage), ApiError> {
    let (choices, usage) = collect(running, &mut writer).await?;
    let text = choices.into_iter().next().and_then(|choice| choice.message.content);
    Ok((text.unwrap_or_default(), usage))
}

async fn collect(
    mut running: GenerationStream,
    writer: &mut Writer,
) -> Result<(Vec<BodyChoice>, Usage), ApiError> {
    let empty = |index| BodyChoice {
        index,
        message: Message { role: "assistant", ..Message::default() },
        logprobs: writer.logprobs.then(ChatLogprobs::default),
        finish_reason: None,
        reward: None,
    };
    let mut choices: Vec<BodyChoice> = (0..writer.choices.len()).map(empty).collect();
    while let Some(event) = running.next().await {
        let (prompt, event) = event?;
        let (Event::Delta { choice, .. } | Event::Finish { choice, .. }) = event else { continue };
        let index = choice as usize;
        let (Some(choice), Some(body)) = (writer.choices.get_mut(index), choices.get_mut(index))
        else {
            continue;
        };
        let deltas = match event {
            Event::Delta { text, logprobs: tokens, .. } => {
                if let Some(logprobs) = &mut body.logprobs {
                    logprobs.extend(tokens);
                }
                choice.read(&text)
            }
            Event::Finish { reason, .. } => {
                let (deltas, reason) = choice.finish(&reason);
                body.finish_reason = Some(reason);
                deltas
            }
            _ => continue,
        };
        deltas.into_iter().for_each(|delta| body.message.add(delta));
        if choice.repeats_itself() {
            running.finish(prompt, index as u32);
        }
        if body.finish_reason.is_some() && !choice.parser.saw_a_call() {
            body.message.content.get_or_insert_default();
        }
    }
    Ok((choices, running.usage()))
}
