//! Metrics of engines, collected at the scrape.

use super::{BATCH_BUCKETS, GaugeVec, HistogramVec, IntCounterVec, IntGaugeVec, Maker};
use crate::gateway::supervisor::Engine;
use crate::ipc::Progress;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// State of one engine at one moment.
#[derive(Debug, Clone, Default)]
pub struct EngineSample {
    pub model: String,
    pub progress: Progress,
    /// Batch sizes (rows) of all steps since the previous sample.
    pub batch_sizes: Vec<u32>,
    pub restarts: u64,
    /// Process id of the running process.
    pub pid: Option<u32>,
}

impl EngineSample {
    /// Samples an engine. Every batch size is returned once only; the histogram accumulates them.
    pub fn of(engine: &Engine) -> Self {
        Self {
            model: engine.name().to_owned(),
            progress: engine.progress(),
            batch_sizes: engine.take_batch_sizes(),
            restarts: engine.restarts(),
            pid: engine.pid(),
        }
    }
}

/// Counters of an engine process. They restart at 0 with every process; the exported ones only
/// grow.
#[derive(Debug, Clone, Copy, Default)]
struct Counters {
    steps: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    preemptions: u64,
    drafts: u64,
    drafted: u64,
    accepted: u64,
    restarts: u64,
}

#[derive(Debug)]
pub(super) struct EngineSeries {
    running: IntGaugeVec,
    waiting: IntGaugeVec,
    kv_usage: GaugeVec,
    kv_pages: IntGaugeVec,
    adapters_resident: IntGaugeVec,
    adapters_waiting: IntGaugeVec,
    memory: IntGaugeVec,
    batch: HistogramVec,
    steps: IntCounterVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    preemptions: IntCounterVec,
    drafts: IntCounterVec,
    drafted: IntCounterVec,
    accepted: IntCounterVec,
    restarts: IntCounterVec,
    seen: Mutex<HashMap<String, Counters>>,
}

impl EngineSeries {
    #[rustfmt::skip]
    pub(super) fn new(make: &Maker) -> Self {
        let gauge = |name, help| make.gauge(name, help, &["model"]);
        let counter = |name, help| make.counter(name, help, &["model"]);
        let memory = make.gauge("ingot_process_resident_memory_bytes", "Resident memory, by process: the gateway, or a model's engine.", &["process"]);
        Self {
            running: gauge("ingot_requests_running", "Requests in the engine's batch."),
            waiting: gauge("ingot_requests_waiting", "Requests in the engine's queue."),
            kv_usage: make.ratio("ingot_kv_cache_usage_ratio", "Share of KV pages that running requests hold, 0 to 1.", &["model"]),
            kv_pages: make.gauge("ingot_kv_pages", "KV pages by state: used by requests, cached for reuse, free.", &["model", "state"]),
            adapters_resident: gauge("ingot_adapters_resident", "LoRA adapters loaded in the engine."),
            adapters_waiting: gauge("ingot_adapters_waiting", "LoRA adapters whose requests wait for their turn."),
            memory,
            batch: make.histogram("ingot_batch_size", "Rows in an engine step.", BATCH_BUCKETS),
            steps: counter("ingot_engine_steps_total", "Engine steps."),
            prefix_queries: counter("ingot_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
            prefix_hits: counter("ingot_prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
            preemptions: counter("ingot_preemptions_total", "Requests put back into the queue to free KV pages."),
            drafts: counter("ingot_spec_decode_num_drafts_total", "Drafts checked: one for each request and step with any."),
            drafted: counter("ingot_spec_decode_num_draft_tokens_total", "Tokens drafted and computed."),
            accepted: counter("ingot_spec_decode_num_accepted_tokens_total", "Drafted tokens that were accepted: generated without a step of their own."),
            restarts: counter("ingot_engine_restarts_total", "Engine processes that were started again after a death."),
            seen: Mutex::default(),
        }
    }

    /// Sets the gauges and advances the counters. `names[i]` is the label of `engines[i]`.
    pub(super) fn collect(&self, engines: &[EngineSample], names: &[String]) {
        // Gauges of unloaded models are removed.
        for gauge in [&self.running, &self.waiting, &self.kv_pages, &self.memory] {
            gauge.reset();
        }
        self.adapters_resident.reset();
        self.adapters_waiting.reset();
        self.kv_usage.reset();
        self.set_memory("gateway", None);
        for (engine, name) in engines.iter().zip(names) {
            self.collect_one(engine, name);
        }
    }

    fn collect_one(&self, engine: &EngineSample, name: &str) {
        let label = &[name];
        let progress = &engine.progress;
        self.running.with_label_values(label).set(progress.running.into());
        self.waiting.with_label_values(label).set(progress.waiting.into());
        self.adapters_resident.with_label_values(label).set(progress.adapters_resident.into());
        self.adapters_waiting.with_label_values(label).set(progress.adapters_waiting.into());
        let total = progress.kv_pages_total;
        let free = total.saturating_sub(progress.kv_pages_used + progress.kv_pages_cached);
        let usage = f64::from(progress.kv_pages_used) / f64::from(total.max(1));
        self.kv_usage.with_label_values(label).set(usage);
        for (state, pages) in
            [("used", progress.kv_pages_used), ("cached", progress.kv_pages_cached), ("free", free)]
        {
            self.kv_pages.with_label_values(&[name, state]).set(pages.into());
        }
        let batch = self.batch.with_label_values(label);
        engine.batch_sizes.iter().for_each(|&rows| batch.observe(rows.into()));
        if let Some(pid) = engine.pid {
            self.set_memory(&format!("engine:{name}"), Some(pid));
        }
        self.advance(engine, name);
    }

    fn advance(&self, engine: &EngineSample, name: &str) {
        let progress = &engine.progress;
        let now = Counters {
            steps: progress.steps,
            prefix_queries: progress.prefix_queries,
            prefix_hits: progress.prefix_hits,
            preemptions: progress.preemptions,
            drafts: progress.drafts,
            drafted: progress.drafted_tokens,
            accepted: progress.accepted_tokens,
            restarts: engine.restarts,
        };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let before = seen.insert(name.to_owned(), now).unwrap_or_default();
        // Every counter of a process starts at 0. Fewer steps than before mean a new process.
        let before = if now.steps < before.steps {
            Counters { restarts: before.restarts, ..Counters::default() }
        } else {
            before
        };
        let grow = |series: &IntCounterVec, now: u64, before: u64| {
            // A value below the previous one means another engine under the same name.
            let grown = if now < before { now } else { now - before };
            series.with_label_values(&[name]).inc_by(grown);
        };
        grow(&self.steps, now.steps, before.steps);
        grow(&self.prefix_queries, now.prefix_queries, before.prefix_queries);
        grow(&self.prefix_hits, now.prefix_hits, before.prefix_hits);
        grow(&self.preemptions, now.preemptions, before.preemptions);
        grow(&self.drafts, now.drafts, before.drafts);
        grow(&self.drafted, now.drafted, before.drafted);
        grow(&self.accepted, now.accepted, before.accepted);
        grow(&self.restarts, now.restarts, before.restarts);
    }

    fn set_memory(&self, process: &str, pid: Option<u32>) {
        if let Some(bytes) = resident_bytes(pid) {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            self.memory.with_label_values(&[process]).set(bytes);
        }
    }
}

/// Resident bytes of a process, or of this process: second field of `/proc/PID/statm`, in pages.
fn resident_bytes(pid: Option<u32>) -> Option<u64> {
    let path = pid.map_or("/proc/self/statm".to_owned(), |pid| format!("/proc/{pid}/statm"));
    let text = std::fs::read_to_string(path).ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}
