//! `ingot bench serve`: load for any OpenAI-compatible server, and what it made of it.
//!
//! Closed loop (`--concurrency` clients, each sends when its last answer has ended), open loop
//! (`--rate` requests per second, Poisson arrivals), or a probe (`--probe-prompt-tokens`: what a long
//! prompt does to the streams that are running). Prompts are random words from a seed, different in
//! every request and every repetition, except for the prefix that they are told to share.

mod client;
mod load;
mod probe;
mod prompts;
mod report;
#[cfg(test)]
mod tests;

use super::CliError;
use super::http::Server;
use crate::config::Secret;
use prompts::Prompts;
use report::Report;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Options of `ingot bench serve`.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchServeOptions {
    /// The server, such as http://127.0.0.1:8000
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Model to ask for [default: the first that the server lists]
    #[arg(long)]
    pub model: Option<String>,
    /// Names to use as the model in turn (LoRA adapters)
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub adapters: Vec<String>,
    /// Key to send
    #[arg(long, env = "INGOT_BENCH_API_KEY", hide_env_values = true)]
    pub api_key: Option<Secret>,
    /// Endpoint to measure
    #[arg(long, value_enum, default_value_t = Endpoint::Chat)]
    pub endpoint: Endpoint,
    /// Clients that ask at the same time
    #[arg(long, default_value = "8", value_name = "N")]
    pub concurrency: NonZeroU32,
    /// Requests in all [default: four for each client]
    #[arg(long, value_name = "N")]
    pub requests: Option<NonZeroU32>,
    /// Requests per second, arriving at random (open loop); no bound on concurrency then
    #[arg(long, value_name = "PER_SECOND", conflicts_with = "arrive_together")]
    pub rate: Option<f64>,
    /// Send in waves of --concurrency requests that start at the same moment
    #[arg(long)]
    pub arrive_together: bool,
    /// Words of a prompt, the shared prefix not counted
    #[arg(long, default_value_t = 80, value_name = "N", conflicts_with = "prompt_tokens")]
    pub prompt_words: u32,
    /// Tokens of a prompt (the server's own count, from a trial request) instead of words
    #[arg(long, value_name = "N")]
    pub prompt_tokens: Option<u32>,
    /// Words that prompts begin with in common
    #[arg(long, default_value_t = 0, value_name = "N", conflicts_with = "shared_prefix_tokens")]
    pub shared_prefix_words: u32,
    /// Tokens that prompts begin with in common, instead of words
    #[arg(long, value_name = "N")]
    pub shared_prefix_tokens: Option<u32>,
    /// Share of the requests that have the common prefix, 0 to 1
    #[arg(long, default_value_t = 1.0, value_name = "SHARE")]
    pub shared_prefix_share: f64,
    /// Tokens to ask for (max_tokens)
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub output_tokens: u32,
    /// Ask for all of them, past the end of the answer
    #[arg(long)]
    pub ignore_eos: bool,
    /// Requests to send first, unmeasured
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub warmup: u32,
    /// Measure this often; the report is the run of median throughput
    #[arg(long, default_value = "1", value_name = "N")]
    pub repeat: NonZeroU32,
    /// Seed of prompts and arrivals
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Seconds after which a request counts as failed
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub timeout: u64,
    /// Instead: run --concurrency streams, send one prompt of this many tokens after 2 s, and report
    /// the streams' inter-token latency while it is read
    #[arg(long, value_name = "N")]
    pub probe_prompt_tokens: Option<u32>,
    /// Also write the report to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Endpoint {
    Chat,
    Completions,
}

impl BenchServeOptions {
    fn requests(&self) -> u32 {
        self.requests.map_or(self.concurrency.get().saturating_mul(4), NonZeroU32::get)
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.max(1))
    }
}

/// Measures, prints the table, writes the JSON. Fails if no request succeeded.
pub fn main(options: BenchServeOptions) -> Result<ExitCode, CliError> {
    if options.rate.is_some_and(|rate| !rate.is_finite() || rate <= 0.0) {
        return Err(CliError::message("--rate takes a number of requests per second above 0."));
    }
    if !(0.0..=1.0).contains(&options.shared_prefix_share) {
        return Err(CliError::message("--shared-prefix-share takes a number from 0 to 1."));
    }
    let server = Server::parse(&options.url, options.api_key.clone()).map_err(CliError::Message)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::message(format!("The runtime cannot be started: {error}.")))?;
    let report = runtime.block_on(measure(&options, server))?;
    print!("{}", report.table());
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report).expect("the report is plain data");
        std::fs::write(path, text + "\n").map_err(|error| {
            CliError::message(format!(
                "The report cannot be written to {}: {error}.",
                path.display()
            ))
        })?;
    }
    Ok(if report.any_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn measure(options: &BenchServeOptions, server: Server) -> Result<Report, CliError> {
    let models = load::models(options, &server).await?;
    let prompts = Prompts::prepare(options, &server, &models[0]).await?;
    let load = load::Load { options, server, models, prompts };
    load.warm_up().await?;
    let mut report = Report::new(options, &load.models, &load.prompts);
    for repetition in 0..options.repeat.get() {
        match options.probe_prompt_tokens {
            Some(tokens) => report.probes.push(probe::run(&load, tokens, repetition).await?),
            None => report.runs.push(load.run(repetition).await),
        }
    }
    report.finish();
    Ok(report)
}
