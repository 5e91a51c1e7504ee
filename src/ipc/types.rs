//! What gateway and engine say to each other.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::path::PathBuf;

/// A token id of the model's vocabulary.
pub type Token = u32;

/// Identifies one generate request on one engine connection; chosen by the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(pub u64);

/// Identifies one loaded version of an adapter on one engine. Reloading a name gives it a new id,
/// so a request that started with the old version ends with it.
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
    /// Ends one choice of a request as if the model had ended it.
    Finish {
        request: RequestId,
        choice: u32,
    },
    /// The client reads slowly: schedule no more rows for it until [`ToEngine::Resume`].
    Pause(RequestId),
    Resume(RequestId),
    /// Answered by exactly one [`FromEngine::Reply`] with the same number.
    Call {
        call: u64,
        what: Call,
    },
    /// Leave after the current step; running requests are not waited for.
    Shutdown,
}

/// Longest input that is embedded or scored, in tokens, where the model's context is longer. Such an
/// input has a cache of its own.
pub const MAX_POOLED_TOKENS: u32 = 8192;

/// Everything an engine needs to load a model; resolved by the gateway, immutable afterwards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadSpec {
    pub model: PathBuf,
    /// A model that drafts for it.
    pub draft: Option<PathBuf>,
    pub runner: RunnerKind,
    /// Longest prompt plus output of one request, in tokens.
    pub context_length: u32,
    /// Size of the KV cache over all requests, in tokens.
    pub kv_tokens: u32,
    /// Requests that may be in one batch, at most.
    pub max_sequences: u32,
    /// Tokens in one step, at most.
    pub batch_tokens: u32,
    pub kv_type: KvCacheType,
    pub flash_attention: bool,
    pub kv_layout: KvLayout,
    pub threads: u32,
    pub gpu_layers: u32,
    pub mmap: bool,
    /// While requests decode, prefill is cut into chunks so that a step takes about this long.
    pub target_step_ms: u32,
    /// Requests that may wait in the engine; one more is refused.
    pub queue_limit: u32,
    pub speculate: Speculate,
    /// Mock runner only: a step takes this long, in microseconds.
    pub mock_step_us: u64,
}

impl LoadSpec {
    /// A model the plain way, for tests and measurements, which change what they are about.
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
    /// Our own kernels: what they cover; a file that they do not falls to llama.cpp.
    Native,
    /// llama.cpp: any GGUF that it can load.
    LlamaCpp,
    /// No model at all: deterministic tokens from a byte vocabulary, for tests of the server.
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

/// How the llama_cpp runner lays out its cache (measurements: docs/log/serving.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum KvLayout {
    /// One buffer for all sequences: a shared prefix is metadata.
    Unified,
    /// One buffer per sequence: a shared prefix is copied.
    Streams,
}

/// When the engine drafts tokens and checks them in the rows of one step. Output is the same bits
/// either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Speculate {
    /// While the measured cost of a row is less than what it is likely to gain.
    Auto,
    /// Whatever it costs: for measurements.
    Always,
    Off,
}

/// One request for text, validated by the gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generate {
    pub id: RequestId,
    pub prompt: Prompt,
    /// Independent continuations of the one prompt (OpenAI's `n`), at least 1.
    pub choices: u32,
    pub sampling: SamplingParams,
    pub stop: StopParams,
    /// `Some(k)`: the chosen token's logprob and the `k` most likely ones at every position.
    pub logprobs: Option<u32>,
    /// Also report the prompt's own tokens (and logprobs, if asked for): OpenAI's `echo`.
    pub echo: bool,
    pub grammar: Option<GrammarSpec>,
    pub adapter: Option<AdapterId>,
    /// Prefix pages are shared only between requests of equal salt.
    pub tenant: u64,
    /// Higher runs earlier.
    pub priority: i32,
    /// Requests of one key share a fair queue, whatever their number.
    pub fair_key: u64,
    /// Text of control tokens (`<tool_call>`, `</think>`) is part of the output. End-of-turn
    /// tokens never are.
    pub render_special: bool,
    /// Tokens drafted for one step, at most; `None` leaves it to the engine.
    pub max_drafted: Option<u32>,
    /// For training on it: all tokens that are drawn are reported, the one that ends the output too,
    /// and log-probabilities are those of the distribution at the temperature.
    pub rollout: bool,
}

impl Generate {
    /// One greedy choice and nothing else, for tests and measurements, which change what they are
    /// about.
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
        /// Put the model's BOS in front, where its vocabulary asks for one.
        add_special: bool,
        /// Recognise control tokens in the text (rendered templates) or take them as plain text.
        parse_special: bool,
    },
    /// What a chat template made of a conversation: control tokens are recognised, but for those that
    /// span a barrier (ascending offsets in bytes), which are text.
    Rendered {
        text: String,
        barriers: Vec<usize>,
        add_special: bool,
    },
    Tokens(Vec<Token>),
    /// Texts that are tokenized apart, as training sees a conversation.
    Pieces {
        pieces: Vec<PromptPiece>,
        add_special: bool,
        parse_special: bool,
        /// An end-of-text token follows.
        ends: bool,
    },
    /// Fill in the middle: needs a model with infill tokens.
    Infill {
        prefix: String,
        suffix: String,
    },
}

impl Prompt {
    /// The prompt as people read it: its text, or its token ids.
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
    /// As those of [`Prompt::Rendered`].
    pub barriers: Vec<usize>,
}

/// How the next token is drawn. Neutral values switch a stage off.
///
/// Stages run in llama.cpp's default order: logit bias, grammar mask, repetition, frequency and
/// presence penalties, DRY, top-k, typical-p, top-p, min-p, XTC, temperature, draw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    pub top_p: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    pub min_p: f32,
    pub typical_p: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub repetition_penalty: f32,
    /// Tokens of prompt and output that the repetition penalty looks back on; 0 is all.
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
    /// `None`: until the context is full.
    pub max_tokens: Option<u32>,
    /// Never part of the output.
    pub strings: Vec<String>,
    pub token_ids: Vec<Token>,
    /// Go on past end-of-generation tokens (benchmarks); their text is left out.
    pub ignore_eos: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GrammarSpec {
    pub grammar: Grammar,
    /// `Some`: text is free until one of these appears.
    pub trigger: Option<GrammarTrigger>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Grammar {
    /// A JSON schema, as JSON text.
    JsonSchema(String),
    /// Any JSON object.
    JsonObject,
    Regex(String),
    /// llguidance's Lark dialect.
    Lark(String),
    /// Lark of our own around JSON values: in their objects no key repeats.
    JsonLark {
        lark: String,
        /// The markers of a block of reasoning that may come first.
        reasoning: Option<(String, String)>,
    },
    /// A JSON schema whose unknown keywords are ignored, as those of tools are.
    LenientJsonSchema(String),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GrammarTrigger {
    /// The first of these to appear in the output switches the grammar on; while none has come,
    /// nothing is constrained.
    pub texts: Vec<String>,
    /// Only where the output begins with the text (leading white space aside).
    pub at_start_only: bool,
    /// The grammar describes the trigger text itself too (tool-call markers); otherwise it begins
    /// after it (the end of a reasoning block).
    pub inclusive: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Call {
    Tokenize {
        text: String,
        add_special: bool,
        parse_special: bool,
    },
    /// A prompt as [`Prompt::Rendered`].
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
    /// One number per input: what a reward model's head makes of the last token.
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
    /// Requests that use it finish first; the reply comes at once.
    UnloadAdapter {
        adapter: AdapterId,
    },
    /// Compiles a grammar without using it, so that a bad one is a 400 before any stream starts.
    CheckGrammar {
        grammar: Grammar,
    },
    /// Answered by the step loop: proof that it turns.
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
    /// Sent after a step, at most every 50 ms, and once when the engine falls idle.
    Progress(Progress),
}

/// What the gateway must know of a loaded model.
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
    /// Longest input that is embedded or scored, in tokens.
    pub pooled_length: u32,
    pub can_infill: bool,
    /// False for recurrent and hybrid models.
    pub shares_prefixes: bool,
    /// Rows of different adapters may share a batch.
    pub mixes_adapters: bool,
    /// Drafts are checked here: a row's numbers do not depend on the batch's shape, and speculation
    /// is not switched off.
    pub speculates: bool,
    pub kv_pages: u32,
    pub page_tokens: u32,
    pub max_sequences: u32,
    /// Control tokens by text, for tool-call and reasoning markers.
    pub special_tokens: Vec<(String, Token)>,
    /// Seconds to load, the first decoded token included.
    pub load_seconds: f32,
    /// Seconds for the one-token step at load: the watchdog's first measure of patience.
    pub step_seconds: f32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The prompt is tokenized and fits; sent once, before anything else.
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
    /// The last event of a request that ended well.
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
    /// Natural logarithm, of the model's own distribution (before penalties and temperature).
    /// `None` for the first token of an echoed prompt.
    pub logprob: Option<f32>,
    /// Most likely first.
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

/// A refusal or failure, already worded for the person who sent the request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    pub kind: EngineErrorKind,
    pub message: String,
    /// The request's field at fault, where there is one.
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

/// A snapshot of the engine; counters only grow.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub steps: u64,
    /// Longest recent step, decayed, in seconds.
    pub step_seconds: f32,
    pub running: u32,
    pub waiting: u32,
    pub paused: u32,
    pub kv_pages_used: u32,
    pub kv_pages_cached: u32,
    pub kv_pages_total: u32,
    pub prefill_tokens: u64,
    pub decode_tokens: u64,
    /// Prompt tokens looked up in the prefix index, and those found there.
    pub prefix_queries: u64,
    pub prefix_hits: u64,
    pub preemptions: u64,
    pub adapters_resident: u32,
    pub adapters_waiting: u32,
    /// Rows of the steps since the last snapshot.
    pub batch_sizes: Vec<u32>,
    /// Drafts checked (one a sequence and step), the tokens in them, and those that stood.
    pub drafts: u64,
    pub drafted_tokens: u64,
    pub accepted_tokens: u64,
    /// Those of them that a draft model came up with.
    pub modelled_tokens: u64,
    pub accepted_modelled: u64,
}
