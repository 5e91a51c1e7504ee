//! Kernels for floating-point weights, in f32 arithmetic.

use super::{LINE, prefetch};
use crate::kernels::activation::Row;
use crate::kernels::pack::LANES;
use half::bf16;
use std::arch::x86_64::*;

/// A column of eight weights.
pub(super) trait Lanes {
    /// # Safety
    /// `at` must have eight readable numbers; the CPU must have AVX2 and F16C.
    unsafe fn load(at: *const u8) -> __m256;
}

impl Lanes for [u16; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
}

impl Lanes for [bf16; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: guaranteed by the caller.
        let bits = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

impl Lanes for [f32; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn load(at: *const u8) -> __m256 {
        // SAFETY: guaranteed by the caller.
        unsafe { _mm256_loadu_ps(at.cast()) }
    }
}

/// Computes a tile of `G` groups by `T` tokens.
///
/// # Safety
/// As for `matmul::Tile`; the CPU must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile<L: Lanes + Sized, const G: usize, const T: usize>(
    weights: *const u8,
    cols: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let mut acc = [[_mm256_setzero_ps(); T]; G];
    for k in 0..cols {
        let mut w = [_mm256_setzero_ps(); G];
        for g in 0..G {
            // SAFETY: group `g` has `cols` columns.
            w[g] = unsafe { L::load(weights.add((g * cols + k) * size_of::<L>())) };
            if T == 1 && (k * size_of::<L>()).is_multiple_of(LINE) {
                prefetch(weights.wrapping_add(((G + g) * cols + k) * size_of::<L>()), LINE);
            }
        }
        for t in 0..T {
            // SAFETY: the row has `cols` values.
            let value = unsafe { _mm256_broadcast_ss(&*x[t].f.add(k)) };
            for g in 0..G {
                acc[g][t] = _mm256_fmadd_ps(w[g], value, acc[g][t]);
            }
        }
    }
    for g in 0..G {
        for t in 0..T {
            // SAFETY: guaranteed by the caller.
            unsafe { _mm256_storeu_ps(out.add(t * stride + 8 * g), acc[g][t]) };
        }
    }
}
