//! Commands that the step loop handles between two steps.

use super::runner::AdapterHandle;
use super::sequence::{SeqKey, ValidRequest};
use crate::ipc::{AdapterId, EngineError, RequestId, Token};
use std::sync::Arc;

/// The properties of an installed adapter that the step loop needs.
#[derive(Debug, Clone)]
pub(super) struct AdapterFacts {
    pub digest: [u8; 32],
    /// Head of a reward model, shape (width).
    pub head: Option<Arc<[f32]>>,
}

pub(super) enum Command {
    /// Admits a request that has been tokenized and validated.
    Admit(Box<ValidRequest>),
    /// Reports a request that intake rejected.
    Refuse(RequestId, EngineError),
    Cancel(RequestId),
    /// Finishes a choice as if the model had produced EOS.
    Finish(SeqKey),
    /// Pauses a request whose client reads slowly (true), or resumes it (false).
    Pause(RequestId, bool),
    /// Embeds inputs, or scores them with a reward model.
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
