//! Messages between a job that trains a policy and its gateway.
//!
//! The job sends a [`Call`] over the socket that the gateway gave it, and reads [`Reply`]s up to
//! the last one before it sends the next call. Each message is a frame of [`crate::ipc`].

use crate::grade::{Answer, Failed, Question};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// A call of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Call {
    /// Loads an adapter (a GGUF); later completions are sampled with it. The reply is
    /// [`Reply::Done`].
    LoadPolicy(PathBuf),
    /// Samples completions. Each prompt has a [`Reply::Rollouts`], in any order, before
    /// [`Reply::Done`].
    Generate(RolloutRequest),
    /// Sends graders' questions to their models. The reply is [`Reply::Answers`].
    QueryGraders(Vec<Question>),
}

/// A reply to a call. All but [`Reply::Rollouts`] are the last one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Rollouts {
        /// Number of the prompt in the request.
        prompt: usize,
        completions: Vec<Rollout>,
    },
    /// One answer per question, in their order.
    Answers(Vec<Result<Answer, Failed>>),
    Done,
    Failed(CallError),
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct CallError {
    pub cause: CallCause,
    pub message: String,
}

/// The cause of a failed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallCause {
    /// Temporary: a retry may succeed.
    Passing,
    /// The server refused the call, and will refuse it again.
    Refused,
    /// The server has ended.
    Disconnected,
}

/// A request to sample completions from the policy. Sampling filters and penalties are disabled, so
/// completions follow the model's own distribution.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutRequest {
    pub prompts: Vec<Vec<u32>>,
    /// (prompts) random seeds. A drawn token depends only on the seed, the completion's number and
    /// the position.
    pub seeds: Vec<u64>,
    /// Completions per prompt.
    pub answers: u32,
    /// Maximum number of tokens of a completion.
    pub max_tokens: u32,
    pub temperature: f32,
    /// The form of the completions, as in requests to the server.
    pub response_format: Option<Value>,
    /// A prompt that is longer than the server's context has no completions; otherwise it is an
    /// error.
    #[serde(default)]
    pub skip_too_long: bool,
}

/// One sampled completion.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The tokens in the order of sampling, including the end-of-turn token.
    pub tokens: Vec<u32>,
    /// (tokens) the engine's log-probabilities at the request's temperature, without the form.
    pub log_probs: Vec<f32>,
    pub text: String,
    /// Whether the completion ended with an end-of-turn token, not at `max_tokens`.
    pub ended: bool,
}
