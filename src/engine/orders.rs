//! What the step loop is told between two steps.

use super::runner::AdapterHandle;
use super::sequence::{Admissible, SeqKey};
use crate::ipc::{AdapterId, EngineError, RequestId, Token};
use std::sync::Arc;

/// What the step loop knows of an adapter.
#[derive(Debug, Clone)]
pub struct AdapterFacts {
    pub digest: [u8; 32],
    /// (width) a reward model's.
    pub head: Option<Arc<[f32]>>,
}

pub enum Order {
    /// A request that has been tokenized and fits.
    Admit(Box<Admissible>),
    /// A request that did not get through intake.
    Refuse(RequestId, EngineError),
    Cancel(RequestId),
    /// Ends a choice as if the model had.
    Finish(SeqKey),
    /// The client reads slowly (true) or has caught up.
    Pause(RequestId, bool),
    /// To be embedded, or scored by a reward model.
    Pool {
        call: u64,
        inputs: Vec<Vec<Token>>,
        scored_by: Option<AdapterId>,
    },
    InstallAdapter {
        call: u64,
        adapter: AdapterId,
        facts: AdapterFacts,
        handle: AdapterHandle,
    },
    UnloadAdapter {
        call: u64,
        adapter: AdapterId,
    },
    Ping {
        call: u64,
    },
    Shutdown,
}
