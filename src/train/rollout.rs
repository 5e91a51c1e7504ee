//! Who answers prompts while a policy is trained: the serving engine, with the policy's adapter.
//!
//! A job asks over the connection that the gateway gave it (`job/link.rs`); the requests and replies
//! are these types, in MessagePack.

use crate::grade::{Answer, Failed, Question};
use crate::job::rollout::{Rollout, RolloutRequest};
use std::path::Path;

/// Why nobody answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct RolloutError {
    /// It may be otherwise in a moment.
    pub passing: bool,
    pub message: String,
}

/// Who answers.
pub trait RolloutClient {
    /// Has an adapter (a GGUF) answer from now on.
    ///
    /// # Errors
    /// If it cannot be loaded.
    fn load_policy(&mut self, adapter: &Path) -> Result<(), RolloutError>;

    /// Samples answers: of each prompt as many as were asked for.
    ///
    /// # Errors
    /// If the engine fails.
    fn generate(&mut self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, RolloutError>;

    /// Asks other models what graders want to know.
    ///
    /// # Errors
    /// If nobody can be asked at all; a model that fails is in its answer.
    fn query_graders(
        &mut self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, RolloutError>;
}
