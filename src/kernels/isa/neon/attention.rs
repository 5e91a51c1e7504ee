//! Scores and weighted sums of one page, for NEON.

use super::super::scalar::{self, Scales};
use super::{Floats, halves_to_f32, plus_products, plus_times, signed_whole};
use crate::kernels::attention::{RUN, Scores};
use crate::kernels::cache::{Numbers, PAGE};
use crate::kernels::pack::BLOCK;
use std::arch::aarch64::*;
use std::ops::Range;

/// The element type of a page.
trait Number: scalar::Element {
    /// # Safety
    /// Eight numbers must be readable, and the CPU must have NEON.
    unsafe fn eight(from: *const Self) -> Floats;
}

impl Number for u16 {
    #[inline(always)]
    unsafe fn eight(from: *const u16) -> Floats {
        // SAFETY: guaranteed by the caller.
        unsafe { halves_to_f32(vld1q_u16(from)) }
    }
}

impl Number for i8 {
    #[inline(always)]
    unsafe fn eight(from: *const i8) -> Floats {
        // SAFETY: guaranteed by the caller.
        unsafe { signed_whole(vld1_s8(from)) }
    }
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn eight(from: *const f32) -> Floats {
        // SAFETY: guaranteed by the caller.
        unsafe { [vld1q_f32(from), vld1q_f32(from.add(4))] }
    }
}

/// # Safety
/// Eight numbers must be writable, and the CPU must have NEON.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn store(to: *mut f32, x: Floats) {
    // SAFETY: guaranteed by the caller.
    unsafe {
        vst1q_f32(to, x[0]);
        vst1q_f32(to.add(4), x[1]);
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn times(x: Floats, y: Floats) -> Floats {
    [vmulq_f32(x[0], y[0]), vmulq_f32(x[1], y[1])]
}

/// Scores of one page; see [`Attention::score`](crate::kernels::isa::Attention::score).
pub(super) fn score(q: &[f32], keys: Numbers, scores: &mut [Scores], at: usize) {
    match keys {
        Numbers::F16(keys) => score_page(q, keys, (), scores, at),
        Numbers::Q8 { q: keys, d } => score_page(q, keys, d, scores, at),
        Numbers::Wide { x, d: None } => score_page(q, x, (), scores, at),
        Numbers::Wide { x, d: Some(d) } => score_page(q, x, d, scores, at),
    }
}

/// Weighted sums of one page; see [`Attention`](crate::kernels::isa::Attention).
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

/// Converts numbers to f32; see [`Attention`](crate::kernels::isa::Attention).
pub(super) fn widen(from: Numbers, range: Range<usize>, to: &mut [f32]) {
    match from {
        Numbers::F16(x) => widen_numbers(&x[range], to),
        Numbers::Q8 { q, .. } => widen_numbers(&q[range], to),
        Numbers::Wide { x, .. } => to.copy_from_slice(&x[range]),
    }
}

/// Converts to f32; the lengths must be equal multiples of eight. The CPU must have NEON.
fn widen_numbers<N: Number>(from: &[N], to: &mut [f32]) {
    assert!(from.len() == to.len() && from.len().is_multiple_of(8));
    /// # Safety
    /// Both must have `count` numbers, a multiple of eight, and the CPU must have NEON.
    #[target_feature(enable = "neon")]
    unsafe fn widen<N: Number>(from: *const N, to: *mut f32, count: usize) {
        for at in (0..count).step_by(8) {
            // SAFETY: guaranteed by the caller.
            unsafe { store(to.add(at), N::eight(from.add(at))) };
        }
    }
    // SAFETY: the lengths match; these kernels are chosen only after checking the CPU's features.
    unsafe { widen(from.as_ptr(), to.as_mut_ptr(), from.len()) }
}

fn fit<S: Scales>(scales: S, dim: usize) -> bool {
    scales.bits().is_none_or(|scales| scales.len() == dim.div_ceil(BLOCK) * PAGE)
}

/// `scores[row][at..at + 32] = q[row] · keys`; `keys` (head_dim, 32), `scales` (blocks, 32), `q`
/// (rows, head_dim), at most four rows. The CPU must have NEON.
fn score_page<N: Number, S: Scales>(
    q: &[f32],
    keys: &[N],
    scales: S,
    scores: &mut [Scores],
    at: usize,
) {
    let dim = keys.len() / PAGE;
    assert!(keys.len() == dim * PAGE && at + PAGE <= RUN && q.len() == scores.len() * dim);
    assert!(fit(scales, dim));
    // SAFETY: the lengths match; these kernels are chosen only after checking the CPU's features.
    unsafe {
        match scores.len() {
            1 => score_rows::<1, N, S>(q, keys, scales, scores, at, dim),
            2 => score_rows::<2, N, S>(q, keys, scales, scores, at, dim),
            3 => score_rows::<3, N, S>(q, keys, scales, scores, at, dim),
            4 => score_rows::<4, N, S>(q, keys, scales, scores, at, dim),
            rows => unreachable!("{rows} rows"),
        }
    }
}

/// # Safety
/// `q` must have `R` rows of `dim`, `keys` `dim` rows of 32 and `scales` one row for every block of
/// them; the CPU must have NEON.
#[target_feature(enable = "neon")]
unsafe fn score_rows<const R: usize, N: Number, S: Scales>(
    q: &[f32],
    keys: &[N],
    scales: S,
    scores: &mut [Scores],
    at: usize,
    dim: usize,
) {
    let (q, keys, width) = (q.as_ptr(), keys.as_ptr(), scales.width(dim));
    for half in [0, 16] {
        for (block, from) in (0..dim).step_by(width).enumerate() {
            let mut sums = [[[vdupq_n_f32(0.0); 2]; 2]; R];
            for d in from..(from + width).min(dim) {
                // SAFETY: guaranteed by the caller.
                let (k0, k1) = unsafe {
                    let k = keys.add(d * PAGE + half);
                    (N::eight(k), N::eight(k.add(8)))
                };
                for r in 0..R {
                    // SAFETY: guaranteed by the caller.
                    let x = unsafe { *q.add(r * dim + d) };
                    sums[r][0] = plus_times(sums[r][0], k0, x);
                    sums[r][1] = plus_times(sums[r][1], k1, x);
                }
            }
            for r in 0..R {
                for w in 0..2 {
                    let place = scores[r][at + half + 8 * w..][..8].as_mut_ptr();
                    // SAFETY: eight numbers are read and written.
                    unsafe {
                        let sum = match scales.bits() {
                            Some(scales) => {
                                let scale = scales.as_ptr().add(block * PAGE + half + 8 * w);
                                let before = match block {
                                    0 => [vdupq_n_f32(0.0); 2],
                                    _ => f32::eight(place),
                                };
                                plus_products(before, Number::eight(scale), sums[r][w])
                            }
                            None => sums[r][w],
                        };
                        store(place, sum);
                    }
                }
            }
        }
    }
}

/// `out[row] += scores[row][at + t] * values[t]` for the tokens `tokens` of a page that begins at
/// `at`; `values` (32, dim), `scales` (blocks, 32), `out` (rows, dim), at most four rows, `dim` a
/// multiple of 8. The CPU must have NEON.
fn accumulate_page<N: Number, S: Scales>(
    scores: &[Scores],
    at: usize,
    tokens: Range<usize>,
    values: &[N],
    scales: S,
    out: &mut [f32],
) {
    let dim = values.len() / PAGE;
    assert!(values.len() == dim * PAGE && dim.is_multiple_of(8) && fit(scales, dim));
    assert!(tokens.end <= PAGE && at + PAGE <= RUN && out.len() == scores.len() * dim);
    // SAFETY: the lengths match; these kernels are chosen only after checking the CPU's features.
    unsafe {
        match scores.len() {
            1 => weigh_rows::<1, N, S>(scores, at, tokens, values, scales, out, dim),
            2 => weigh_rows::<2, N, S>(scores, at, tokens, values, scales, out, dim),
            3 => weigh_rows::<3, N, S>(scores, at, tokens, values, scales, out, dim),
            4 => weigh_rows::<4, N, S>(scores, at, tokens, values, scales, out, dim),
            rows => unreachable!("{rows} rows"),
        }
    }
}

/// # Safety
/// `values` must have 32 rows of `dim`, a multiple of 8, `out` `R` such rows, and `scales` 32 for
/// every block of them; the CPU must have NEON.
#[target_feature(enable = "neon")]
unsafe fn weigh_rows<const R: usize, N: Number, S: Scales>(
    scores: &[Scores],
    at: usize,
    tokens: Range<usize>,
    values: &[N],
    scales: S,
    out: &mut [f32],
    dim: usize,
) {
    let (first, count) = (tokens.start, tokens.len());
    let mut scaled = [[0f32; PAGE]; R];
    let (values, out) = (values[first * dim..].as_ptr(), out.as_mut_ptr());
    let width = scales.width(dim);
    for (block, from) in (0..dim).step_by(width).enumerate() {
        let mut weights: [*const f32; R] =
            std::array::from_fn(|r| scores[r][at + first..].as_ptr());
        if let Some(scales) = scales.bits() {
            let scales = &scales[block * PAGE..][..PAGE];
            for (r, scaled) in scaled.iter_mut().enumerate() {
                for t in (0..PAGE).step_by(8) {
                    // SAFETY: eight numbers are read and written.
                    unsafe {
                        let score = f32::eight(scores[r].as_ptr().add(at + t));
                        let scale = Number::eight(scales.as_ptr().add(t));
                        store(scaled.as_mut_ptr().add(t), times(score, scale));
                    }
                }
                weights[r] = scaled[first..].as_ptr();
            }
        }
        let (mut d, end) = (from, (from + width).min(dim));
        while d + 16 <= end {
            // SAFETY: every row has sixteen columns from here on, and there are 32 weights.
            unsafe {
                let (values, out) = (values.add(d), out.add(d));
                weigh_columns::<R, 2, N>(weights, values, out, count, dim);
            }
            d += 16;
        }
        if d < end {
            // SAFETY: as above, with eight columns.
            unsafe {
                let (values, out) = (values.add(d), out.add(d));
                weigh_columns::<R, 1, N>(weights, values, out, count, dim);
            }
        }
    }
}

/// # Safety
/// There must be weights and rows of values for all of `tokens`, and `R` rows of `out`, `dim`
/// apart, each with `8 W` columns; the CPU must have NEON.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn weigh_columns<const R: usize, const W: usize, N: Number>(
    weights: [*const f32; R],
    values: *const N,
    out: *mut f32,
    tokens: usize,
    dim: usize,
) {
    let mut sums = [[[vdupq_n_f32(0.0); 2]; W]; R];
    for r in 0..R {
        for w in 0..W {
            // SAFETY: guaranteed by the caller.
            sums[r][w] = unsafe { f32::eight(out.add(r * dim + 8 * w)) };
        }
    }
    for t in 0..tokens {
        let mut v = [[vdupq_n_f32(0.0); 2]; W];
        for w in 0..W {
            // SAFETY: guaranteed by the caller.
            v[w] = unsafe { N::eight(values.add(t * dim + 8 * w)) };
        }
        for r in 0..R {
            // SAFETY: guaranteed by the caller.
            let weight = unsafe { *weights[r].add(t) };
            for w in 0..W {
                sums[r][w] = plus_times(sums[r][w], v[w], weight);
            }
        }
    }
    for r in 0..R {
        for w in 0..W {
            // SAFETY: guaranteed by the caller.
            unsafe { store(out.add(r * dim + 8 * w), sums[r][w]) };
        }
    }
}
