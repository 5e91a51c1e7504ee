//! The messages between gateway and engine.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::path::PathBuf;

/// A token id of the model's vocabulary.
pub type Token = u32;

/// Identifies one generate request on one engine connection; chosen by the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// Identifies one loaded version of an adapter on one engine. Reloading an adapter's name assigns a
/// new id, so a request that started with the old version finishes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AdapterId(pub u64);

// ---------------------------------------------------------------------------------------------
// Gateway -> engine

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToEngine {
    /// Always the first frame, exactly once.
    Load(LoadSpec),
    Generate(Box<Generate>),
    /// Stops a request and frees its pages within one step. Unknown ids are ignored.
    Cancel(RequestId),
    /// Ends one choice of a request as if the model had produced EOS.
    Finish {
        request: RequestId,
        choice: u32,
    },
    /// The client reads slowly: schedule no more rows for the request until [`ToEngine::Resume`].
    Pause(RequestId),
    Resume(RequestId),
    /// Answered by exactly one [`FromEngine::Reply`] with the same number.
    Call {
        call: u64,
        what: Call,
    },
    /// Exit after the current step, without waiting for running requests.
    Shutdown,
}

/// Longest input to be embedded or scored, in tokens, if the model's context is longer. Such an
/// input has its own cache.
pub const MAX_POOLED_TOKENS: u32 = 8192;

/// Everything an engine needs to load a model; resolved by the gateway, immutable afterwards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSpec {
    pub model: PathBuf,
    /// The draft model, if any.
    pub draft: Option<PathBuf>,
    pub runner: RunnerKind,
    /// Longest prompt plus output of one request, in tokens.
    pub context_length: u32,
    /// Size of the KV cache over all requests, in tokens.
    pub kv_tokens: u32,
    /// Most requests in one batch.
    pub max_sequences: u32,
    /// Most tokens in one step.
    pub batch_tokens: u32,
    pub kv_type: KvCacheType,
    pub activations: ActivationType,
    pub flash_attention: bool,
    pub kv_layout: KvLayout,
    pub threads: u32,
    pub gpu_layers: u32,
    pub mmap: bool,
    /// Target duration of a step: while requests decode, prefill is split into chunks to keep to
    /// it.
    pub target_step_ms: u32,
    /// Most requests that may wait in the engine; further ones are refused.
    pub queue_limit: u32,
    pub speculate: Speculate,
    /// Mock runner only: a step takes this long, in microseconds.
    pub mock_step_us: u64,
}

impl LoadSpec {
    /// A default specification for tests and measurements, which override the fields they examine.
    pub fn plain(model: impl Into<PathBuf>, runner: RunnerKind) -> Self {
        Self {
            model: model.into(),
            draft: None,
            runner,
            context_length: 2048,
            kv_tokens: 8192,
            max_sequences: 8,
            batch_tokens: 512,
            kv_type: KvCacheType::F16,
            activations: ActivationType::Auto,
            flash_attention: false,
            kv_layout: KvLayout::Unified,
            threads: 2,
            gpu_layers: 0,
            mmap: true,
            target_step_ms: 100,
            queue_limit: 64,
            speculate: Speculate::Off,
            mock_step_us: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RunnerKind {
    /// Our own kernels, for the models that they support; other files are loaded by llama.cpp.
    Native,
    /// llama.cpp: any GGUF that it can load.
    LlamaCpp,
    /// No model: deterministic tokens from a byte vocabulary, for tests of the server.
    Mock,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum KvCacheType {
    #[value(name = "f16")]
    F16,
    #[value(name = "q8_0")]
    Q8_0,
}

/// The integers to which the native runner rounds the inputs of quantized matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum ActivationType {
    /// 8 bits, and 16 bits in blocks with outliers: where one of 32 values is so large that the
    /// others would be rounded coarsely.
    Auto,
    /// 8 bits everywhere: the fastest.
    I8,
    /// 16 bits everywhere: equal to F32 in practice, but prompts take nearly twice as long, and one
    /// stream one and a half times.
    I16,
}

/// Cache layout of the llama_cpp runner (measurements: docs/log/serving.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum KvLayout {
    /// One buffer for all sequences: a shared prefix is metadata.
    Unified,
    /// One buffer per sequence: a shared prefix is copied.
    Streams,
}

/// When the engine uses speculative decoding. The output is bit-identical in all modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Speculate {
    /// While the measured cost of a drafted row is less than its expected gain.
    Auto,
    /// At any cost: for measurements.
    Always,
    Off,
}

/// A text generation request, validated by the gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    pub id: RequestId,
    pub prompt: Prompt,
    /// Number of independent completions of the prompt (OpenAI's `n`), at least 1.
    pub choices: u32,
    pub sampling: SamplingParams,
    pub stop: StopParams,
    /// `Some(k)`: report the sampled token's logprob and the `k` most probable tokens at every
    /// position.
    pub logprobs: Option<u32>,
    /// Whether to report the prompt's own tokens too (with logprobs, if requested): OpenAI's
    /// `echo`.
    pub echo: bool,
    pub grammar: Option<GrammarSpec>,
    pub adapter: Option<AdapterId>,
    /// Prefix pages are shared only between requests with equal values.
    pub tenant: u64,
    /// Higher priorities run earlier.
    pub priority: i32,
    /// Requests with the same key share one fair queue.
    pub fair_key: u64,
    /// Whether the text of control tokens (`<tool_call>`, `</think>`) is part of the output.
    /// End-of-turn tokens never are.
    pub render_special: bool,
    /// Most tokens drafted for one step; `None` for the engine's default.
    pub max_drafted: Option<u32>,
    /// For training: all sampled tokens are reported, including the one that ends the output, and
    /// logprobs are those of the distribution at the request's temperature.
    pub rollout: bool,
}

impl Generate {
    /// A request for one greedy choice, for tests and measurements, which override the fields they
    /// examine.
    pub fn plain(id: u64, prompt: Prompt) -> Self {
        Self {
            id: RequestId(id),
            prompt,
            choices: 1,
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            stop: StopParams::default(),
            logprobs: None,
            echo: false,
            grammar: None,
            adapter: None,
            tenant: 0,
            priority: 0,
            fair_key: 0,
            render_special: false,
            max_drafted: None,
            rollout: false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    Text {
        text: String,
        /// Whether to prepend BOS if the vocabulary asks for it.
        add_special: bool,
        /// Whether to parse control tokens in the text (rendered templates) or treat them as plain
        /// text.
        parse_special: bool,
    },
    /// The output of a chat template. Control tokens are parsed, except those that span a barrier
    /// (ascending byte offsets), which are plain text.
    Rendered {
        text: String,
        barriers: Vec<usize>,
        add_special: bool,
    },
    Tokens(Vec<Token>),
    /// Texts that are tokenized separately, as training tokenizes a conversation.
    Pieces {
        pieces: Vec<PromptPiece>,
        add_special: bool,
        parse_special: bool,
        /// Whether to append an end-of-text token.
        ends: bool,
    },
    /// Fill in the middle: needs a model with infill tokens.
    Infill {
        prefix: String,
        suffix: String,
    },
}

impl Prompt {
    /// The prompt in readable form: its text, or its token ids.
    pub fn shown(&self) -> String {
        match self {
            Self::Text { text, .. } | Self::Rendered { text, .. } => text.clone(),
            Self::Tokens(tokens) => format!("{tokens:?}"),
            Self::Pieces { pieces, .. } => pieces.iter().map(|piece| &*piece.text).collect(),
            Self::Infill { prefix, suffix } => format!("{prefix}[…]{suffix}"),
        }
    }
}

/// A text of [`Prompt::Pieces`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptPiece {
    pub text: String,
    /// The barriers, as in [`Prompt::Rendered`].
    pub barriers: Vec<usize>,
}

/// Sampling parameters. Neutral values disable a stage.
///
/// Stages run in llama.cpp's default order: logit bias, grammar mask, repetition, frequency and
/// presence penalties, DRY, top-k, typical-p, top-p, min-p, XTC, temperature, draw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 for greedy sampling.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    pub min_p: f32,
    pub typical_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub repetition_penalty: f32,
    /// Number of prompt and output tokens that the repetition penalty looks back on; 0 for all.
    pub penalty_window: u32,
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: u32,
    pub dry_penalty_last_n: u32,
    pub dry_sequence_breakers: Vec<String>,
    pub xtc_probability: f32,
    pub xtc_threshold: f32,
    pub logit_bias: Vec<(Token, f32)>,
    /// The draw at a position depends only on (seed, choice, position).
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            typical_p: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            penalty_window: 64,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_penalty_last_n: 1024,
            dry_sequence_breakers: ["\n", ":", "\"", "*"].map(String::from).to_vec(),
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StopParams {
    /// `None`: generate until the context is full.
    pub max_tokens: Option<u32>,
    /// Stop strings are never part of the output.
    pub strings: Vec<String>,
    pub token_ids: Vec<Token>,
    /// Continue after end-of-generation tokens (benchmarks); their text is omitted.
    pub ignore_eos: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GrammarSpec {
    pub grammar: Grammar,
    /// `Some`: the output is unconstrained until one of these texts appears.
    pub trigger: Option<GrammarTrigger>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Grammar {
    /// A JSON schema, as JSON text.
    JsonSchema(String),
    /// Any JSON object.
    JsonObject,
    Regex(String),
    /// A grammar in llguidance's Lark dialect.
    Lark(String),
    /// A Lark grammar built by Ingot around JSON values: keys are unique within each object.
    JsonLark {
        lark: String,
        /// The markers of a reasoning block that may come first.
        reasoning: Option<(String, String)>,
    },
    /// A JSON schema whose unknown keywords are ignored, as in tool definitions.
    LenientJsonSchema(String),
}

impl Grammar {
    /// The request's field that contains a grammar of this kind.
    pub fn param(&self) -> &'static str {
        match self {
            Self::JsonSchema(_) | Self::JsonObject | Self::Regex(_) => "response_format",
            Self::Lark(_) => "grammar",
            Self::JsonLark { .. } | Self::LenientJsonSchema(_) => "tools",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GrammarTrigger {
    /// The first of these texts to appear in the output activates the grammar; until then the
    /// output is unconstrained.
    pub texts: Vec<String>,
    /// Match only at the beginning of the output, after leading white space.
    pub at_start_only: bool,
    /// Whether the grammar includes the trigger text (tool-call markers) or begins after it (the
    /// end of a reasoning block).
    pub inclusive: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Call {
    Tokenize {
        text: String,
        add_special: bool,
        parse_special: bool,
    },
    /// Tokenizes a prompt as [`Prompt::Rendered`].
    TokenizeRendered {
        text: String,
        barriers: Vec<usize>,
        add_special: bool,
    },
    Detokenize {
        tokens: Vec<Token>,
        render_special: bool,
    },
    /// One vector per input.
    Embed {
        inputs: Vec<Prompt>,
    },
    /// One number per input: the output of a reward model's head for the last token.
    Score {
        adapter: AdapterId,
        inputs: Vec<Prompt>,
    },
    /// The file is a llama.cpp LoRA GGUF that the gateway has checked against the base's header.
    LoadAdapter {
        adapter: AdapterId,
        path: PathBuf,
        digest: [u8; 32],
        scale: f32,
    },
    /// Requests that use the adapter finish first; the reply is sent at once.
    UnloadAdapter {
        adapter: AdapterId,
    },
    /// Compiles a grammar without using it, so that an invalid one gives a 400 before any stream
    /// starts.
    CheckGrammar {
        grammar: Grammar,
    },
    /// Answered by the step loop, which shows that it is alive.
    Ping,
}

// ---------------------------------------------------------------------------------------------
// Engine -> gateway

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum FromEngine {
    /// The model is loaded and has decoded one token.
    Loaded(Box<ModelInfo>),
    LoadFailed(String),
    /// All events of one step, in order.
    Events(Vec<(RequestId, Event)>),
    Reply {
        call: u64,
        result: Result<Reply, EngineError>,
    },
    /// Sent after a step, at most every 50 ms, and once when the engine becomes idle.
    Progress(Progress),
}

/// The properties of a loaded model that the gateway needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    pub description: String,
    pub architecture: String,
    pub vocab_size: u32,
    pub parameters: u64,
    /// Longest sequence in tokens, prompt and output together.
    pub context_length: u32,
    /// Elements of an embedding vector.
    pub embedding_size: u32,
    pub can_generate: bool,
    pub can_embed: bool,
    /// Longest input to be embedded or scored, in tokens.
    pub pooled_length: u32,
    pub can_infill: bool,
    /// Whether sequences can share prefixes; false for recurrent and hybrid models.
    pub shares_prefixes: bool,
    /// Whether rows of different adapters may share a batch.
    pub mixes_adapters: bool,
    /// Whether the runner can verify drafts: a row's numbers do not depend on the batch's shape,
    /// and speculation is not disabled.
    pub speculates: bool,
    pub kv_pages: u32,
    pub page_tokens: u32,
    pub max_sequences: u32,
    /// Control tokens by text, for tool-call and reasoning markers.
    pub special_tokens: Vec<(String, Token)>,
    /// Seconds to load the model, including the first decoded token.
    pub load_seconds: f32,
    /// Seconds of the one-token step at load: the watchdog's initial timeout is based on it.
    pub step_seconds: f32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The prompt has been tokenized and validated; sent once, before any other event.
    Accepted {
        prompt_tokens: u32,
    },
    /// The first step of the request is about to run.
    Started {
        cached_tokens: u32,
        queue_seconds: f32,
    },
    /// The prompt's own tokens, for `echo`.
    Prompt {
        text: String,
        logprobs: Vec<TokenLogprob>,
    },
    Delta {
        choice: u32,
        text: String,
        tokens: u32,
        logprobs: Vec<TokenLogprob>,
    },
    /// The last event of a choice.
    Finish {
        choice: u32,
        reason: FinishReason,
        completion_tokens: u32,
    },
    /// The last event of a request that succeeded.
    Done {
        timing: Timing,
    },
    /// The last event of a request that failed.
    Failed(EngineError),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// An end-of-generation token, a stop token, or the end of the grammar.
    Stop,
    /// A stop string, which is not part of the text.
    StopString(String),
    Length,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    pub token: Token,
    /// The token's bytes; not always whole UTF-8.
    pub bytes: ByteBuf,
    /// Natural logarithm of the probability in the model's own distribution (before penalties and
    /// temperature). `None` for the first token of an echoed prompt.
    pub logprob: Option<f32>,
    /// Most probable first.
    pub top: Vec<(Token, ByteBuf, f32)>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    pub queue_seconds: f32,
    /// From the first step to the first token.
    pub prefill_seconds: f32,
    /// From the first token to the last.
    pub decode_seconds: f32,
    pub prompt_tokens: u32,
    pub cached_tokens: u32,
    pub completion_tokens: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Tokens { tokens: Vec<Token>, pieces: Vec<ByteBuf> },
    Text(String),
    Embeddings { vectors: Vec<Vec<f32>>, prompt_tokens: u32 },
    Scores { scores: Vec<f32>, prompt_tokens: u32 },
}

/// A refusal or failure, with a message for the sender of the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    pub kind: EngineErrorKind,
    pub message: String,
    /// The request's field that caused the error, if there is one.
    pub param: Option<String>,
}

impl EngineError {
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self {
            kind: EngineErrorKind::Invalid,
            message: message.into(),
            param: Some(param.to_owned()),
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self { kind: EngineErrorKind::Internal, message: message.into(), param: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EngineErrorKind {
    /// 400.
    Invalid,
    /// 400 with code `context_length_exceeded`.
    ContextLength,
    /// 429: the queue is full.
    Overloaded,
    /// 503: the engine died or is being stopped.
    Unavailable,
    /// 500.
    Internal,
}

/// A snapshot of the engine; counters never decrease.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub steps: u64,
    /// Duration of the longest recent step in seconds, decayed.
    pub step_seconds: f32,
    pub running: u32,
    pub waiting: u32,
    pub paused: u32,
    pub kv_pages_used: u32,
    pub kv_pages_cached: u32,
    pub kv_pages_total: u32,
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    /// Prompt tokens looked up in the prefix index, and tokens found.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preemptions: u64,
    pub adapters_resident: u32,
    pub adapters_waiting: u32,
    /// Rows of the steps since the last snapshot.
    pub batch_sizes: Vec<u32>,
    /// Drafts verified (one per sequence and step), tokens in them, and accepted tokens.
    pub drafts: u64,
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
    /// The drafted and accepted tokens that came from a draft model.
    pub draft_model_tokens: u64,
    pub draft_model_accepted: u64,
}
