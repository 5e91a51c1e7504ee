//! Scores and weighted sums of one page.

use crate::kernels::attention::Scores;
use crate::kernels::cache::{Numbers, PAGE};
use crate::kernels::pack::{BLOCK, f16_to_f32};
use crate::kernels::vector::exp;
use std::ops::Range;

/// The element type of a page.
pub(crate) trait Element: Copy {
    fn number(self) -> f32;
}

/// Bits of f16.
impl Element for u16 {
    fn number(self) -> f32 {
        f16_to_f32(self)
    }
}

/// Integers of a q8_0 block, without their scale.
impl Element for i8 {
    fn number(self) -> f32 {
        f32::from(self)
    }
}

/// Numbers already converted from either type.
impl Element for f32 {
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

/// Scores of one page; see [`Attention::score`](super::Attention::score).
pub(super) fn score(q: &[f32], keys: Numbers, scores: &mut [Scores], at: usize) {
    match keys {
        Numbers::F16(keys) => score_page(q, keys, (), scores, at),
        Numbers::Q8 { q: keys, d } => score_page(q, keys, d, scores, at),
        Numbers::Wide { x, d: None } => score_page(q, x, (), scores, at),
        Numbers::Wide { x, d: Some(d) } => score_page(q, x, d, scores, at),
    }
}

/// Weighted sums of one page; see [`Attention::accumulate_values`](super::Attention).
pub(super) fn accumulate_values(
    scores: &[Scores],
    at: usize,
    tokens: Range<usize>,
    values: Numbers,
    out: &mut [f32],
) {
    match values {
        Numbers::F16(values) => accumulate_page(scores, at, tokens, values, (), out),
        Numbers::Q8 { q, d } => accumulate_page(scores, at, tokens, q, d, out),
        Numbers::Wide { x, d: None } => accumulate_page(scores, at, tokens, x, (), out),
        Numbers::Wide { x, d: Some(d) } => accumulate_page(scores, at, tokens, x, d, out),
    }
}

/// Converts numbers to f32; see [`Attention::widen`](super::Attention).
pub(super) fn widen(from: Numbers, range: Range<usize>, to: &mut [f32]) {
    fn widen<N: Element>(from: &[N], to: &mut [f32]) {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = from.number());
    }
    match from {
        Numbers::F16(x) => widen(&x[range], to),
        Numbers::Q8 { q, .. } => widen(&q[range], to),
        Numbers::Wide { x, .. } => widen(&x[range], to),
    }
}

/// `scores[row][at..at + 32] = q[row] · keys`; `keys` (head_dim, 32), `scales` (blocks, 32), `q`
/// (rows, head_dim).
fn score_page<N: Element, S: Scales>(
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
fn accumulate_page<N: Element, S: Scales>(
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

/// The softmax of one run; see [`Attention::softmax`](super::Attention::softmax).
pub(in crate::kernels::isa) fn softmax(scores: &mut [f32]) -> (f32, f32) {
    let mut largest = [f32::NEG_INFINITY; 8];
    let (whole, rest) = scores.as_chunks::<8>();
    for eight in whole {
        for (largest, score) in largest.iter_mut().zip(eight) {
            *largest = largest.max(*score);
        }
    }
    let max = largest.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let mut lanes = [0f32; 8];
    let (whole, rest) = scores.as_chunks_mut::<8>();
    for eight in whole {
        add_exponentials(eight, max, &mut lanes);
    }
    add_exponentials(rest, max, &mut lanes);
    (max, lanes.iter().sum())
}

/// Replaces at most eight scores by e^(score - max) and adds each to its lane.
#[inline(always)]
pub(in crate::kernels::isa) fn add_exponentials(
    scores: &mut [f32],
    max: f32,
    lanes: &mut [f32; 8],
) {
    for (lane, score) in lanes.iter_mut().zip(scores) {
        *score = exp(*score - max);
        *lane += *score;
    }
}
