//! Messages between a job that trains a policy and its gateway.
//!
//! The job sends requests over the connection that the gateway gave it. Requests and replies are
//! the types of this file, encoded as MessagePack.

use serde::{Deserialize, Serialize};

/// Path of rollout requests.
pub const ROLLOUTS: &str = "/job/rollouts";
/// Path of requests that load an adapter.
pub const POLICY: &str = "/job/policy";
/// Path of requests that query grader models.
pub const ANSWERS: &str = "/job/answers";

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
}

/// One sampled completion.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// The tokens in the order of sampling, including the end-of-turn token.
    pub tokens: Vec<u32>,
    /// (tokens) the sampler's log-probabilities at the request's temperature.
    pub log_probs: Vec<f32>,
    pub text: String,
    /// Whether the completion ended with an end-of-turn token, not at `max_tokens`.
    pub ended: bool,
}
