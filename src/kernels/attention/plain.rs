//! Scores and weighted sums of one page in scalar code: the bit-exact oracle of the other versions.

use super::Scores;
use crate::kernels::cache::PAGE;
use crate::kernels::pack::{BLOCK, f16_to_f32};
use std::ops::Range;

/// The element type of a page.
pub(crate) trait Number: Copy {
    fn number(self) -> f32;
}

/// Bits of f16.
impl Number for u16 {
    fn number(self) -> f32 {
        f16_to_f32(self)
    }
}

/// Integers of a q8_0 block, without their scale.
impl Number for i8 {
    fn number(self) -> f32 {
        f32::from(self)
    }
}

/// Numbers already converted from either type.
impl Number for f32 {
    fn number(self) -> f32 {
        self
    }
}

/// The scales of a page's numbers. A type, not an option, so that the inner loops are compiled for
/// each case.
pub(crate) trait Scales: Copy {
    /// (blocks, 32) bits of f16, or `None` for numbers without scales.
    fn bits(&self) -> Option<&[u16]>;

    /// Number of dimensions that are summed before scaling.
    fn width(&self, dim: usize) -> usize {
        if self.bits().is_some() { BLOCK } else { dim }
    }
}

/// No scales.
impl Scales for () {
    fn bits(&self) -> Option<&[u16]> {
        None
    }
}

impl Scales for &[u16] {
    fn bits(&self) -> Option<&[u16]> {
        Some(self)
    }
}

/// `scores[row][at..at + 32] = q[row] · keys`; `keys` (head_dim, 32), `scales` (blocks, 32), `q`
/// (rows, head_dim).
pub(crate) fn score<N: Number, S: Scales>(
    q: &[f32],
    keys: &[N],
    scales: S,
    scores: &mut [Scores],
    at: usize,
) {
    let dim = keys.len() / PAGE;
    let width = scales.width(dim);
    for (q, scores) in q.chunks_exact(dim).zip(scores) {
        for (t, score) in scores[at..at + PAGE].iter_mut().enumerate() {
            *score = 0.0;
            for (block, q) in q.chunks(width).enumerate() {
                let mut sum = 0f32;
                for (d, q) in q.iter().enumerate() {
                    sum = keys[(block * width + d) * PAGE + t].number().mul_add(*q, sum);
                }
                *score = match scales.bits() {
                    Some(scales) => f16_to_f32(scales[block * PAGE + t]).mul_add(sum, *score),
                    None => sum,
                };
            }
        }
    }
}

/// `out[row] += scores[row][at + t] * values[t]` for the tokens `tokens` of a page that begins at
/// `at`; `values` (32, dim), `scales` (blocks, 32), `out` (rows, dim).
pub(crate) fn accumulate_values<N: Number, S: Scales>(
    scores: &[Scores],
    at: usize,
    tokens: Range<usize>,
    values: &[N],
    scales: S,
    out: &mut [f32],
) {
    let dim = values.len() / PAGE;
    for (out, scores) in out.chunks_exact_mut(dim).zip(scores) {
        for (d, sum) in out.iter_mut().enumerate() {
            for t in tokens.clone() {
                let weight = match scales.bits() {
                    Some(scales) => scores[at + t] * f16_to_f32(scales[d / BLOCK * PAGE + t]),
                    None => scores[at + t],
                };
                *sum = values[t * dim + d].number().mul_add(weight, *sum);
            }
        }
    }
}
