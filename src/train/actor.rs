//! Who answers prompts while a policy is trained: the serving engine, with the policy's adapter.
//!
//! A job asks over the connection that the gateway gave it (`job/link.rs`); the requests and replies
//! are these types, in MessagePack.

use crate::grade::{Answer, Failed, Question};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Where rollouts are asked for.
pub const ROLLOUTS: &str = "/job/rollouts";
/// Where an adapter is put in place.
pub const POLICY: &str = "/job/policy";
/// Where questions of graders are asked.
pub const ANSWERS: &str = "/job/answers";

/// Prompts to be answered by the policy. What cuts or penalizes tokens is off: samples are the
/// distribution's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollouts {
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

/// Why nobody answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ActorError {
    /// It may be otherwise in a moment.
    pub passing: bool,
    pub message: String,
}

/// Who answers.
pub trait Actor {
    /// Has an adapter (a GGUF) answer from now on.
    ///
    /// # Errors
    /// If it cannot be loaded.
    fn adopt(&mut self, adapter: &Path) -> Result<(), ActorError>;

    /// Samples answers: of each prompt as many as were asked for.
    ///
    /// # Errors
    /// If the engine fails.
    fn sample(&mut self, what: &Rollouts) -> Result<Vec<Vec<Rollout>>, ActorError>;

    /// Asks other models what graders want to know.
    ///
    /// # Errors
    /// If nobody can be asked at all; a model that fails is in its answer.
    fn ask(&mut self, questions: &[Question]) -> Result<Vec<Result<Answer, Failed>>, ActorError>;
}
