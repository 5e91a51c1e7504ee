//! One request's way through the series.

use super::{Histogram, RequestSeries};
use crate::ipc::{EngineError, EngineErrorKind, FinishReason, Timing};
use prometheus::{IntCounter, IntCounterVec};
use std::time::Instant;

/// The label `kind` of `ingot_request_errors_total`.
pub(super) const ERROR_KINDS: [&str; 5] =
    ["invalid", "context_length", "overloaded", "unavailable", "internal"];

/// Follows one request from its arrival; dropping it observes the end-to-end latency.
///
/// Feed it the engine's events in order. A request that is dropped while it runs (its client went
/// away) counts as `abort`.
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
    /// When each choice's latest token came, by choice.
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

    /// The prompt fits.
    pub fn accepted(&mut self, prompt_tokens: u32) {
        self.prompt = prompt_tokens;
    }

    /// The first step is about to run.
    pub fn started(&mut self, cached_tokens: u32, queue_seconds: f32) {
        self.queue.observe(f64::from(queue_seconds));
        self.prompt_tokens.inc_by(u64::from(self.prompt));
        self.cached_tokens.inc_by(u64::from(cached_tokens));
    }

    /// `count` tokens of a choice have come.
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
        // The API bounds choices far below this; a wrong number from an engine must not allocate.
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

    /// A choice has ended.
    pub fn finish(&mut self, reason: &FinishReason) {
        let reason = match reason {
            FinishReason::Stop | FinishReason::StopString(_) => "stop",
            FinishReason::Length => "length",
        };
        self.success.with_label_values(&[self.model.as_str(), reason]).inc();
    }

    /// The request has ended well.
    pub fn done(&mut self, timing: &Timing) {
        self.over = true;
        self.prefill.observe(f64::from(timing.prefill_seconds));
        self.decode.observe(f64::from(timing.decode_seconds));
    }

    /// The engine refused the request, or failed it.
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
