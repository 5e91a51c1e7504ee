//! Configuration: raw ([`ServeOptions`]: flags, environment, file), then resolved, then immutable
//! ([`ServeConfig`]). Nothing below the command line reads the environment.
//!
//! A flag wins over its `INGOT_*` variable, which wins over the file given by `--config`, which
//! wins over the default. `configs/default.toml` documents every option.

mod options;
#[cfg(test)]
mod tests;
mod values;

pub use options::{DataDirOption, ServeOptions};
pub use values::{
    AdapterArg, AllowedHosts, ByteSize, LogFormat, RemoteKeyArg, RemoteModelArg, Secret,
    ShareScope, Span,
};

use crate::ipc::{ActivationType, KvCacheType, KvLayout, RunnerKind, Speculate};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What `--gpu-layers` means by "all of them": more than any model has.
pub const ALL_GPU_LAYERS: u32 = 9_999;
/// llama.cpp's sequence ids end here.
pub const MAX_SEQUENCES: u32 = 256;
/// A context is not longer than this unless `--context-length` asks for it.
pub const DEFAULT_CONTEXT_LENGTH: u32 = 8_192;

/// Requests that run at once, unless the memory plan finds fewer to be faster.
pub const DEFAULT_SEQUENCES: u32 = 32;

/// Everything `ingot serve` was told, checked. Immutable after [`ServeOptions::resolve`].
#[derive(Debug, Clone, PartialEq)]
pub struct ServeConfig {
    /// Models to load at the start, as the user wrote them; may be empty.
    pub models: Vec<String>,
    /// Drafts for the first of them, as the user wrote it.
    pub draft_model: Option<String>,
    pub adapters: Vec<AdapterArg>,
    pub data_dir: PathBuf,
    pub hub: HubAccess,
    pub listen: ListenConfig,
    pub keys: KeyConfig,
    pub engine: EngineConfig,
    pub limits: LimitConfig,
    pub jobs: JobConfig,
    pub log: LogConfig,
}

/// Where the server listens, and how patient it is with a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct ListenConfig {
    /// Port 0 asks the system for a free one.
    pub address: SocketAddr,
    pub allowed_hosts: AllowedHosts,
    pub max_connections: u32,
    /// From the first byte of a request to the end of its headers.
    pub header_timeout: Duration,
    /// For the whole body.
    pub body_timeout: Duration,
    /// A client that takes nothing of its stream for this long is dropped.
    pub slow_client_timeout: Duration,
    /// How long running requests may go on after SIGTERM.
    pub grace_time: Duration,
}

/// Who may ask, and how much.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyConfig {
    /// Empty: everyone may (loopback only).
    pub api_keys: Vec<Secret>,
    /// `None`: admin routes answer 404.
    pub admin_key: Option<Secret>,
    /// Requests per minute and key.
    pub rate_limit: Option<NonZeroU32>,
    /// Requests of one key at the same time.
    pub max_concurrent_per_key: Option<NonZeroU32>,
    pub share_prefixes: ShareScope,
}

/// How engines are set up; `None` is decided per model by the memory plan or the header.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    pub runner: Option<RunnerKind>,
    /// `None`: the model's training context, at most [`DEFAULT_CONTEXT_LENGTH`].
    pub context_length: Option<u32>,
    pub kv_tokens: Option<u32>,
    pub kv_type: KvCacheType,
    pub activations: ActivationType,
    pub kv_layout: Option<KvLayout>,
    pub max_sequences: Option<u32>,
    pub batch_tokens: u32,
    pub threads: u32,
    pub gpu_layers: u32,
    /// `None`: where it is faster.
    pub flash_attention: Option<bool>,
    pub mmap: bool,
    pub target_step_ms: u32,
    pub queue_limit: u32,
    pub speculate: Speculate,
    /// An engine that makes no step for this long (and four of its measured steps) is replaced.
    pub watchdog: Duration,
    pub max_loaded_models: u32,
    /// Bytes that all engines together may take; `None`: what the machine has available.
    pub memory_budget: Option<u64>,
    /// Mock runner only.
    pub mock_step_us: u64,
}

/// Bounds on a request.
#[derive(Debug, Clone, PartialEq)]
pub struct LimitConfig {
    /// From the headers to the last token.
    pub request_timeout: Duration,
    /// Bytes of a request's body.
    pub body_limit: usize,
    /// Whether control tokens that are spelled in users' and tools' messages are control tokens.
    pub parse_control_tokens: bool,
}

/// Of memory, available while a job runs: with less the system is about to kill somebody.
const JOB_MEMORY_RESERVE: u64 = 192 << 20;

/// Training jobs.
#[derive(Debug, Clone, PartialEq)]
pub struct JobConfig {
    /// At the same time.
    pub max_running: u32,
    /// With fewer bytes of memory available a job is paused.
    pub memory_reserve: u64,
    /// Models of other servers that the operator's jobs may ask as judges and graders.
    pub remote_models: Vec<RemoteModel>,
}

/// A model of another server with OpenAI's API.
#[derive(Debug, Clone, PartialEq)]
pub struct RemoteModel {
    /// The name that specifications of jobs use.
    pub name: String,
    /// Address up to and including `/v1`.
    pub url: String,
    /// The model's name on that server.
    pub model: String,
    pub key: Option<Secret>,
}

/// What is logged, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct LogConfig {
    pub format: LogFormat,
    /// A level, or `tracing` filter directives such as `info,ingot::engine=debug`.
    pub level: String,
    /// Log the prompts of chat and completion requests.
    pub prompts: bool,
}

/// How the model hub is reached.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HubAccess {
    /// `None`: the hub that hf-hub knows.
    pub endpoint: Option<String>,
    pub token: Option<Secret>,
}

impl HubAccess {
    /// From `HF_ENDPOINT` and `HF_TOKEN`, the names every hub client uses.
    pub fn from_env() -> Self {
        let var = |name| std::env::var(name).ok().filter(|value: &String| !value.trim().is_empty());
        Self {
            endpoint: var("HF_ENDPOINT").map(|url| url.trim().trim_end_matches('/').to_owned()),
            token: var("HF_TOKEN").and_then(|token| token.parse().ok()),
        }
    }
}

/// A configuration that cannot be used; each message is a sentence that names the option.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("The configuration file {path} cannot be read: {source}.")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("The configuration file {path} is not valid: {message}")]
    Invalid { path: PathBuf, message: String },
    #[error("--{option} {reason}.")]
    Option { option: &'static str, reason: String },
    #[error(
        "Listening on {0}, which other machines can reach, needs API keys: add --api-key KEY (or \
         --api-key-file FILE), or listen on 127.0.0.1."
    )]
    PublicWithoutKeys(IpAddr),
    #[error(
        "No data folder is known, because neither XDG_DATA_HOME nor HOME is set: name one with \
         --data-dir."
    )]
    NoDataDir,
}

fn option(option: &'static str, reason: impl Into<String>) -> ConfigError {
    ConfigError::Option { option, reason: reason.into() }
}

/// `$XDG_DATA_HOME/ingot`, or `~/.local/share/ingot`.
pub fn default_data_dir() -> Result<PathBuf, ConfigError> {
    let absolute = |name: &str| {
        std::env::var_os(name).map(PathBuf::from).filter(|path: &PathBuf| path.is_absolute())
    };
    absolute("XDG_DATA_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
        .map(|base| base.join("ingot"))
        .ok_or(ConfigError::NoDataDir)
}

impl ServeOptions {
    /// Fills in the file and the defaults, and checks the whole.
    pub fn resolve(self) -> Result<ServeConfig, ConfigError> {
        let merged = match self.config.clone() {
            Some(path) => {
                let file = Self::from_file(&path)?;
                self.or(file)
            }
            None => self,
        };
        merged.resolve_merged()
    }

    /// Parses a configuration file; relative paths in it are relative to its folder.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Unreadable { path: path.to_owned(), source })?;
        let mut options: Self = toml::from_str(&text).map_err(|error| ConfigError::Invalid {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        for file in [&mut options.data_dir, &mut options.api_key_file].into_iter().flatten() {
            *file = folder.join(&*file);
        }
        for adapter in &mut options.adapter {
            adapter.path = folder.join(&adapter.path);
        }
        Ok(options)
    }

    fn resolve_merged(mut self) -> Result<ServeConfig, ConfigError> {
        let data_dir = match self.data_dir.take() {
            Some(path) => path,
            None => default_data_dir()?,
        };
        let keys = self.resolve_keys()?;
        let listen = self.resolve_listen()?;
        if !listen.address.ip().is_loopback() && keys.api_keys.is_empty() {
            return Err(ConfigError::PublicWithoutKeys(listen.address.ip()));
        }
        let engine = self.resolve_engine()?;
        let limits = LimitConfig {
            request_timeout: time("request-timeout", self.request_timeout, 600)?,
            body_limit: self.resolve_body_limit()?,
            parse_control_tokens: self.parse_control_tokens.unwrap_or(false),
        };
        let jobs = JobConfig {
            max_running: self.max_running_jobs.map_or(1, NonZeroU32::get),
            memory_reserve: self.job_memory_reserve.map_or(JOB_MEMORY_RESERVE, |size| size.0),
            remote_models: self.resolve_remote_models()?,
        };
        let log = LogConfig {
            format: self.log_format.unwrap_or(LogFormat::Text),
            level: self.log_level.unwrap_or_else(|| "info".to_owned()),
            prompts: self.log_prompts.unwrap_or(false),
        };
        for (index, adapter) in self.adapter.iter().enumerate() {
            if self.adapter[..index].iter().any(|other| other.name == adapter.name) {
                return Err(option("adapter", format!("names `{}` twice", adapter.name)));
            }
        }
        self.models.retain(|model| !model.trim().is_empty());
        if self.models.len() > engine.max_loaded_models as usize {
            return Err(option(
                "max-loaded-models",
                format!(
                    "is {}, but {} models are named on the command line",
                    engine.max_loaded_models,
                    self.models.len()
                ),
            ));
        }
        Ok(ServeConfig {
            models: self.models,
            draft_model: self.draft_model.filter(|model| !model.trim().is_empty()),
            adapters: self.adapter,
            data_dir,
            hub: HubAccess::from_env(),
            listen,
            keys,
            engine,
            limits,
            jobs,
            log,
        })
    }

    fn resolve_keys(&mut self) -> Result<KeyConfig, ConfigError> {
        let mut api_keys = std::mem::take(&mut self.api_key);
        if let Some(path) = &self.api_key_file {
            let text = std::fs::read_to_string(path).map_err(|error| {
                option("api-key-file", format!("{} cannot be read: {error}", path.display()))
            })?;
            let lines = text.lines().map(str::trim);
            let found: Vec<Secret> = lines
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .filter_map(|line| line.parse().ok())
                .collect();
            if found.is_empty() {
                let reason = format!("{} holds no key: write one a line", path.display());
                return Err(option("api-key-file", reason));
            }
            api_keys.extend(found);
        }
        if let Some(admin) = &self.admin_key
            && api_keys.contains(admin)
        {
            return Err(option("admin-key", "must differ from every API key"));
        }
        Ok(KeyConfig {
            api_keys,
            admin_key: self.admin_key.take(),
            rate_limit: self.rate_limit.and_then(NonZeroU32::new),
            max_concurrent_per_key: self.max_concurrent_per_key.and_then(NonZeroU32::new),
            share_prefixes: self.share_prefixes.unwrap_or(ShareScope::Key),
        })
    }

    fn resolve_remote_models(&mut self) -> Result<Vec<RemoteModel>, ConfigError> {
        let mut models: Vec<RemoteModel> = Vec::new();
        for RemoteModelArg { name, url, model } in std::mem::take(&mut self.remote_model) {
            if models.iter().any(|other| other.name == name) {
                return Err(option("remote-model", format!("names `{name}` twice")));
            }
            models.push(RemoteModel { name, url, model, key: None });
        }
        for given in &std::mem::take(&mut self.remote_key) {
            let (name, key) = given.parts().map_err(|why| option("remote-key", why))?;
            match models.iter_mut().find(|model| model.name == name) {
                Some(model) => model.key = Some(key),
                None => {
                    let reason = format!("names `{name}`, which no --remote-model names");
                    return Err(option("remote-key", reason));
                }
            }
        }
        Ok(models)
    }

    fn resolve_listen(&self) -> Result<ListenConfig, ConfigError> {
        let host = match self.host.as_deref() {
            None | Some("localhost") => IpAddr::V4(Ipv4Addr::LOCALHOST),
            Some(host) => host.trim_matches(['[', ']']).parse().map_err(|_| {
                option(
                    "host",
                    format!(
                        "takes an IP address such as 127.0.0.1, or 0.0.0.0 for every interface, \
                         not `{host}`"
                    ),
                )
            })?,
        };
        Ok(ListenConfig {
            address: SocketAddr::new(host, self.port.unwrap_or(8_000)),
            allowed_hosts: AllowedHosts::new(host, &self.allowed_host),
            max_connections: self.max_connections.map_or(1_024, NonZeroU32::get),
            header_timeout: time("header-timeout", self.header_timeout, 10)?,
            body_timeout: time("body-timeout", self.body_timeout, 30)?,
            slow_client_timeout: time("slow-client-timeout", self.slow_client_timeout, 30)?,
            grace_time: self.grace_time.map_or(Duration::from_secs(30), |span| span.0),
        })
    }

    fn resolve_engine(&self) -> Result<EngineConfig, ConfigError> {
        let max_sequences = self.max_sequences.map(NonZeroU32::get);
        let batch_tokens = self.batch_tokens.map_or(512, NonZeroU32::get);
        if let Some(max_sequences) = max_sequences.filter(|&most| most > MAX_SEQUENCES) {
            let reason = format!("is {max_sequences}; llama.cpp allows at most {MAX_SEQUENCES}");
            return Err(option("max-sequences", reason));
        }
        let sequences = max_sequences.unwrap_or(DEFAULT_SEQUENCES);
        if batch_tokens < sequences {
            return Err(option(
                "batch-tokens",
                format!(
                    "is {batch_tokens}, which is less than one token for each of \
                     {sequences} sequences (--max-sequences)"
                ),
            ));
        }
        let kv_type = self.kv_type.unwrap_or(KvCacheType::F16);
        if self.flash_attention == Some(false) && kv_type != KvCacheType::F16 {
            let reason =
                "cannot be off with --kv-type q8_0: without it llama.cpp reads no quantized cache";
            return Err(option("flash-attention", reason));
        }
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        let all_layers = if cfg!(feature = "cuda") { ALL_GPU_LAYERS } else { 0 };
        Ok(EngineConfig {
            runner: self.runner,
            context_length: self.context_length.map(NonZeroU32::get),
            kv_tokens: self.kv_tokens.map(NonZeroU32::get),
            kv_type,
            activations: self.activations.unwrap_or(ActivationType::Auto),
            kv_layout: self.kv_layout,
            max_sequences,
            batch_tokens,
            threads: self.threads.map_or_else(cores, NonZeroU32::get),
            gpu_layers: self.gpu_layers.unwrap_or(all_layers),
            flash_attention: self.flash_attention,
            mmap: self.mmap.unwrap_or(true),
            target_step_ms: self.target_step_ms.map_or(100, NonZeroU32::get),
            queue_limit: self.queue_limit.map_or(256, NonZeroU32::get),
            speculate: self.speculate.unwrap_or(Speculate::Auto),
            watchdog: time("watchdog", self.watchdog, 10)?,
            max_loaded_models: self.max_loaded_models.map_or(4, NonZeroU32::get),
            memory_budget: self.memory_budget.map(|size| size.0),
            mock_step_us: self.mock_step_us.unwrap_or(0),
        })
    }

    fn resolve_body_limit(&self) -> Result<usize, ConfigError> {
        let bytes = self.body_limit.unwrap_or(ByteSize(16 << 20)).0;
        match usize::try_from(bytes) {
            Ok(bytes) if (1_024..=1 << 30).contains(&bytes) => Ok(bytes),
            _ => Err(option("body-limit", "must lie between 1KiB and 1GiB")),
        }
    }
}

/// A time limit that must not be zero: 0 would refuse everything, not switch the limit off.
fn time(name: &'static str, given: Option<Span>, default: u64) -> Result<Duration, ConfigError> {
    match given {
        None => Ok(Duration::from_secs(default)),
        Some(Span(duration)) if duration.is_zero() => {
            Err(option(name, "must be longer than 0; write a time such as 30s"))
        }
        Some(Span(duration)) => Ok(duration),
    }
}
