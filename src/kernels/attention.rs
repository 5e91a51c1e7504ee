//! Attention over pages of 32 tokens.
//!
//! A page holds keys as `[head_dim][32]` and values as `[32][head_dim]`, in f16 or q8_0, so that both
//! inner loops read whole registers. Of q8_0 they read the integers: a score is scaled once for every
//! 32 dimensions, a token's weight instead of its value. A query's sum runs over fixed runs of 512 tokens by position, each
//! with a softmax of its own, merged in their order (Dao et al. 2022, arXiv:2205.14135, section
//! 3.1): who computes a run, and with which other queries, changes no bit. So a page that several
//! sequences share is read once for all of them, and the runs of one long sequence are shared out
//! over the threads.

pub(super) mod plain;
mod plan;
#[cfg(test)]
mod tests;
mod tile;

pub use plan::Plan;
pub(super) use plan::Query;
pub(super) use tile::{Head, Scratch, merge_runs};

/// What a query sees of the tokens before it, and how.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scope {
    /// Tokens that it sees, its own the last of them; `None`: all.
    pub window: Option<usize>,
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub cap: Option<f32>,
}

/// Tokens of a run.
pub const RUN: usize = 512;
/// Query heads that the kernels take at once.
pub(super) const ROWS: usize = 4;
/// Query heads of a tile, unless more share one head of the cache: their scores of a run are 64 KiB.
const TILE: usize = 32;

/// (512) one query head's scores of a run.
pub(super) type Scores = [f32; RUN];
