//! Scores and weighted sums of one page, for AVX-512.

use super::super::scalar::{self, Scales};
use crate::kernels::attention::{RUN, Scores};
use crate::kernels::cache::{Numbers, PAGE};
use crate::kernels::pack::BLOCK;
use std::arch::x86_64::*;
use std::ops::Range;

/// The element type of a page.
trait Number: scalar::Element {
    /// # Safety
    /// Sixteen numbers must be readable, and the CPU must have AVX-512 F.
    unsafe fn sixteen(from: *const Self) -> __m512;

    /// Eight numbers, and zeros.
    ///
    /// # Safety
    /// Eight numbers must be readable, and the CPU must have AVX-512 F and DQ.
    unsafe fn eight(from: *const Self) -> __m512;
}

impl Number for u16 {
    #[inline(always)]
    unsafe fn sixteen(from: *const u16) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn eight(from: *const u16) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_cvtph_ps(_mm256_zextsi128_si256(_mm_loadu_si128(from.cast()))) }
    }
}

impl Number for i8 {
    #[inline(always)]
    unsafe fn sixteen(from: *const i8) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn eight(from: *const i8) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn sixteen(from: *const f32) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn eight(from: *const f32) -> __m512 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm512_zextps256_ps512(_mm256_loadu_ps(from)) }
    }
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

/// Converts to f32; the lengths must be equal multiples of eight. The CPU must have AVX-512 F and
/// DQ.
fn widen_numbers<N: Number>(from: &[N], to: &mut [f32]) {
    assert!(from.len() == to.len() && from.len().is_multiple_of(8));
    /// # Safety
    /// Both must have `count` numbers, a multiple of eight, and the CPU must have AVX-512 F and DQ.
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn widen<N: Number>(from: *const N, to: *mut f32, count: usize) {
        let whole = count / 16 * 16;
        for at in (0..whole).step_by(16) {
            // SAFETY: guaranteed by the caller.
            unsafe { _mm512_storeu_ps(to.add(at), N::sixteen(from.add(at))) };
        }
        if whole < count {
            // SAFETY: eight numbers are left.
            unsafe {
                let eight = _mm512_castps512_ps256(N::eight(from.add(whole)));
                _mm256_storeu_ps(to.add(whole), eight);
            }
        }
    }
    // SAFETY: the lengths match; these kernels are chosen only after checking the CPU's features.
    unsafe { widen(from.as_ptr(), to.as_mut_ptr(), from.len()) }
}

fn fit<S: Scales>(scales: S, dim: usize) -> bool {
    scales.bits().is_none_or(|scales| scales.len() == dim.div_ceil(BLOCK) * PAGE)
}

/// `scores[row][at..at + 32] = q[row] · keys`; `keys` (head_dim, 32), `scales` (blocks, 32), `q`
/// (rows, head_dim), at most four rows. The CPU must have AVX-512 F and DQ.
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
/// them; the CPU must have AVX-512 F and DQ.
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn score_rows<const R: usize, N: Number, S: Scales>(
    q: &[f32],
    keys: &[N],
    scales: S,
    scores: &mut [Scores],
    at: usize,
    dim: usize,
) {
    let (q, keys, width) = (q.as_ptr(), keys.as_ptr(), scales.width(dim));
    for (block, from) in (0..dim).step_by(width).enumerate() {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for d in from..(from + width).min(dim) {
            // SAFETY: guaranteed by the caller.
            let (k0, k1) = unsafe {
                let k = keys.add(d * PAGE);
                (N::sixteen(k), N::sixteen(k.add(16)))
            };
            for r in 0..R {
                // SAFETY: guaranteed by the caller.
                let x = _mm512_set1_ps(unsafe { *q.add(r * dim + d) });
                sums[r][0] = _mm512_fmadd_ps(k0, x, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(k1, x, sums[r][1]);
            }
        }
        for r in 0..R {
            for w in 0..2 {
                let place = scores[r][at + 16 * w..][..16].as_mut_ptr();
                // SAFETY: sixteen numbers are read and written.
                unsafe {
                    let sum = match scales.bits() {
                        Some(scales) => {
                            let scale = scales.as_ptr().add(block * PAGE + 16 * w);
                            let before = match block {
                                0 => _mm512_setzero_ps(),
                                _ => _mm512_loadu_ps(place),
                            };
                            _mm512_fmadd_ps(Number::sixteen(scale), sums[r][w], before)
                        }
                        None => sums[r][w],
                    };
                    _mm512_storeu_ps(place, sum);
                }
            }
        }
    }
}

/// `out[row] += scores[row][at + t] * values[t]` for the tokens `tokens` of a page that begins at
/// `at`; `values` (32, dim), `scales` (blocks, 32), `out` (rows, dim), at most four rows, `dim` a
/// multiple of 8. The CPU must have AVX-512 F and DQ.
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
/// every block of them; the CPU must have AVX-512 F and DQ.
#[target_feature(enable = "avx512f,avx512dq")]
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
                for t in (0..PAGE).step_by(16) {
                    // SAFETY: sixteen numbers are read and written.
                    unsafe {
                        let score = _mm512_loadu_ps(scores[r].as_ptr().add(at + t));
                        let scale = Number::sixteen(scales.as_ptr().add(t));
                        _mm512_storeu_ps(scaled.as_mut_ptr().add(t), _mm512_mul_ps(score, scale));
                    }
                }
                weights[r] = scaled[first..].as_ptr();
            }
        }
        let (mut d, end) = (from, (from + width).min(dim));
        // SAFETY: every row has as many columns from `d` on, and there are 32 weights.
        unsafe {
            while d + 64 <= end {
                weigh_columns::<R, 4, N>(weights, values.add(d), out.add(d), count, dim);
                d += 64;
            }
            while d + 32 <= end {
                weigh_columns::<R, 2, N>(weights, values.add(d), out.add(d), count, dim);
                d += 32;
            }
            while d + 16 <= end {
                weigh_columns::<R, 1, N>(weights, values.add(d), out.add(d), count, dim);
                d += 16;
            }
            if d < end {
                weigh_eight_columns::<R, N>(weights, values.add(d), out.add(d), count, dim);
            }
        }
    }
}

/// # Safety
/// There must be weights and rows of values for all of `tokens`, and `R` rows of `out`, `dim`
/// apart, each with `16 W` columns; the CPU must have AVX-512 F and DQ.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
unsafe fn weigh_columns<const R: usize, const W: usize, N: Number>(
    weights: [*const f32; R],
    values: *const N,
    out: *mut f32,
    tokens: usize,
    dim: usize,
) {
    // SAFETY: guaranteed by the caller, for all of this function.
    unsafe {
        let mut sums: [[__m512; W]; R] = std::array::from_fn(|r| {
            std::array::from_fn(|w| _mm512_loadu_ps(out.add(r * dim + 16 * w)))
        });
        for t in 0..tokens {
            let v: [__m512; W] = std::array::from_fn(|w| N::sixteen(values.add(t * dim + 16 * w)));
            for r in 0..R {
                let weight = _mm512_set1_ps(*weights[r].add(t));
                for w in 0..W {
                    sums[r][w] = _mm512_fmadd_ps(v[w], weight, sums[r][w]);
                }
            }
        }
        for r in 0..R {
            for w in 0..W {
                _mm512_storeu_ps(out.add(r * dim + 16 * w), sums[r][w]);
            }
        }
    }
}

/// As [`weigh_columns`], for eight columns.
///
/// # Safety
/// As for [`weigh_columns`].
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
unsafe fn weigh_eight_columns<const R: usize, N: Number>(
    weights: [*const f32; R],
    values: *const N,
    out: *mut f32,
    tokens: usize,
    dim: usize,
) {
    // SAFETY: guaranteed by the caller, for all of this function.
    unsafe {
        for r in 0..R {
            let mut sum = f32::eight(out.add(r * dim));
            for t in 0..tokens {
                let weight = _mm512_set1_ps(*weights[r].add(t));
                sum = _mm512_fmadd_ps(N::eight(values.add(t * dim)), weight, sum);
            }
            _mm256_storeu_ps(out.add(r * dim), _mm512_castps512_ps256(sum));
        }
    }
}

/// The softmax of one run; see [`Attention::softmax`](crate::kernels::isa::Attention).
pub(super) fn softmax(scores: &mut [f32]) -> (f32, f32) {
    // SAFETY: these kernels are chosen only after checking the CPU's features.
    unsafe { softmax_of(scores) }
}

/// # Safety
/// The CPU must have AVX-512 F and DQ, and FMA.
#[target_feature(enable = "avx512f,avx512dq,fma")]
unsafe fn softmax_of(scores: &mut [f32]) -> (f32, f32) {
    let (whole, rest) = scores.as_chunks_mut::<16>();
    let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
    for sixteen in whole.iter() {
        // SAFETY: sixteen numbers are read. If the first operand is NaN, the result is the second.
        largest = _mm512_max_ps(unsafe { _mm512_loadu_ps(sixteen.as_ptr()) }, largest);
    }
    let max = rest.iter().fold(_mm512_reduce_max_ps(largest), |a, &b| a.max(b));
    let mut sums = _mm256_setzero_ps();
    for sixteen in whole.iter_mut() {
        // SAFETY: sixteen numbers are read and written.
        unsafe {
            let x = _mm512_sub_ps(_mm512_loadu_ps(sixteen.as_ptr()), _mm512_set1_ps(max));
            let e = exp(x);
            _mm512_storeu_ps(sixteen.as_mut_ptr(), e);
            sums = _mm256_add_ps(sums, _mm512_castps512_ps256(e));
            sums = _mm256_add_ps(sums, _mm512_extractf32x8_ps::<1>(e));
        }
    }
    let mut lanes = [0f32; 8];
    // SAFETY: eight numbers are written.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums) };
    for eight in rest.chunks_mut(8) {
        scalar::add_exponentials(eight, max, &mut lanes);
    }
    (max, lanes.iter().sum())
}

/// The operations of [`vector::exp`](crate::kernels::vector::exp).
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn exp(x: __m512) -> __m512 {
    let of = _mm512_set1_ps;
    // The second operand is the result if one is NaN: NaN stays NaN.
    let clamped = _mm512_min_ps(of(88.0), _mm512_max_ps(of(-87.0), x));
    let n = _mm512_mul_ps(clamped, of(std::f32::consts::LOG2_E));
    let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(n);
    let f = _mm512_fmadd_ps(n, of(-0.693_359_4), clamped);
    let f = _mm512_fmadd_ps(n, of(2.121_944_4e-4), f);
    let mut y = of(1.987_569_1e-4);
    for term in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        y = _mm512_fmadd_ps(y, f, of(term));
    }
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(f, f), _mm512_add_ps(f, of(1.0)));
    let power = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    let scaled = _mm512_mul_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(power)));
    let small = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, of(-87.0));
    _mm512_mask_blend_ps(small, scaled, _mm512_setzero_ps())
}
