//! Prometheus series with the prefix `ingot_`. Names carry units. Semantics and buckets are those
//! of vLLM's series of the same name (`vllm/v1/metrics/loggers.py`), so that vLLM dashboards can be
//! translated.
//!
//! A [`RequestObserver`] counts request events as they happen; engine state is collected at the
//! scrape ([`Metrics::render`]). The set of label values is bounded: model names past
//! [`MAX_MODELS`] are counted as `other`.

mod collect;
mod jobs;
mod observer;

pub use collect::EngineSample;
pub use jobs::{JobSample, JobSamples};
pub use observer::RequestObserver;

use crate::isa::isa;
use collect::EngineSeries;
use jobs::JobSeries;
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

/// Maximum number of distinct values of the label `model`.
const MAX_MODELS: usize = 256;
/// Label value that all further models share.
const OTHER: &str = "other";

/// From 1 ms to 45 min, in seconds.
const TTFT_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const INTER_TOKEN_BUCKETS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const BATCH_BUCKETS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// All series of the gateway.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: RequestSeries,
    engines: EngineSeries,
    jobs: JobSeries,
    rejected: IntCounterVec,
    published: IntCounterVec,
    /// Bytes of the disk of the data folder: free, and all.
    disk: [IntGaugeVec; 2],
    models: Mutex<HashSet<String>>,
    /// Held during a scrape, which sets gauges before it reads them.
    scrape: Mutex<()>,
}

/// Reasons why the gateway refuses requests: values of the label `reason` of
/// `ingot_requests_rejected_total`.
const REASONS: [&str; 9] = [
    "concurrency_limit_exceeded",
    "context_length",
    "draining",
    "host_not_allowed",
    "queue_full",
    "rate_limit_exceeded",
    "starting",
    "too_many_connections",
    "unauthorized",
];

/// Series of requests; every series has the label `model`.
#[derive(Debug)]
struct RequestSeries {
    queue: HistogramVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    end_to_end: HistogramVec,
    prefill: HistogramVec,
    decode: HistogramVec,
    prompt_tokens: IntCounterVec,
    cached_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    success: IntCounterVec,
    errors: IntCounterVec,
}

impl Metrics {
    /// Registers every series. A name that the registry refuses is a bug.
    pub fn new() -> Self {
        let make = Maker(Registry::new());
        let requests = RequestSeries::new(&make);
        let engines = EngineSeries::new(&make);
        let jobs = JobSeries::new(&make);
        let rejected = make.counter(
            "ingot_requests_rejected_total",
            "Requests refused by the gateway, or for lack of room in an engine, by reason.",
            &["reason"],
        );
        let published = make.counter(
            "ingot_published_requests_total",
            "Requests of a published name, by the model or adapter that served them.",
            &["name", "model"],
        );
        let disk = [
            make.gauge(
                "ingot_data_disk_free_bytes",
                "Free bytes of the disk of the data folder.",
                &[],
            ),
            make.gauge("ingot_data_disk_size_bytes", "Size of the disk of the data folder.", &[]),
        ];
        for reason in REASONS {
            rejected.with_label_values(&[reason]);
        }
        let build = make.gauge(
            "ingot_build_info",
            "1, labelled with the version and the instruction set of the kernels.",
            &["version", "isa"],
        );
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), isa().name()]).set(1);
        Self {
            registry: make.0,
            requests,
            engines,
            jobs,
            rejected,
            published,
            disk,
            models: Mutex::default(),
            scrape: Mutex::default(),
        }
    }

    /// Starts the observation of one request for the loaded model `model`.
    pub fn observe(&self, model: &str) -> RequestObserver {
        let model = self.bounded(model);
        self.requests.start(model);
        RequestObserver::new(&self.requests, &self.rejected, model)
    }

    /// Counts a refusal. Reasons are the closed set [`REASONS`], never client text.
    pub fn rejected(&self, reason: &str) {
        debug_assert!(REASONS.contains(&reason), "{reason} is not among the known reasons");
        self.rejected.with_label_values(&[reason]).inc();
    }

    /// Counts a request of a published name.
    pub fn published(&self, name: &str, model: &str) {
        let labels = [self.bounded(name), self.bounded(model)];
        self.published.with_label_values(&labels).inc();
    }

    /// Sets the free bytes and the size of the disk of the data folder.
    pub fn disk(&self, bytes: [u64; 2]) {
        for (gauge, bytes) in self.disk.iter().zip(bytes) {
            gauge.with_label_values::<&str>(&[]).set(i64::try_from(bytes).unwrap_or(i64::MAX));
        }
    }

    /// Renders the Prometheus text, with the present state of engines and jobs.
    pub fn render(&self, engines: &[EngineSample], jobs: &JobSamples) -> String {
        let _turn = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let names = engines.iter().map(|engine| self.bounded(&engine.model).to_owned());
        let names = names.collect::<Vec<_>>();
        names.iter().for_each(|name| self.requests.start(name));
        self.engines.collect(engines, &names);
        self.jobs.collect(jobs);
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_else(|error| {
            tracing::error!("metrics cannot be written: {error}");
            String::new()
        })
    }

    fn bounded<'a>(&self, model: &'a str) -> &'a str {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if models.contains(model) {
            return model;
        }
        if models.len() >= MAX_MODELS {
            return OTHER;
        }
        models.insert(model.to_owned());
        model
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl RequestSeries {
    /// Initializes a model's counters to 0, so that `increase()` sees the first event.
    fn start(&self, model: &str) {
        for kind in observer::ERROR_KINDS {
            self.errors.with_label_values(&[model, kind]);
        }
        for reason in ["stop", "length", "abort"] {
            self.success.with_label_values(&[model, reason]);
        }
        for counter in [&self.prompt_tokens, &self.cached_tokens, &self.generation_tokens] {
            counter.with_label_values(&[model]);
        }
    }

    #[rustfmt::skip]
    fn new(make: &Maker) -> Self {
        let times = |name, help| make.histogram(name, help, REQUEST_BUCKETS);
        let counter = |name, help| make.counter(name, help, &["model"]);
        Self {
            queue: times("ingot_request_queue_seconds", "Time that requests waited for their first step."),
            first_token: make.histogram("ingot_time_to_first_token_seconds", "Time from a request's arrival to its first token.", TTFT_BUCKETS),
            inter_token: make.histogram("ingot_inter_token_latency_seconds", "Time between two tokens of one choice.", INTER_TOKEN_BUCKETS),
            end_to_end: times("ingot_e2e_request_latency_seconds", "Time from a request's arrival to its end."),
            prefill: times("ingot_request_prefill_seconds", "Time from a request's first step to its first token."),
            decode: times("ingot_request_decode_seconds", "Time from a request's first token to its last."),
            prompt_tokens: counter("ingot_prompt_tokens_total", "Prompt tokens of started requests, cached ones included."),
            cached_tokens: counter("ingot_prompt_tokens_cached_total", "Prompt tokens that were found in the prefix cache."),
            generation_tokens: counter("ingot_generation_tokens_total", "Tokens generated."),
            success: make.counter("ingot_request_success_total", "Choices that ended, by reason; `abort` is a client that went away.", &["model", "finish_reason"]),
            errors: make.counter("ingot_request_errors_total", "Requests that an engine refused or failed, by kind.", &["model", "kind"]),
        }
    }
}

/// Creates and registers series. Names are constants, so a refused name is a bug.
struct Maker(Registry);

impl Maker {
    fn register<C: prometheus::core::Collector + Clone + 'static>(
        &self,
        made: prometheus::Result<C>,
    ) -> C {
        let made = made.expect("the names of our series are valid");
        self.0.register(Box::new(made.clone())).expect("the names of our series are distinct");
        made
    }

    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.register(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn ratio(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.register(HistogramVec::new(options, &["model"]))
    }
}

#[cfg(test)]
mod tests;
