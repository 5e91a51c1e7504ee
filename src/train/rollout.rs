//! The interface through which completions are sampled while a policy is trained. The serving
//! engine implements it with the policy's adapter.
//!
//! A job calls the gateway that started it (`process/gateway_client.rs`).

use crate::grade::{Answer, Failed, Question};
use crate::job::rollout::{CallError, Rollout, RolloutRequest};
use std::path::Path;

/// A client of the engine that samples completions and queries grader models.
pub trait RolloutClient {
    /// Loads an adapter (a GGUF); later completions are sampled with it.
    ///
    /// # Errors
    /// If it cannot be loaded.
    fn load_policy(&mut self, adapter: &Path) -> Result<(), CallError>;

    /// Begins to sample completions with the policy that was loaded last. The next call is
    /// [`RolloutClient::collect`].
    ///
    /// # Errors
    /// If the request cannot be sent.
    fn start(&mut self, what: &RolloutRequest) -> Result<(), CallError>;

    /// Waits for the completions of the request that was started: for each prompt the requested
    /// number.
    ///
    /// # Errors
    /// If the engine fails.
    fn collect(&mut self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, CallError>;

    /// Samples completions.
    ///
    /// # Errors
    /// As [`RolloutClient::start`] and [`RolloutClient::collect`].
    fn generate(&mut self, what: &RolloutRequest) -> Result<Vec<Vec<Rollout>>, CallError> {
        self.start(what)?;
        self.collect(what)
    }

    /// Sends graders' questions to their models.
    ///
    /// # Errors
    /// If no model can be reached at all. The failure of a single model is reported in its answer.
    fn query_graders(
        &mut self,
        questions: &[Question],
    ) -> Result<Vec<Result<Answer, Failed>>, CallError>;
}
