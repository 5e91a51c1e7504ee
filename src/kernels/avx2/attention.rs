//! Scores and weighted sums of one page.

use crate::kernels::attention::{RUN, Scores};
use crate::kernels::cache::PAGE;
use std::arch::x86_64::*;

/// What a page's numbers are held as.
pub trait Number: Copy {
    /// # Safety
    /// Eight numbers are there, and the CPU has AVX2 and F16C.
    unsafe fn eight(from: *const Self) -> __m256;
}

/// Bits of f16.
impl Number for u16 {
    #[inline(always)]
    unsafe fn eight(from: *const u16) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn eight(from: *const f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

/// f16 to f32; the lengths are equal multiples of eight. The CPU must have AVX2 and F16C.
pub fn widen(from: &[u16], to: &mut [f32]) {
    assert!(from.len() == to.len() && from.len().is_multiple_of(8));
    /// # Safety
    /// Both have `count` numbers, a multiple of eight, and the CPU AVX2 and F16C.
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn widen(from: *const u16, to: *mut f32, count: usize) {
        for at in (0..count).step_by(8) {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_ps(to.add(at), Number::eight(from.add(at))) };
        }
    }
    // SAFETY: the lengths fit; whoever chose these kernels has seen the CPU's features.
    unsafe { widen(from.as_ptr(), to.as_mut_ptr(), from.len()) }
}

/// `scores[row][at..at + 32] = q[row] · keys`; `keys` (head_dim, 32), `q` (rows, head_dim), at most
/// four rows. The CPU must have AVX2, FMA and F16C.
pub fn score<N: Number>(q: &[f32], keys: &[N], scores: &mut [Scores], at: usize) {
    let dim = keys.len() / PAGE;
    assert!(keys.len() == dim * PAGE && at + PAGE <= RUN && q.len() == scores.len() * dim);
    // SAFETY: the lengths fit; whoever chose these kernels has seen the CPU's features.
    unsafe {
        match scores.len() {
            1 => score_rows::<1, N>(q, keys, scores, at, dim),
            2 => score_rows::<2, N>(q, keys, scores, at, dim),
            3 => score_rows::<3, N>(q, keys, scores, at, dim),
            4 => score_rows::<4, N>(q, keys, scores, at, dim),
            rows => unreachable!("{rows} rows"),
        }
    }
}

/// # Safety
/// `q` has `R` rows of `dim`, `keys` `dim` rows of 32, and the CPU AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn score_rows<const R: usize, N: Number>(
    q: &[f32],
    keys: &[N],
    scores: &mut [Scores],
    at: usize,
    dim: usize,
) {
    let (q, keys) = (q.as_ptr(), keys.as_ptr());
    for half in [0, 16] {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for d in 0..dim {
            // SAFETY: the caller's promise.
            let (k0, k1) = unsafe {
                let k = keys.add(d * PAGE + half);
                (N::eight(k), N::eight(k.add(8)))
            };
            for r in 0..R {
                // SAFETY: the caller's promise.
                let x = unsafe { _mm256_broadcast_ss(&*q.add(r * dim + d)) };
                sums[r][0] = _mm256_fmadd_ps(k0, x, sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(k1, x, sums[r][1]);
            }
        }
        for r in 0..R {
            let place = scores[r][at + half..at + half + 16].as_mut_ptr();
            // SAFETY: sixteen numbers.
            unsafe {
                _mm256_storeu_ps(place, sums[r][0]);
                _mm256_storeu_ps(place.add(8), sums[r][1]);
            }
        }
    }
}

/// `out[row] += scores[row][at + t] * values[t]`; `values` (tokens, dim), `out` (rows, dim), at most
/// four rows, `dim` a multiple of 8. The CPU must have AVX2, FMA and F16C.
pub fn weigh<N: Number>(scores: &[Scores], at: usize, values: &[N], out: &mut [f32], dim: usize) {
    let tokens = values.len() / dim;
    assert!(values.len() == tokens * dim && at + tokens <= RUN && dim.is_multiple_of(8));
    assert!(out.len() == scores.len() * dim);
    // SAFETY: the lengths fit; whoever chose these kernels has seen the CPU's features.
    unsafe {
        match scores.len() {
            1 => weigh_rows::<1, N>(scores, at, values, out, dim),
            2 => weigh_rows::<2, N>(scores, at, values, out, dim),
            3 => weigh_rows::<3, N>(scores, at, values, out, dim),
            4 => weigh_rows::<4, N>(scores, at, values, out, dim),
            rows => unreachable!("{rows} rows"),
        }
    }
}

/// # Safety
/// `out` has `R` rows of `dim`, a multiple of 8, and the CPU AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh_rows<const R: usize, N: Number>(
    scores: &[Scores],
    at: usize,
    values: &[N],
    out: &mut [f32],
    dim: usize,
) {
    let tokens = values.len() / dim;
    let scores: [*const f32; R] = std::array::from_fn(|r| scores[r][at..].as_ptr());
    let (values, out) = (values.as_ptr(), out.as_mut_ptr());
    let mut d = 0;
    while d + 16 <= dim {
        // SAFETY: sixteen columns of every row are there, and the scores of `tokens` tokens.
        unsafe { weigh_columns::<R, 2, N>(scores, values.add(d), out.add(d), tokens, dim) };
        d += 16;
    }
    if d < dim {
        // SAFETY: as above, with eight columns.
        unsafe { weigh_columns::<R, 1, N>(scores, values.add(d), out.add(d), tokens, dim) };
    }
}

/// # Safety
/// There are `tokens` scores of each row, `tokens` rows of values and `R` of `out`, `dim` apart, each
/// with `8 W` columns; and the CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn weigh_columns<const R: usize, const W: usize, N: Number>(
    scores: [*const f32; R],
    values: *const N,
    out: *mut f32,
    tokens: usize,
    dim: usize,
) {
    let mut sums = [[_mm256_setzero_ps(); W]; R];
    for r in 0..R {
        for w in 0..W {
            // SAFETY: the caller's promise.
            sums[r][w] = unsafe { _mm256_loadu_ps(out.add(r * dim + 8 * w)) };
        }
    }
    for t in 0..tokens {
        let mut v = [_mm256_setzero_ps(); W];
        for w in 0..W {
            // SAFETY: the caller's promise.
            v[w] = unsafe { N::eight(values.add(t * dim + 8 * w)) };
        }
        for r in 0..R {
            // SAFETY: the caller's promise.
            let weight = unsafe { _mm256_broadcast_ss(&*scores[r].add(t)) };
            for w in 0..W {
                sums[r][w] = _mm256_fmadd_ps(v[w], weight, sums[r][w]);
            }
        }
    }
    for r in 0..R {
        for w in 0..W {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_ps(out.add(r * dim + 8 * w), sums[r][w]) };
        }
    }
}
