//! Metrics of one request.

use super::{Histogram, RequestSeries};
use crate::ipc::{EngineError, EngineErrorKind, FinishReason, Timing};
use prometheus::{IntCounter, IntCounterVec};
use std::time::Instant;

/// Values of the label `kind` of `ingot_request_errors_total`.
pub(super) const ERROR_KINDS: [&str; 5] =
    ["invalid", "context_length", "overloaded", "unavailable", "internal"];

/// Observes one request from its arrival; dropping it records the end-to-end latency.
///
/// The caller passes the engine's events in order. A request that is dropped while it runs (its
/// client disconnected) counts as `abort`.
#[derive(Debug)]
pub struct RequestObserver {
    model: String,
    arrived: Instant,
    queue: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    end_to_end: Histogram,
    prefill: Histogram,
    decode: Histogram,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    generation_tokens: IntCounter,
    success: IntCounterVec,
    errors: IntCounterVec,
    rejected: IntCounterVec,
    prompt: u32,
    /// Arrival time of the latest token, by choice.
    latest: Vec<Option<Instant>>,
    seen_token: bool,
    over: bool,
}

impl RequestObserver {
    pub(super) fn new(series: &RequestSeries, rejected: &IntCounterVec, model: &str) -> Self {
        let label = &[model];
        Self {
            model: model.to_owned(),
            arrived: Instant::now(),
            queue: series.queue.with_label_values(label),
            first_token: series.first_token.with_label_values(label),
            inter_token: series.inter_token.with_label_values(label),
            end_to_end: series.end_to_end.with_label_values(label),
            prefill: series.prefill.with_label_values(label),
            decode: series.decode.with_label_values(label),
            prompt_tokens: series.prompt_tokens.with_label_values(label),
            cached_tokens: series.cached_tokens.with_label_values(label),
            generation_tokens: series.generation_tokens.with_label_values(label),
            success: series.success.clone(),
            errors: series.errors.clone(),
            rejected: rejected.clone(),
            prompt: 0,
            latest: Vec::new(),
            seen_token: false,
            over: false,
        }
    }

    /// Records that the engine accepted the prompt.
    pub fn accepted(&mut self, prompt_tokens: u32) {
        self.prompt = prompt_tokens;
    }

    /// Records that the first step is about to run.
    pub fn started(&mut self, cached_tokens: u32, queue_seconds: f32) {
        self.queue.observe(f64::from(queue_seconds));
        self.prompt_tokens.inc_by(u64::from(self.prompt));
        self.cached_tokens.inc_by(u64::from(cached_tokens));
    }

    /// Records that `count` tokens of a choice have arrived.
    pub fn tokens(&mut self, choice: u32, count: u32) {
        self.tokens_at(choice, count, Instant::now());
    }

    pub(super) fn tokens_at(&mut self, choice: u32, count: u32, now: Instant) {
        if count == 0 {
            return;
        }
        self.generation_tokens.inc_by(u64::from(count));
        if !self.seen_token {
            self.seen_token = true;
            self.first_token.observe(seconds(self.arrived, now));
        }
        let choice = choice as usize;
        // The API bounds choices far below 1024; a wrong number from an engine must not allocate.
        if choice >= 1024 {
            return;
        }
        if self.latest.len() <= choice {
            self.latest.resize(choice + 1, None);
        }
        if let Some(before) = self.latest[choice].replace(now) {
            let each = seconds(before, now) / f64::from(count);
            (0..count.min(64)).for_each(|_| self.inter_token.observe(each));
        }
    }

    /// Records the end of a choice.
    pub fn finish(&mut self, reason: &FinishReason) {
        let reason = match reason {
            FinishReason::Stop | FinishReason::StopString(_) => "stop",
            FinishReason::Length => "length",
        };
        self.success.with_label_values(&[self.model.as_str(), reason]).inc();
    }

    /// Records the end of the request without error.
    pub fn done(&mut self, timing: &Timing) {
        self.over = true;
        self.prefill.observe(f64::from(timing.prefill_seconds));
        self.decode.observe(f64::from(timing.decode_seconds));
    }

    /// Records that the engine refused the request or that the request failed.
    pub fn failed(&mut self, error: &EngineError) {
        self.over = true;
        let kind = match error.kind {
            EngineErrorKind::Invalid => "invalid",
            EngineErrorKind::ContextLength => "context_length",
            EngineErrorKind::Overloaded => "overloaded",
            EngineErrorKind::Unavailable => "unavailable",
            EngineErrorKind::Internal => "internal",
        };
        self.errors.with_label_values(&[self.model.as_str(), kind]).inc();
        match error.kind {
            EngineErrorKind::Overloaded => {
                self.rejected.with_label_values(&["queue_full"]).inc();
            }
            EngineErrorKind::ContextLength => {
                self.rejected.with_label_values(&["context_length"]).inc();
            }
            _ => {}
        }
    }
}

impl Drop for RequestObserver {
    fn drop(&mut self) {
        if !self.over {
            self.success.with_label_values(&[self.model.as_str(), "abort"]).inc();
        }
        self.end_to_end.observe(self.arrived.elapsed().as_secs_f64());
    }
}

fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}
