//! Attention over pages of 32 tokens.
//!
//! A page holds keys as `[head_dim][32]` and values as `[32][head_dim]`, in f16 or q8_0, so that
//! both inner loops read whole registers. With q8_0 the kernels read the integers: a score is
//! scaled once per 32 dimensions, and the scale of a value is multiplied into its token's weight. A
//! query's sum is computed over fixed runs of 512 tokens by position, each with its own softmax,
//! which are merged in order (Dao et al. 2022, arXiv:2205.14135, section 3.1): the result is
//! bit-identical regardless of which thread computes a run and of the other queries. So a page that
//! several sequences share is read once for all of them, and the runs of one long sequence are
//! distributed over the threads.

mod plan;
#[cfg(test)]
mod tests;
mod tile;

pub use plan::Plan;
pub(super) use plan::Query;
pub(super) use tile::{Head, Scratch, merge_runs};

/// The attention mask and score transformation of a query.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Scope {
    /// Number of tokens that a query attends to, the last of which is its own; `None` for all.
    pub window: Option<usize>,
    /// Soft cap: scores `s` become `cap * tanh(s / cap)`.
    pub cap: Option<f32>,
}

/// Tokens per run.
pub const RUN: usize = 512;
/// Query heads that the kernels process at once.
pub(super) const ROWS: usize = 4;
/// Query heads per tile, unless more share one head of the cache: their scores of a run take 64
/// KiB.
const TILE: usize = 32;

/// (512) one query head's scores for one run.
pub(super) type Scores = [f32; RUN];
