//! The frames that cross a process boundary; nothing else does.
//!
//! A frame is a little-endian `u32` length followed by that many bytes of MessagePack
//! (`rmp-serde`, named fields, so that both sides may grow). The gateway speaks [`ToEngine`], the
//! engine [`FromEngine`]. Both ends are the same executable, so there is no version negotiation.

mod frame;
mod types;

pub use frame::{FrameError, MAX_FRAME, decode, encode, read_frame, write_frame};
pub use types::*;

/// The environment variable with which the gateway says how much an engine is to log.
pub const ENGINE_LOG: &str = "INGOT_ENGINE_LOG";
