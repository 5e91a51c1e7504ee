//! Kernels for floating-point weights, in f32 arithmetic.

use super::LINE;
use crate::kernels::activation::Row;
use crate::kernels::pack::LANES;
use half::bf16;
use std::arch::x86_64::*;

/// Bytes of a group's weights between the ones that are read and the ones that are prefetched.
const AHEAD: usize = 1024;

/// A column of eight weights.
pub(super) trait Lanes: Sized {
    /// The weights of two groups.
    ///
    /// # Safety
    /// Both must have eight readable numbers; the CPU must have AVX-512 F, BW, DQ and VL.
    unsafe fn load(low: *const u8, high: *const u8) -> __m512;
}

/// # Safety
/// Sixteen bytes must be readable at both; the CPU must have AVX-512 F.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn sixteen_bits(low: *const u8, high: *const u8) -> __m256i {
    // SAFETY: guaranteed by the caller.
    let (low, high) = unsafe { (_mm_loadu_si128(low.cast()), _mm_loadu_si128(high.cast())) };
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
}

impl Lanes for [u16; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn load(low: *const u8, high: *const u8) -> __m512 {
        // SAFETY: guaranteed by the caller.
        _mm512_cvtph_ps(unsafe { sixteen_bits(low, high) })
    }
}

impl Lanes for [bf16; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn load(low: *const u8, high: *const u8) -> __m512 {
        // SAFETY: guaranteed by the caller.
        let bits = _mm512_cvtepu16_epi32(unsafe { sixteen_bits(low, high) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
    }
}

impl Lanes for [f32; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    #[inline]
    unsafe fn load(low: *const u8, high: *const u8) -> __m512 {
        // SAFETY: guaranteed by the caller.
        let (low, high) = unsafe { (_mm256_loadu_ps(low.cast()), _mm256_loadu_ps(high.cast())) };
        _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
    }
}

/// Computes a tile of `P` pairs of groups by `T` tokens, or of a single group if `P` is 0.
///
/// # Safety
/// As for `matmul::Tile`; the CPU must have AVX-512 F, BW, DQ and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
pub(super) unsafe fn tile<L: Lanes, const P: usize, const T: usize>(
    weights: *const u8,
    cols: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let x = x.map(|row| row.f);
    let distance = cols * size_of::<L>();
    // SAFETY: guaranteed by the caller.
    unsafe {
        if P > 0 {
            return run::<L, P, T>(weights, cols, distance, x, out, stride);
        }
        // The same rows twice; the second half of the result is dropped.
        let mut sums = [[0f32; 2 * LANES]; T];
        run::<L, 1, T>(weights, cols, 0, x, sums.as_mut_ptr().cast(), 2 * LANES);
        for (t, sums) in sums.iter().enumerate() {
            out.add(t * stride).copy_from_nonoverlapping(sums.as_ptr(), LANES);
        }
    }
}

/// # Safety
/// As for [`tile`]; the groups of weights are `distance` bytes apart.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")]
#[inline(never)]
unsafe fn run<L: Lanes, const P: usize, const T: usize>(
    weights: *const u8,
    cols: usize,
    distance: usize,
    x: [*const f32; T],
    out: *mut f32,
    stride: usize,
) {
    let mut acc = [[_mm512_setzero_ps(); T]; P];
    for k in 0..cols {
        let mut w = [_mm512_setzero_ps(); P];
        for p in 0..P {
            // SAFETY: every group has `cols` columns.
            unsafe {
                let low = weights.add(2 * p * distance + k * size_of::<L>());
                w[p] = L::load(low, low.add(distance));
                if T <= 4 && (k * size_of::<L>()).is_multiple_of(LINE) {
                    _mm_prefetch::<_MM_HINT_T0>(low.wrapping_add(AHEAD).cast());
                    _mm_prefetch::<_MM_HINT_T0>(low.wrapping_add(AHEAD + distance).cast());
                }
            }
        }
        for t in 0..T {
            // SAFETY: the row has `cols` values.
            let value = _mm512_set1_ps(unsafe { *x[t].add(k) });
            for p in 0..P {
                acc[p][t] = _mm512_fmadd_ps(w[p], value, acc[p][t]);
            }
        }
    }
    for (p, acc) in acc.iter().enumerate() {
        for (t, acc) in acc.iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe { _mm512_storeu_ps(out.add(t * stride + 2 * LANES * p), *acc) };
        }
    }
}
