//! What operations take besides tensors, and the results that are more than a tensor.

use super::documents::{Documents, RowBlock};
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

    /// The rotation for some of the rows.
    pub fn select(&self, rows: &[u32]) -> Self {
        let angles = rows.iter().flat_map(|&row| {
            let start = row as usize * self.pairs;
            &self.angles[start..start + self.pairs]
        });
        Self { angles: Arc::new(angles.copied().collect()), ..self.clone() }
    }

    /// The two dimensions of pair `i`.
    pub(super) fn pair(&self, i: usize) -> (usize, usize) {
        if self.halves { (i, i + self.pairs) } else { (2 * i, 2 * i + 1) }
    }
}

/// The attention mask and the transformation of scores.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Documents do not attend to each other, except continuations to what they continue.
    pub documents: Arc<Documents>,
    /// The rows of the queries in ascending order; all rows if `None`.
    pub queries: Option<Arc<Vec<u32>>>,
    /// Factor of the query-key products.
    pub scale: f64,
    /// Sliding window: each row attends to at most this many rows, the last of which is the row
    /// itself.
    pub window: Option<usize>,
    /// Soft cap: scores are `cap tanh(score / cap)`.
    pub cap: Option<f64>,
}

impl Scope {
    /// Number of queries.
    pub(super) fn query_rows(&self) -> usize {
        self.queries.as_ref().map_or(self.documents.rows(), |queries| queries.len())
    }

    /// The queries in blocks of at most `most`.
    pub(super) fn query_blocks(&self, most: usize) -> Vec<RowBlock> {
        self.documents.blocks(self.queries.as_ref().map(|queries| &queries[..]), most)
    }

    /// The positions of a document that its row at `position` attends to.
    pub(super) fn seen(&self, position: usize) -> Range<usize> {
        (position + 1).saturating_sub(self.window.unwrap_or(usize::MAX))..position + 1
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
pub struct LogProbs {
    /// (rows) ln p(target).
    pub of_targets: Tensor,
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
