//! The interface through which completions are sampled while a policy is trained. The serving
//! engine implements it with the policy's adapter.
//!
//! A job sends its requests over the connection that the gateway gave it
//! (`process/gateway_client.rs`), as MessagePack of the types in [`crate::job::rollout`].

use crate::grade::{Answer, Failed, Question};
use crate::job::rollout::{Rollout, RolloutRequest};
use std::path::Path;

/// Why a request failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct RolloutError {
    /// The failure is temporary: a retry may succeed.
    pub passing: bool,
    pub message: String,
}

/// A client of the engine that samples completions and queries grader models.
pub trait RolloutClient {
    /// Loads an adapter (a GGUF); later completions are sampled with it.
    ///
    /// # Errors
    /// If it cannot be loaded.
    fn load_policy(&mut self, adapter: &Path) -> Result<(), RolloutError>;

    /// Samples completions: for each prompt the requested number.
    ///
    /// # Errors
    /// If the engine fails.
    fn generate(&mut self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, RolloutError>;

    /// Sends graders' questions to their models.
    ///
    /// # Errors
    /// If no model can be reached at all. The failure of a single model is reported in its answer.
    fn query_graders(
        &mut self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, RolloutError>;
}
