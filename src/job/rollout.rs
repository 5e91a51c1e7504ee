//! What a job and its gateway say to each other while a policy is trained.
//!
//! A job asks over the connection that the gateway gave it; requests and replies are these types, in
//! MessagePack.

use serde::{Deserialize, Serialize};

/// Where rollouts are asked for.
pub const ROLLOUTS: &str = "/job/rollouts";
/// Where an adapter is put in place.
pub const POLICY: &str = "/job/policy";
/// Where questions of graders are asked.
pub const ANSWERS: &str = "/job/answers";

/// Prompts to be answered by the policy. What cuts or penalizes tokens is off: samples are the
/// distribution's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RolloutRequest {
    pub prompts: Vec<Vec<u32>>,
    /// (prompts) a draw depends on it, the answer's number and the position, and on nothing else.
    pub seeds: Vec<u64>,
    /// Answers to each prompt.
    pub answers: u32,
    /// Tokens of an answer, at most.
    pub max_tokens: u32,
    pub temperature: f32,
}

/// One sampled answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// As they were drawn, the one that ends the turn included.
    pub tokens: Vec<u32>,
    /// (tokens) the sampler's log-probabilities, at the temperature.
    pub log_probs: Vec<f32>,
    pub text: String,
    /// It ended by itself.
    pub ended: bool,
}
