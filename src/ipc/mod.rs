//! The frames exchanged between processes; processes share nothing else.
//!
//! A frame is a little-endian `u32` length followed by that many bytes of MessagePack (`rmp-serde`,
//! named fields, so that messages can gain fields). The gateway sends [`ToEngine`], the engine
//! [`FromEngine`]; a job sends [`Call`](crate::job::rollout::Call), the gateway
//! [`Reply`](crate::job::rollout::Reply). Both ends are the same executable, so there is no version negotiation.

mod frame;
mod types;

pub use frame::{FrameError, MAX_FRAME, encode, next_frame, read_frame, write_frame};
pub use types::*;

/// The environment variable in which the gateway passes the log level to an engine.
pub const ENGINE_LOG: &str = "INGOT_ENGINE_LOG";
