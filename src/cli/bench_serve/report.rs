//! From samples to numbers, and how they are shown.

use super::load::Outcome;
use super::prompts::Prompts;
use super::{BenchServeOptions, Endpoint};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// A distribution of times, in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Times {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Times {
    pub(super) fn of(times: impl IntoIterator<Item = Duration>) -> Self {
        let mut ms: Vec<f64> = times.into_iter().map(|time| time.as_secs_f64() * 1e3).collect();
        ms.sort_by(f64::total_cmp);
        let Some(&max) = ms.last() else { return Self::default() };
        // Nearest rank: the smallest value that at least this share does not exceed.
        let rank =
            |share: f64| ms[((share * ms.len() as f64).ceil() as usize).clamp(1, ms.len()) - 1];
        Self {
            count: ms.len(),
            mean: ms.iter().sum::<f64>() / ms.len() as f64,
            p50: rank(0.5),
            p90: rank(0.9),
            p99: rank(0.99),
            max,
        }
    }

    fn row(&self, name: &str) -> String {
        format!(
            "{name:<28}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>10.2}\n",
            self.mean, self.p50, self.p90, self.p99, self.max
        )
    }
}

const TIMES_HEADER: &str =
    "                                  mean       p50       p90       p99       max\n";

/// One repetition.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Run {
    pub seconds: f64,
    pub succeeded: usize,
    /// Failed requests by kind.
    pub errors: BTreeMap<String, usize>,
    /// The first message of each kind.
    pub messages: BTreeMap<String, String>,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    pub output_tokens_per_second: f64,
    pub total_tokens_per_second: f64,
    pub requests_per_second: f64,
    pub time_to_first_token_ms: Times,
    pub inter_token_latency_ms: Times,
    /// Mean time per output token after the first, of each request.
    pub time_per_output_token_ms: Times,
    pub end_to_end_ms: Times,
}

impl Run {
    pub(super) fn summarize(outcomes: &[Outcome], wall: Duration) -> Self {
        let mut run = Self { seconds: wall.as_secs_f64(), ..Self::default() };
        for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            *run.errors.entry(error.kind()).or_default() += 1;
            run.messages.entry(error.kind()).or_insert_with(|| error.to_string());
        }
        let samples: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).collect();
        run.succeeded = samples.len();
        run.prompt_tokens = samples.iter().map(|sample| sample.prompt_tokens).sum();
        run.cached_tokens = samples.iter().map(|sample| sample.cached_tokens).sum();
        run.output_tokens = samples.iter().map(|sample| sample.output_tokens).sum();
        let seconds = run.seconds.max(1e-9);
        run.output_tokens_per_second = run.output_tokens as f64 / seconds;
        run.total_tokens_per_second = (run.prompt_tokens + run.output_tokens) as f64 / seconds;
        run.requests_per_second = run.succeeded as f64 / seconds;
        run.time_to_first_token_ms = Times::of(samples.iter().map(|sample| sample.first_token));
        run.inter_token_latency_ms = Times::of(samples.iter().flat_map(|sample| sample.gaps()));
        let longer = samples.iter().filter(|sample| sample.output_tokens > 1);
        run.time_per_output_token_ms = Times::of(longer.map(|sample| {
            (sample.total - sample.first_token) / (sample.output_tokens - 1).min(1 << 30) as u32
        }));
        run.end_to_end_ms = Times::of(samples.iter().map(|sample| sample.total));
        run
    }

    fn table(&self) -> String {
        let mut text = String::new();
        let failed: usize = self.errors.values().sum();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<28}{value}");
        };
        line("requests", format!("{} ok, {failed} failed, {:.2} s", self.succeeded, self.seconds));
        line("output tokens/s", format!("{:.2}", self.output_tokens_per_second));
        line("total tokens/s", format!("{:.2}", self.total_tokens_per_second));
        line("requests/s", format!("{:.3}", self.requests_per_second));
        line(
            "tokens",
            format!(
                "{} prompt ({} cached), {} output",
                self.prompt_tokens, self.cached_tokens, self.output_tokens
            ),
        );
        text += TIMES_HEADER;
        text += &self.time_to_first_token_ms.row("time to first token (ms)");
        text += &self.inter_token_latency_ms.row("inter-token latency (ms)");
        text += &self.time_per_output_token_ms.row("time per output token (ms)");
        text += &self.end_to_end_ms.row("end to end (ms)");
        for (kind, count) in &self.errors {
            let _ = writeln!(text, "{count} × {kind}: {}", self.messages[kind]);
        }
        text
    }
}

/// What one long prompt did to the running streams.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct ProbeRun {
    pub streams: usize,
    /// From sending the long prompt to its first token.
    pub probe_time_to_first_token_ms: f64,
    pub probe_prompt_tokens: u64,
    /// The streams' inter-token latency before the long prompt arrived, and while it was read.
    pub before_ms: Times,
    pub during_ms: Times,
    pub error: Option<String>,
}

/// Everything that was measured.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Report {
    pub settings: BTreeMap<&'static str, serde_json::Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<Run>,
    /// The run of median output throughput.
    pub median: Option<Run>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub probes: Vec<ProbeRun>,
    /// The probe of median p99.
    pub median_probe: Option<ProbeRun>,
}

impl Report {
    pub(super) fn new(options: &BenchServeOptions, models: &[String], prompts: &Prompts) -> Self {
        let endpoint = match options.endpoint {
            Endpoint::Chat => "chat",
            Endpoint::Completions => "completions",
        };
        let settings = [
            ("url", options.url.as_str().into()),
            ("models", models.into()),
            ("endpoint", endpoint.into()),
            ("concurrency", options.concurrency.get().into()),
            ("requests", options.requests().into()),
            ("rate", options.rate.into()),
            ("arrive_together", options.arrive_together.into()),
            ("prompt_words", prompts.words.into()),
            ("shared_prefix_words", prompts.shared_words.into()),
            ("shared_prefix_share", options.shared_prefix_share.into()),
            ("tokens_per_word", prompts.tokens_per_word.into()),
            ("output_tokens", options.output_tokens.into()),
            ("ignore_eos", options.ignore_eos.into()),
            ("probe_prompt_tokens", options.probe_prompt_tokens.into()),
            ("seed", options.seed.into()),
        ];
        Self { settings: settings.into(), ..Self::default() }
    }

    /// Picks the medians; called once, after the last run.
    pub(super) fn finish(&mut self) {
        let middle = |count: usize| count.saturating_sub(1) / 2;
        let mut runs: Vec<&Run> = self.runs.iter().collect();
        runs.sort_by(|a, b| a.output_tokens_per_second.total_cmp(&b.output_tokens_per_second));
        self.median = runs.get(middle(runs.len())).copied().cloned();
        let mut probes: Vec<&ProbeRun> =
            self.probes.iter().filter(|probe| probe.error.is_none()).collect();
        probes.sort_by(|a, b| a.during_ms.p99.total_cmp(&b.during_ms.p99));
        self.median_probe = probes.get(middle(probes.len())).copied().cloned();
    }

    pub(super) fn any_success(&self) -> bool {
        self.runs.iter().any(|run| run.succeeded > 0)
            || self.probes.iter().any(|probe| probe.error.is_none())
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        if self.runs.len() > 1 {
            for (index, run) in self.runs.iter().enumerate() {
                let _ = writeln!(
                    text,
                    "run {}: {:.2} output tokens/s, {:.2} total tokens/s, {:.2} s",
                    index + 1,
                    run.output_tokens_per_second,
                    run.total_tokens_per_second,
                    run.seconds
                );
            }
            let _ = writeln!(text, "median of {} runs:", self.runs.len());
        }
        if let Some(run) = &self.median {
            text += &run.table();
        }
        for probe in &self.probes {
            if let Some(error) = &probe.error {
                let _ = writeln!(text, "The probe failed: {error}.");
            }
        }
        if let Some(probe) = &self.median_probe {
            let _ = writeln!(
                text,
                "{} running streams; a prompt of {} tokens arrives, first token after {:.0} ms \
                 (median of {} probes)",
                probe.streams,
                probe.probe_prompt_tokens,
                probe.probe_time_to_first_token_ms,
                self.probes.len()
            );
            text += TIMES_HEADER;
            text += &probe.before_ms.row("inter-token before (ms)");
            text += &probe.during_ms.row("inter-token during (ms)");
        }
        text
    }
}
