//! Sends events to the gateway: one frame per step, and a periodic progress report.

use super::kv::KvCacheManager;
use super::scheduler::Scheduler;
use super::sequence::{RequestFacts, SeqKey};
use crate::ipc::{
    EngineError, Event, FinishReason, FromEngine, Progress, Reply, RequestId, Timing, TokenLogprob,
};
use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

const REPORT_EVERY: Duration = Duration::from_millis(50);
/// In seconds. The watchdog tolerates any step up to this long without an announcement.
const ANNOUNCED: f32 = 1.0;

pub(super) struct OutputProcessor {
    frames: Sender<FromEngine>,
    events: Vec<(RequestId, Event)>,
    requests: HashMap<RequestId, InFlight>,
    reported: Instant,
    was_idle: bool,
    /// Running sequences, waiting sequences, held pages and adapters in the last report.
    shown: [usize; 4],
    progress: Progress,
}

/// The progress of one request.
struct InFlight {
    facts: Arc<RequestFacts>,
    live: u32,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    cached: usize,
    completion: usize,
}

impl OutputProcessor {
    pub(super) fn new(frames: Sender<FromEngine>) -> Self {
        Self {
            frames,
            events: Vec::new(),
            requests: HashMap::new(),
            reported: Instant::now(),
            was_idle: false,
            shown: [0; 4],
            progress: Progress::default(),
        }
    }

    pub(super) fn accepted(&mut self, facts: &Arc<RequestFacts>) {
        let in_flight = InFlight {
            facts: facts.clone(),
            live: facts.choices,
            started: None,
            first_token: None,
            last_token: None,
            cached: 0,
            completion: 0,
        };
        self.requests.insert(facts.id, in_flight);
        self.push(facts.id, Event::Accepted { prompt_tokens: facts.prompt_len as u32 });
    }

    /// Records that the request has its pages; `cached` prompt tokens need not be computed. Only
    /// the first call counts: a preempted request is admitted again.
    pub(super) fn started(&mut self, request: RequestId, cached: usize) {
        let Some(in_flight) = self.requests.get_mut(&request) else { return };
        if in_flight.started.is_some() {
            return;
        }
        in_flight.started = Some(Instant::now());
        in_flight.cached = cached.min(in_flight.facts.prompt_len);
        let cached_tokens = in_flight.cached as u32;
        let queue_seconds = in_flight.facts.arrived.elapsed().as_secs_f32();
        self.push(request, Event::Started { cached_tokens, queue_seconds });
    }

    pub(super) fn prompt(&mut self, request: RequestId, text: String, logprobs: Vec<TokenLogprob>) {
        self.push(request, Event::Prompt { text, logprobs });
    }

    /// Queues a token of a choice; `text` may be empty while text is held back. All tokens of a
    /// choice in one step are merged into one event.
    pub(super) fn delta(&mut self, key: SeqKey, text: String, logprobs: Vec<TokenLogprob>) {
        let now = Instant::now();
        if let Some(in_flight) = self.requests.get_mut(&key.request) {
            in_flight.first_token.get_or_insert(now);
            in_flight.last_token = Some(now);
        }
        if let Some((request, Event::Delta { choice, text: before, tokens, logprobs: scores })) =
            self.events.last_mut()
            && (*request, *choice) == (key.request, key.choice)
        {
            before.push_str(&text);
            *tokens += 1;
            scores.extend(logprobs);
            return;
        }
        self.push(key.request, Event::Delta { choice: key.choice, text, tokens: 1, logprobs });
    }

    /// Queues text that was held back until the output ended; it carries no token of its own.
    pub(super) fn tail(&mut self, key: SeqKey, text: String, logprobs: Vec<TokenLogprob>) {
        self.push(key.request, Event::Delta { choice: key.choice, text, tokens: 0, logprobs });
    }

    /// Finishes a choice. When its last choice finishes, the request is done.
    pub(super) fn finish(&mut self, key: SeqKey, reason: FinishReason, completion_tokens: usize) {
        self.push(
            key.request,
            Event::Finish {
                choice: key.choice,
                reason,
                completion_tokens: completion_tokens as u32,
            },
        );
        let Some(in_flight) = self.requests.get_mut(&key.request) else { return };
        in_flight.completion += completion_tokens;
        in_flight.live = in_flight.live.saturating_sub(1);
        if in_flight.live == 0 {
            let timing = in_flight.timing();
            self.requests.remove(&key.request);
            self.push(key.request, Event::Done { timing });
        }
    }

    pub(super) fn failed(&mut self, request: RequestId, error: EngineError) {
        self.requests.remove(&request);
        self.push(request, Event::Failed(error));
    }

    /// Drops a request whose client has disconnected.
    pub(super) fn forget(&mut self, request: RequestId) {
        self.requests.remove(&request);
    }

    pub(super) fn reply(&mut self, call: u64, result: Result<Reply, EngineError>) {
        self.send(FromEngine::Reply { call, result });
    }

    /// Sends the events of this step to the writer thread.
    pub(super) fn flush(&mut self) {
        if !self.events.is_empty() {
            let events = std::mem::take(&mut self.events);
            self.send(FromEngine::Events(events));
        }
    }

    pub(super) fn stepped(&mut self, rows: usize, decoding: usize, prefill: usize) {
        self.progress.steps += 1;
        self.progress.batch_sizes.push(rows as u32);
        self.progress.decode_tokens += decoding as u64;
        self.progress.prefill_tokens += prefill as u64;
    }

    /// Sends a snapshot every 50 ms, when the engine becomes idle, and when the reported counts
    /// change while it is idle (a paused request whose client leaves).
    pub(super) fn report(
        &mut self,
        scheduler: &Scheduler,
        kv: &KvCacheManager,
        adapters: usize,
        idle: bool,
    ) {
        self.flush();
        let shown = [scheduler.running.len(), scheduler.waiting.len(), kv.held_pages(), adapters];
        let due = match idle {
            true => !self.was_idle || shown != self.shown,
            false => self.reported.elapsed() >= REPORT_EVERY,
        };
        self.was_idle = idle;
        if !due {
            return;
        }
        self.shown = shown;
        self.reported = Instant::now();
        let cached = kv.cached_pages();
        let progress = &mut self.progress;
        progress.step_seconds = scheduler.longest_step();
        progress.running = scheduler.running.len() as u32;
        progress.waiting = scheduler.waiting.len() as u32;
        progress.paused = scheduler.paused() as u32;
        progress.kv_pages_total = kv.total_pages() as u32;
        progress.kv_pages_cached = cached as u32;
        progress.kv_pages_used = (kv.total_pages() - kv.free_pages() - cached) as u32;
        progress.prefix_queries = scheduler.prefix_queries;
        progress.prefix_hits = scheduler.prefix_hits;
        progress.preemptions = scheduler.preemptions;
        progress.drafts = scheduler.drafts;
        progress.drafted_tokens = scheduler.drafted_tokens;
        progress.accepted_tokens = scheduler.accepted_tokens;
        progress.draft_model_tokens = scheduler.draft_model_tokens;
        progress.draft_model_accepted = scheduler.draft_model_accepted;
        progress.adapters_resident = adapters as u32;
        progress.adapters_waiting = scheduler.adapters_waiting() as u32;
        let snapshot = progress.clone();
        progress.batch_sizes.clear();
        self.send(FromEngine::Progress(snapshot));
    }

    /// Announces to the gateway's watchdog a step that may take longer than any before.
    pub(super) fn expect(&mut self, seconds: f32) {
        if seconds > self.progress.step_seconds.max(ANNOUNCED) {
            self.progress.step_seconds = seconds;
            let snapshot = self.progress.clone();
            self.progress.batch_sizes.clear();
            self.send(FromEngine::Progress(snapshot));
        }
    }

    fn push(&mut self, request: RequestId, event: Event) {
        self.events.push((request, event));
    }

    fn send(&self, frame: FromEngine) {
        // The writer ends only after the gateway has closed; then this process is about to end.
        let _ = self.frames.send(frame);
    }
}

impl InFlight {
    fn timing(&self) -> Timing {
        let since = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.duration_since(from).as_secs_f32(),
            _ => 0.0,
        };
        Timing {
            queue_seconds: since(Some(self.facts.arrived), self.started),
            prefill_seconds: since(self.started, self.first_token),
            decode_seconds: since(self.first_token, self.last_token),
            prompt_tokens: self.facts.prompt_len as u32,
            cached_tokens: self.cached as u32,
            completion_tokens: self.completion as u32,
        }
    }
}
