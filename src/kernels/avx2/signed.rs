//! Weights of 8 bits, as they are or looked up by 4 of them, with a scale for every 32.

use super::{signed_whole, wide};
use crate::gguf::IQ4_LEVELS;
use crate::kernels::activation::Row;
use crate::kernels::pack::{BLOCK, BlockI8, BlockT4, BlockT4K, SUBS};
use std::arch::x86_64::*;

/// A block of eight rows, as the tile sees it: `SUBS` times 32 columns.
pub trait Signed {
    const SUBS: usize;

    /// Columns `4 * i` to `4 * i + 3` of a sub-block.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn four(&self, sub: usize, i: usize) -> __m256i;

    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn scale(&self, sub: usize) -> __m256;
}

/// Half `i % 2` of each byte of register `i / 2`, looked up.
///
/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn levels(qs: &[u8; 128], i: usize) -> __m256i {
    // SAFETY: 16 bytes, and 32 of 128.
    let (levels, v) = unsafe {
        (
            _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_LEVELS.as_ptr().cast())),
            _mm256_loadu_si256(qs.as_ptr().add(i / 2 * 32).cast()),
        )
    };
    let v = if i.is_multiple_of(2) { v } else { _mm256_srli_epi16::<4>(v) };
    _mm256_shuffle_epi8(levels, _mm256_and_si256(v, _mm256_set1_epi8(15)))
}

impl Signed for BlockI8 {
    const SUBS: usize = 1;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn four(&self, _: usize, i: usize) -> __m256i {
        // SAFETY: 32 of 256 bytes.
        unsafe { _mm256_loadu_si256(self.qs.as_ptr().add(32 * i).cast()) }
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn scale(&self, _: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { wide(&self.d) }
    }
}

impl Signed for BlockT4 {
    const SUBS: usize = 1;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn four(&self, _: usize, i: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { levels(&self.qs, i) }
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn scale(&self, _: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { wide(&self.d) }
    }
}

impl Signed for BlockT4K {
    const SUBS: usize = SUBS;

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn four(&self, sub: usize, i: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { levels(&self.qs[sub], i) }
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn scale(&self, sub: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_mul_ps(wide(&self.d), signed_whole(&self.sc[sub])) }
    }
}

/// `G` groups by `T` tokens.
///
/// # Safety
/// As `matmul::Tile` says, and the CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn tile<B: Signed, const G: usize, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let weights = weights.cast::<B>();
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_ps(); T]; G];
    for at in 0..blocks * B::SUBS {
        let (b, sub) = (at / B::SUBS, at % B::SUBS);
        let mut sums = [[_mm256_setzero_si256(); T]; G];
        for i in 0..8 {
            let mut w = [_mm256_setzero_si256(); G];
            let mut magnitude = w;
            for g in 0..G {
                // SAFETY: group `g` has `blocks` blocks, and the CPU what is needed.
                w[g] = unsafe { (*weights.add(g * blocks + b)).four(sub, i) };
                magnitude[g] = _mm256_abs_epi8(w[g]);
            }
            for t in 0..T {
                // SAFETY: the row has as many blocks of 32 bytes.
                let q = unsafe {
                    let q = x[t].q.add(BLOCK * at + 4 * i);
                    _mm256_set1_epi32(q.cast::<i32>().read_unaligned())
                };
                for g in 0..G {
                    let products = _mm256_maddubs_epi16(magnitude[g], _mm256_sign_epi8(q, w[g]));
                    let wide = _mm256_madd_epi16(products, ones);
                    sums[g][t] = _mm256_add_epi32(sums[g][t], wide);
                }
            }
        }
        for g in 0..G {
            // SAFETY: group `g` has `blocks` blocks, and the CPU what is needed.
            let d = unsafe { (*weights.add(g * blocks + b)).scale(sub) };
            for t in 0..T {
                // SAFETY: the row has a scale for each block.
                let xd = unsafe { _mm256_broadcast_ss(&*x[t].d.add(at)) };
                let scaled = _mm256_mul_ps(d, xd);
                acc[g][t] = _mm256_fmadd_ps(scaled, _mm256_cvtepi32_ps(sums[g][t]), acc[g][t]);
            }
        }
    }
    for g in 0..G {
        for t in 0..T {
            // SAFETY: the caller's promise.
            unsafe { _mm256_storeu_ps(out.add(t * stride + 8 * g), acc[g][t]) };
        }
    }
}
