//! What the step loop is told between two steps.

use super::runner::AdapterHandle;
use super::sequence::Admissible;
use crate::ipc::{AdapterId, EngineError, RequestId, Token};

pub enum Order {
    /// A request that has been tokenized and fits.
    Admit(Box<Admissible>),
    /// A request that did not get through intake.
    Refuse(RequestId, EngineError),
    Cancel(RequestId),
    /// The client reads slowly (true) or has caught up.
    Pause(RequestId, bool),
    Embed {
        call: u64,
        inputs: Vec<Vec<Token>>,
    },
    InstallAdapter {
        call: u64,
        adapter: AdapterId,
        digest: [u8; 32],
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
