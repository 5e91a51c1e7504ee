//! What operations take besides tensors, and the results that are more than a tensor.

use super::frozen::Frozen;
use crate::job::spec::Divergence;
use crate::kernels::vector::{Rope, RopePairs};
use candle_core::{Result, Tensor, bail};
use std::ops::Range;
use std::sync::Arc;

/// √(2/π), of the tanh approximation of GELU.
pub(super) const GELU_ROOT: f64 = 0.797_884_560_802_865_4;
/// Its cubic coefficient.
pub(super) const GELU_CUBIC: f64 = 0.044_715;

/// Cosines and sines for the rows of a batch, and the pairing of a head's dimensions.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// (rows, pairs) cosine and sine.
    pub angles: Arc<Vec<(f64, f64)>>,
    pub pairs: usize,
    /// Pairs dimension `i` with `i + pairs` (NeoX), instead of `2i` with `2i + 1` (GGUF's Llama).
    pub halves: bool,
}

impl Rotation {
    /// The rotation for rows at these positions.
    pub fn new(rope: &Rope, positions: &[usize]) -> Self {
        let (mut angles, mut row) = (Vec::new(), Vec::new());
        for &position in positions {
            rope.angles(position, &mut row);
            angles.extend(row.iter().map(|&(cos, sin)| (f64::from(cos), f64::from(sin))));
        }
        let pairs = rope.rotated() / 2;
        Self { angles: Arc::new(angles), pairs, halves: rope.pairs() == RopePairs::Halves }
    }

    /// The two dimensions of pair `i`.
    pub(super) fn pair(&self, i: usize) -> (usize, usize) {
        if self.halves { (i, i + self.pairs) } else { (2 * i, 2 * i + 1) }
    }
}

/// The attention mask and the transformation of scores.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Start rows of the documents in ascending order; the first is 0. Documents do not attend to
    /// each other.
    pub documents: Arc<Vec<usize>>,
    /// Factor of the query-key products.
    pub scale: f64,
    /// Sliding window: each row attends to at most this many rows, the last of which is the row
    /// itself.
    pub window: Option<usize>,
    /// Soft cap: scores are `cap tanh(score / cap)`.
    pub cap: Option<f64>,
}

impl Scope {
    /// The rows that a row attends to.
    pub(super) fn seen(&self, row: usize) -> Range<usize> {
        let document = self.documents.partition_point(|&start| start <= row);
        let start = self.documents[document.saturating_sub(1)];
        start.max((row + 1).saturating_sub(self.window.unwrap_or(usize::MAX)))..row + 1
    }

    /// The end of the rows that attend to any of the rows `keys`.
    pub(super) fn audience(&self, keys: &Range<usize>, rows: usize) -> usize {
        let next = self.documents.partition_point(|&start| start < keys.end);
        let end = self.documents.get(next).copied().unwrap_or(rows);
        end.min((keys.end - 1).saturating_add(self.window.unwrap_or(rows))).max(keys.end)
    }
}

/// The output matrix: (vocabulary, width).
#[derive(Clone)]
pub enum Head {
    Frozen(Arc<Frozen>),
    Trained(Tensor),
}

/// The targets that rows should predict.
#[derive(Debug, Clone)]
pub struct Targets {
    /// (rows) target tokens.
    pub tokens: Arc<Vec<u32>>,
    /// (rows) loss weight of each row.
    pub weights: Arc<Vec<f32>>,
    /// Soft cap: logits are `cap tanh(logit / cap)`.
    pub cap: Option<f64>,
    /// Divisor of the logits, applied after the cap.
    pub temperature: f64,
}

/// The most probable tokens of a teacher for some rows. What their probabilities lack of 1 is that of
/// all other tokens together.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TeacherRows {
    /// Tokens of a row.
    pub top_k: usize,
    /// (rows, top_k) tokens of a row are different.
    pub tokens: Vec<u32>,
    /// (rows, top_k) ln p.
    pub log_probs: Vec<f32>,
}

/// What a student learns from a teacher.
#[derive(Debug, Clone)]
pub struct Distillation {
    pub teacher: Arc<TeacherRows>,
    pub divergence: Divergence,
    /// Weight of the teacher in the mixture of [`Divergence::Jsd`].
    pub beta: f64,
    /// Divisor of the student's logits, as it was of the teacher's.
    pub temperature: f64,
    /// Weight of the cross-entropy with the targets; that of the divergence is the rest of 1.
    pub cross_entropy: f64,
}

/// The losses of some rows of a student.
pub struct DistillationLosses {
    /// A scalar: the sum of the rows' losses, times their weights.
    pub sum: Tensor,
    pub sums: DistillationSums,
}

/// Sums over rows, times their weights.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DistillationSums {
    /// Divergence from the teacher in nats, at the temperature.
    pub divergence: f64,
    /// Cross-entropy with the targets in nats, at the temperature 1.
    pub cross_entropy: f64,
    /// Rows whose target is the most likely token.
    pub correct: f64,
}

/// Log-probabilities of some rows' targets, and entropies.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LogProbs {
    /// (rows) ln p(target).
    pub of_targets: Vec<f64>,
    /// (rows) -Σ p ln p, in nats.
    pub entropies: Vec<f64>,
}

/// The losses of some rows.
pub struct Losses {
    /// A scalar: the sum of the rows' losses in nats, times their weights.
    pub sum: Tensor,
    /// Weighted number of rows whose target is the most likely token.
    pub correct: f64,
}

impl Head {
    pub(super) fn vocab(&self) -> Result<usize> {
        match self {
            Self::Frozen(frozen) => Ok(frozen.outputs()),
            Self::Trained(tensor) => tensor.dim(0),
        }
    }
}

impl Targets {
    pub(super) fn check(&self, rows: usize, vocab: usize) -> Result<()> {
        if self.tokens.len() != rows || self.weights.len() != rows {
            bail!("{rows} rows, {} targets, {} weights", self.tokens.len(), self.weights.len());
        }
        match self.tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => bail!("target {token} is not below {vocab}"),
            None => Ok(()),
        }
    }
}

impl Distillation {
    pub(super) fn check(&self, rows: usize, vocab: usize) -> Result<()> {
        let TeacherRows { top_k, tokens, log_probs } = &*self.teacher;
        if *top_k == 0 || *top_k > vocab {
            bail!("{top_k} tokens of a vocabulary of {vocab}");
        }
        if tokens.len() != rows * top_k || log_probs.len() != tokens.len() {
            bail!("{rows} rows, {} tokens of the teacher", tokens.len());
        }
        match tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => bail!("the teacher's token {token} is not below {vocab}"),
            None => Ok(()),
        }
    }
}
