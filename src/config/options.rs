//! The raw options of `ingot serve`: flags, `INGOT_*` variables and the keys of the file.

use super::values::{
    AdapterArg, ByteSize, LogFormat, RemoteKeyArg, RemoteModelArg, Secret, ShareScope, Span,
};
use super::{ConfigError, default_data_dir};
use crate::ipc::{ActivationType, KvCacheType, KvLayout, RunnerKind, Speculate};
use clap::builder::BoolishValueParser;
use serde::Deserialize;
use std::num::NonZeroU32;
use std::path::PathBuf;

/// Options of `ingot serve` as they were given; nothing is checked across options yet.
///
/// Field names are the keys of the configuration file; flags are the same with dashes.
#[derive(Debug, Clone, Default, PartialEq, clap::Args, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeOptions {
    /// Models to load: a file, hf:org/repo/file.gguf (or file.gguf@rev), an alias, or a name that
    /// `ingot models` lists [default: smollm2:135m]
    #[arg(value_name = "MODEL", env = "INGOT_MODELS", value_delimiter = ',')]
    pub models: Vec<String>,

    /// Reads options from this TOML file; flags and INGOT_* variables win over it
    #[arg(long, value_name = "FILE", env = "INGOT_CONFIG")]
    #[serde(skip)]
    pub config: Option<PathBuf>,

    /// Folder of models, adapters and the database [default: ingot in the XDG data home]
    #[arg(long, value_name = "FOLDER", env = "INGOT_DATA_DIR")]
    pub data_dir: Option<PathBuf>,

    /// Address to listen on; other than loopback needs API keys [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS", env = "INGOT_HOST", help_heading = "Listening")]
    pub host: Option<String>,

    /// Port to listen on; 0 takes a free one and prints it [default: 8000]
    #[arg(long, env = "INGOT_PORT", help_heading = "Listening")]
    pub port: Option<u16>,

    /// Host names that requests may use, besides localhost and the bound address; `*` allows any
    #[arg(
        long,
        value_name = "NAME",
        env = "INGOT_ALLOWED_HOST",
        value_delimiter = ',',
        help_heading = "Listening"
    )]
    pub allowed_host: Vec<String>,

    /// Connections open at the same time [default: 1024]
    #[arg(long, value_name = "N", env = "INGOT_MAX_CONNECTIONS", help_heading = "Listening")]
    pub max_connections: Option<NonZeroU32>,

    /// A request's headers must arrive within this time [default: 10s]
    #[arg(long, value_name = "TIME", env = "INGOT_HEADER_TIMEOUT", help_heading = "Listening")]
    pub header_timeout: Option<Span>,

    /// A request's body must arrive within this time [default: 30s]
    #[arg(long, value_name = "TIME", env = "INGOT_BODY_TIMEOUT", help_heading = "Listening")]
    pub body_timeout: Option<Span>,

    /// A client that reads nothing of its stream for this long is dropped [default: 30s]
    #[arg(
        long,
        value_name = "TIME",
        env = "INGOT_SLOW_CLIENT_TIMEOUT",
        help_heading = "Listening"
    )]
    pub slow_client_timeout: Option<Span>,

    /// Running requests may finish within this time after SIGTERM [default: 30s]
    #[arg(long, value_name = "TIME", env = "INGOT_GRACE_TIME", help_heading = "Listening")]
    pub grace_time: Option<Span>,

    /// Key that clients must send; repeatable [default: none, everyone on this machine may ask]
    #[arg(
        long,
        value_name = "KEY",
        env = "INGOT_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        help_heading = "Keys and limits"
    )]
    pub api_key: Vec<Secret>,

    /// File with one API key a line
    #[arg(long, value_name = "FILE", env = "INGOT_API_KEY_FILE", help_heading = "Keys and limits")]
    pub api_key_file: Option<PathBuf>,

    /// Key of the admin routes, which do not exist without one
    #[arg(
        long,
        value_name = "KEY",
        env = "INGOT_ADMIN_KEY",
        hide_env_values = true,
        help_heading = "Keys and limits"
    )]
    pub admin_key: Option<Secret>,

    /// Requests per minute and key; 0 is no limit [default: 0]
    #[arg(long, value_name = "N", env = "INGOT_RATE_LIMIT", help_heading = "Keys and limits")]
    pub rate_limit: Option<u32>,

    /// Requests of one key at the same time; 0 is no limit [default: 0]
    #[arg(
        long,
        value_name = "N",
        env = "INGOT_MAX_CONCURRENT_PER_KEY",
        help_heading = "Keys and limits"
    )]
    pub max_concurrent_per_key: Option<u32>,

    /// Who may reuse whose cached prompt prefixes: each key its own, or all [default: key]
    #[arg(long, env = "INGOT_SHARE_PREFIXES", help_heading = "Keys and limits")]
    pub share_prefixes: Option<ShareScope>,

    /// A request ends after this time [default: 600s]
    #[arg(
        long,
        value_name = "TIME",
        env = "INGOT_REQUEST_TIMEOUT",
        help_heading = "Keys and limits"
    )]
    pub request_timeout: Option<Span>,

    /// Size of a request's body, at most [default: 16MiB]
    #[arg(long, value_name = "SIZE", env = "INGOT_BODY_LIMIT", help_heading = "Keys and limits")]
    pub body_limit: Option<ByteSize>,

    /// Control tokens that are spelled in users' and tools' messages act as control tokens, not as text:
    /// anyone who supplies such a text can then forge turns [default: false]
    #[arg(
        long,
        value_name = "BOOL",
        env = "INGOT_PARSE_CONTROL_TOKENS",
        value_parser = BoolishValueParser::new(),
        help_heading = "Keys and limits"
    )]
    pub parse_control_tokens: Option<bool>,

    /// Requests that may wait in an engine; one more gets a 429 [default: 256]
    #[arg(long, value_name = "N", env = "INGOT_QUEUE_LIMIT", help_heading = "Keys and limits")]
    pub queue_limit: Option<NonZeroU32>,

    /// Longest prompt and answer together, in tokens [default: the model's, at most 8192]
    #[arg(long, value_name = "TOKENS", env = "INGOT_CONTEXT_LENGTH", help_heading = "Engine")]
    pub context_length: Option<NonZeroU32>,

    /// Size of the KV cache over all requests, in tokens [default: planned from memory]
    #[arg(long, value_name = "TOKENS", env = "INGOT_KV_TOKENS", help_heading = "Engine")]
    pub kv_tokens: Option<NonZeroU32>,

    /// Number format of the KV cache; q8_0 takes 53% of the memory [default: f16]
    #[arg(long, value_name = "TYPE", env = "INGOT_KV_TYPE", help_heading = "Engine")]
    pub kv_type: Option<KvCacheType>,

    /// Integers to which the native runner rounds activations [default: auto]
    #[arg(long, value_name = "TYPE", env = "INGOT_ACTIVATIONS", help_heading = "Engine")]
    pub activations: Option<ActivationType>,

    /// Layout of llama.cpp's KV cache [default: streams where memory allows, the faster one]
    #[arg(long, value_name = "LAYOUT", env = "INGOT_KV_LAYOUT", help_heading = "Engine")]
    pub kv_layout: Option<KvLayout>,

    /// Requests in one batch, at most [default: 8 with streams, 32 unified]
    #[arg(long, value_name = "N", env = "INGOT_MAX_SEQUENCES", help_heading = "Engine")]
    pub max_sequences: Option<NonZeroU32>,

    /// Tokens in one step, at most [default: 512]
    #[arg(long, value_name = "N", env = "INGOT_BATCH_TOKENS", help_heading = "Engine")]
    pub batch_tokens: Option<NonZeroU32>,

    /// Threads of an engine [default: the cores that this process may use]
    #[arg(long, value_name = "N", env = "INGOT_THREADS", help_heading = "Engine")]
    pub threads: Option<NonZeroU32>,

    /// Layers that run on the GPU [default: 0, or all in a build with the cuda feature]
    #[arg(long, value_name = "N", env = "INGOT_GPU_LAYERS", help_heading = "Engine")]
    pub gpu_layers: Option<u32>,

    /// What runs the model [default: native where it covers the model, else llama.cpp]
    #[arg(long, env = "INGOT_RUNNER", help_heading = "Engine")]
    pub runner: Option<RunnerKind>,

    /// Use llama.cpp's flash attention [default: where it is faster: on a GPU, and for a unified
    /// cache]
    #[arg(
        long,
        value_name = "BOOL",
        env = "INGOT_FLASH_ATTENTION",
        value_parser = BoolishValueParser::new(),
        help_heading = "Engine"
    )]
    pub flash_attention: Option<bool>,

    /// Map the model file instead of reading it [default: true]
    #[arg(
        long,
        value_name = "BOOL",
        env = "INGOT_MMAP",
        value_parser = BoolishValueParser::new(),
        help_heading = "Engine"
    )]
    pub mmap: Option<bool>,

    /// While requests decode, prompts are read in chunks of about this many milliseconds
    /// [default: 100]
    #[arg(long, value_name = "MS", env = "INGOT_TARGET_STEP_MS", help_heading = "Engine")]
    pub target_step_ms: Option<NonZeroU32>,

    /// Draft tokens that have stood in prompt or output before, and check several in one step:
    /// the same output, sooner; on the native runner [default: auto, while it pays]
    #[arg(long, env = "INGOT_SPECULATE", help_heading = "Engine")]
    pub speculate: Option<Speculate>,

    /// A smaller model of the same vocabulary, which drafts for the (first) model; named as models
    /// are; on the native runner
    #[arg(long, value_name = "MODEL", env = "INGOT_DRAFT_MODEL", help_heading = "Engine")]
    pub draft_model: Option<String>,

    /// An engine that makes no step for this long while it has work is replaced [default: 10s]
    #[arg(long, value_name = "TIME", env = "INGOT_WATCHDOG", help_heading = "Engine")]
    pub watchdog: Option<Span>,

    /// Models loaded at the same time; the least recently used leaves first [default: 4]
    #[arg(long, value_name = "N", env = "INGOT_MAX_LOADED_MODELS", help_heading = "Engine")]
    pub max_loaded_models: Option<NonZeroU32>,

    /// Memory that all engines together may take [default: what the machine has available]
    #[arg(long, value_name = "SIZE", env = "INGOT_MEMORY_BUDGET", help_heading = "Engine")]
    pub memory_budget: Option<ByteSize>,

    /// LoRA adapter to load at the start (PEFT folder or llama.cpp LoRA GGUF); repeatable
    #[arg(
        long,
        value_name = "NAME=PATH",
        env = "INGOT_ADAPTER",
        value_delimiter = ',',
        help_heading = "Engine"
    )]
    pub adapter: Vec<AdapterArg>,

    /// Training jobs that run at the same time; the rest wait [default: 1]
    #[arg(long, value_name = "N", env = "INGOT_MAX_RUNNING_JOBS", help_heading = "Jobs")]
    pub max_running_jobs: Option<NonZeroU32>,

    /// A job is paused when less memory than this is available [default: 192MiB]
    #[arg(long, value_name = "SIZE", env = "INGOT_JOB_MEMORY_RESERVE", help_heading = "Jobs")]
    pub job_memory_reserve: Option<ByteSize>,

    /// Model of another server that judges and graders of jobs may ask; repeatable
    #[arg(
        long,
        value_name = "NAME=URL#MODEL",
        env = "INGOT_REMOTE_MODEL",
        value_delimiter = ',',
        help_heading = "Jobs"
    )]
    pub remote_model: Vec<RemoteModelArg>,

    /// Key for a remote model's server; repeatable
    #[arg(
        long,
        value_name = "NAME=KEY",
        env = "INGOT_REMOTE_KEY",
        hide_env_values = true,
        help_heading = "Jobs"
    )]
    pub remote_key: Vec<RemoteKeyArg>,

    /// Time that a step of the mock runner takes, in microseconds
    #[arg(long, env = "INGOT_MOCK_STEP_US", hide = true)]
    pub mock_step_us: Option<u64>,

    /// Form of the log [default: text]
    #[arg(long, env = "INGOT_LOG_FORMAT", help_heading = "Log")]
    pub log_format: Option<LogFormat>,

    /// What is logged: error, warn, info, debug, trace, or filter directives [default: info]
    #[arg(long, value_name = "LEVEL", env = "INGOT_LOG_LEVEL", help_heading = "Log")]
    pub log_level: Option<String>,

    /// Log the prompts of chat and completion requests, as the model gets them [default: false]
    #[arg(
        long,
        value_name = "BOOL",
        env = "INGOT_LOG_PROMPTS",
        value_parser = BoolishValueParser::new(),
        help_heading = "Log"
    )]
    pub log_prompts: Option<bool>,
}

/// Takes each listed field from the first struct where it is set; the compiler checks that no
/// field is left out.
macro_rules! first_set {
    ($a:ident, $b:ident; options: $($option:ident),*; lists: $($list:ident),* $(,)?) => {
        ServeOptions {
            $($option: $a.$option.or($b.$option),)*
            $($list: if $a.$list.is_empty() { $b.$list } else { $a.$list },)*
        }
    };
}

impl ServeOptions {
    /// These options, and those of `other` where these say nothing.
    pub(super) fn or(self, other: Self) -> Self {
        first_set!(self, other;
            options: config, data_dir, host, port, max_connections, header_timeout, body_timeout,
                slow_client_timeout, grace_time, api_key_file, admin_key, rate_limit,
                max_concurrent_per_key, share_prefixes, request_timeout, body_limit,
                parse_control_tokens, queue_limit, context_length, kv_tokens, kv_type, activations, kv_layout, max_sequences, batch_tokens,
                threads, gpu_layers, runner, flash_attention, mmap, target_step_ms, speculate,
                draft_model, watchdog, max_loaded_models, memory_budget, max_running_jobs, job_memory_reserve, mock_step_us, log_format, log_level, log_prompts;
            lists: models, allowed_host, api_key, adapter, remote_model, remote_key,
        )
    }
}

/// `--data-dir` for the verbs that need nothing else of the configuration.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct DataDirOption {
    /// Folder of models, adapters and the database [default: ingot in the XDG data home]
    #[arg(long, value_name = "FOLDER", env = "INGOT_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
}

impl DataDirOption {
    /// The folder given, or the default one.
    pub fn resolve(self) -> Result<PathBuf, ConfigError> {
        self.data_dir.map_or_else(default_data_dir, Ok)
    }
}
