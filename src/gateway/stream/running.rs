//! Requests running in an engine, together with the guards that must live exactly as long.

use crate::gateway::error::ApiError;
use crate::gateway::metrics::RequestObserver;
use crate::gateway::registry::Served;
use crate::gateway::supervisor::Generation;
use crate::ipc::{EngineError, EngineErrorKind, Event};
use serde::Serialize;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::Sleep;

/// The engine requests of one HTTP request: one per prompt.
///
/// Dropping it cancels the requests that still run. It holds the adapter version that the requests
/// use, so that a reload under the same name does not affect running requests.
pub struct GenerationStream {
    /// One request per prompt; `None` once it has ended.
    requests: Vec<Option<Request>>,
    /// Prompt at which the next poll begins. It rotates, so that no prompt is starved.
    first: usize,
    usage: Usage,
    limit: Duration,
    deadline: Pin<Box<Sleep>>,
    _served: Option<Served>,
}

struct Request {
    events: Events,
    observer: Option<RequestObserver>,
}

enum Events {
    Engine(Generation),
    #[cfg(test)]
    Fake(tokio::sync::mpsc::UnboundedReceiver<Event>),
}

/// Token counts of an HTTP request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub completion_tokens: u32,
}

/// OpenAI's `usage` object.
#[derive(Debug, Serialize)]
pub struct UsageBody {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptTokensDetails,
}

#[derive(Debug, Serialize)]
struct PromptTokensDetails {
    cached_tokens: u32,
}

impl Usage {
    /// The counts in OpenAI's format.
    pub fn body(&self) -> UsageBody {
        UsageBody {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: self.prompt_tokens.saturating_add(self.completion_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: self.cached_tokens },
        }
    }
}

impl GenerationStream {
    /// No requests yet; [`generate`](crate::gateway::generate) adds them.
    pub(in crate::gateway) fn new(limit: Duration, served: Option<Served>) -> Self {
        Self {
            requests: Vec::new(),
            first: 0,
            usage: Usage::default(),
            limit,
            deadline: Box::pin(tokio::time::sleep(limit)),
            _served: served,
        }
    }

    pub(in crate::gateway) fn push(&mut self, generation: Generation, observer: RequestObserver) {
        let (events, observer) = (Events::Engine(generation), Some(observer));
        self.requests.push(Some(Request { events, observer }));
    }

    /// Waits for the first event of every request, which is `Accepted` or a refusal.
    pub(in crate::gateway) async fn accepted(&mut self) -> Result<(), ApiError> {
        for index in 0..self.requests.len() {
            let event = poll_fn(|context| match self.poll_one(index, context) {
                Poll::Pending => self.poll_deadline(context).map(Err),
                ready => ready.map(|event| event.unwrap_or_else(|| Err(lost()))),
            });
            event.await?;
        }
        Ok(())
    }

    /// Ends a choice of a prompt as if the model had ended it; its `Finish` event follows as usual.
    pub fn finish(&self, prompt: usize, choice: u32) {
        if let Some(Some(Request { events: Events::Engine(generation), .. })) =
            self.requests.get(prompt)
        {
            generation.finish(choice);
        }
    }

    /// The token counts so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// The next event of any prompt, with the prompt's number; `None` when all have ended without
    /// error. An error is the last item: all running requests are then cancelled.
    pub fn poll_next(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, Event), ApiError>>> {
        let count = self.requests.len();
        let mut live = false;
        for step in 0..count {
            let index = (self.first + step) % count;
            match self.poll_one(index, context) {
                Poll::Ready(None) => {}
                Poll::Pending => live = true,
                Poll::Ready(Some(event)) => {
                    self.first = (index + 1) % count;
                    return Poll::Ready(Some(event.map(|event| (index, event))));
                }
            }
        }
        if !live {
            return Poll::Ready(None);
        }
        self.poll_deadline(context).map(|error| Some(Err(error)))
    }

    /// See [`GenerationStream::poll_next`].
    pub async fn next(&mut self) -> Option<Result<(usize, Event), ApiError>> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_deadline(&mut self, context: &mut Context<'_>) -> Poll<ApiError> {
        self.deadline.as_mut().poll(context).map(|()| {
            self.requests.clear();
            ApiError::timeout(format!(
                "The request took longer than the {} seconds that this server allows.",
                self.limit.as_secs()
            ))
        })
    }

    /// The next event of one prompt; `None` if it has ended.
    fn poll_one(
        &mut self,
        index: usize,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Event, ApiError>>> {
        let Some(request) = &mut self.requests[index] else { return Poll::Ready(None) };
        let event = match request.events.poll_next(context) {
            Poll::Pending => return Poll::Pending,
            // The engine side always sends a final event before it closes the channel.
            Poll::Ready(None) => {
                self.requests.clear();
                return Poll::Ready(Some(Err(lost())));
            }
            Poll::Ready(Some(event)) => event,
        };
        if let Some(observer) = &mut request.observer {
            observe(observer, &event);
        }
        match &event {
            Event::Accepted { prompt_tokens } => self.usage.prompt_tokens += prompt_tokens,
            Event::Started { cached_tokens, .. } => self.usage.cached_tokens += cached_tokens,
            Event::Finish { completion_tokens, .. } => {
                self.usage.completion_tokens += completion_tokens;
            }
            Event::Prompt { .. } | Event::Delta { .. } => {}
            Event::Done { .. } => self.requests[index] = None,
            Event::Failed(error) => {
                let error = error.clone().into();
                self.requests.clear();
                return Poll::Ready(Some(Err(error)));
            }
        }
        Poll::Ready(Some(Ok(event)))
    }
}

impl Events {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        match self {
            // The future may be dropped between polls: the channel keeps the waker.
            Self::Engine(generation) => pin!(generation.next()).poll(context),
            #[cfg(test)]
            Self::Fake(events) => events.poll_recv(context),
        }
    }
}

fn observe(observer: &mut RequestObserver, event: &Event) {
    match event {
        Event::Accepted { prompt_tokens } => observer.accepted(*prompt_tokens),
        Event::Started { cached_tokens, queue_seconds } => {
            observer.started(*cached_tokens, *queue_seconds);
        }
        Event::Prompt { .. } => {}
        Event::Delta { choice, tokens, .. } => observer.tokens(*choice, *tokens),
        Event::Finish { reason, .. } => observer.finish(reason),
        Event::Done { timing } => observer.done(timing),
        Event::Failed(error) => observer.failed(error),
    }
}

fn lost() -> ApiError {
    ApiError::from(EngineError {
        kind: EngineErrorKind::Unavailable,
        message: "the engine went away while the request was running".into(),
        param: None,
    })
}

#[cfg(test)]
pub(crate) mod fake {
    //! Test requests without an engine.

    use super::{Events, GenerationStream, Request};
    use crate::ipc::{Event, FinishReason, Timing, TokenLogprob};
    use std::time::Duration;
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

    /// Requests whose events a test sends, with one sender per prompt. A closed receiver means that
    /// the request was cancelled.
    pub(crate) fn running(
        prompts: usize,
        limit: Duration,
    ) -> (GenerationStream, Vec<UnboundedSender<Event>>) {
        let mut running = GenerationStream::new(limit, None);
        let senders = (0..prompts).map(|_| {
            let (send, events) = unbounded_channel();
            running.requests.push(Some(Request { events: Events::Fake(events), observer: None }));
            send
        });
        let senders = senders.collect();
        (running, senders)
    }

    /// A request that has ended, with all its events waiting.
    pub(crate) fn recorded(events: Vec<Event>) -> GenerationStream {
        let (running, senders) = running(1, Duration::from_secs(60));
        for event in events {
            senders[0].send(event).expect("the receiver lives");
        }
        running
    }

    pub(crate) fn accepted(prompt_tokens: u32, cached_tokens: u32) -> [Event; 2] {
        [Event::Accepted { prompt_tokens }, Event::Started { cached_tokens, queue_seconds: 0.0 }]
    }

    pub(crate) fn delta(choice: u32, text: &str) -> Event {
        Event::Delta { choice, text: text.into(), tokens: 1, logprobs: Vec::new() }
    }

    pub(crate) fn delta_with(choice: u32, text: &str, logprobs: Vec<TokenLogprob>) -> Event {
        Event::Delta { choice, text: text.into(), tokens: 1, logprobs }
    }

    pub(crate) fn finish(choice: u32, reason: FinishReason, completion_tokens: u32) -> Event {
        Event::Finish { choice, reason, completion_tokens }
    }

    pub(crate) fn done() -> Event {
        Event::Done { timing: Timing::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ipc::FinishReason;

    #[tokio::test]
    async fn prompts_are_merged_and_counted() {
        let (mut running, senders) = fake::running(2, Duration::from_secs(60));
        for (index, sender) in senders.iter().enumerate() {
            let cached = index as u32;
            fake::accepted(3, cached).into_iter().for_each(|event| sender.send(event).unwrap());
        }
        running.accepted().await.unwrap();
        for sender in &senders {
            sender.send(fake::delta(0, "x")).unwrap();
            sender.send(fake::finish(0, FinishReason::Stop, 4)).unwrap();
            sender.send(fake::done()).unwrap();
        }
        let mut order = Vec::new();
        while let Some(event) = running.next().await {
            order.push(event.unwrap().0);
        }
        assert_eq!(order, [0, 1, 0, 1, 0, 1, 0, 1]);
        let expected = Usage { prompt_tokens: 6, cached_tokens: 1, completion_tokens: 8 };
        assert_eq!(running.usage(), expected);
    }

    #[tokio::test]
    async fn one_refused_prompt_cancels_the_others() {
        let (mut running, senders) = fake::running(2, Duration::from_secs(60));
        senders[0].send(Event::Accepted { prompt_tokens: 1 }).unwrap();
        senders[1].send(Event::Failed(EngineError::invalid("prompt", "too odd"))).unwrap();
        let error = running.accepted().await.unwrap_err();
        assert_eq!((error.status.as_u16(), error.param.as_deref()), (400, Some("prompt")));
        assert!(senders[0].is_closed());
    }

    #[tokio::test]
    async fn an_engine_that_says_nothing_more_is_an_error() {
        let (mut running, senders) = fake::running(1, Duration::from_secs(60));
        drop(senders);
        assert_eq!(running.next().await.unwrap().unwrap_err().status, 503);
        assert!(running.next().await.is_none());
    }

    #[tokio::test]
    async fn the_time_limit_cancels() {
        let (mut running, senders) = fake::running(1, Duration::from_millis(20));
        assert_eq!(running.next().await.unwrap().unwrap_err().status, 504);
        assert!(senders[0].is_closed());
    }
}
