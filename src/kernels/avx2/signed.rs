//! 8-bit weights in blocks of 32.

use super::ask;
use crate::kernels::activation::Row;
use crate::kernels::pack::{BLOCK, BlockI8};
use std::arch::x86_64::*;
use std::mem::offset_of;

/// `G` groups by `T` tokens.
///
/// # Safety
/// As `matmul::Tile` says, and the CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn tile<const G: usize, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_ps(); T]; G];
    for b in 0..blocks {
        let mut block = [weights; G];
        for g in 0..G {
            // SAFETY: group `g` has `blocks` blocks.
            block[g] = unsafe { weights.add((g * blocks + b) * size_of::<BlockI8>()) };
            if T == 1 {
                ask(block[g].wrapping_add(G * blocks * size_of::<BlockI8>()), size_of::<BlockI8>());
            }
        }
        let mut sums = [[_mm256_setzero_si256(); T]; G];
        for j in 0..8 {
            let mut w = [_mm256_setzero_si256(); G];
            let mut magnitude = w;
            for g in 0..G {
                // SAFETY: inside the block.
                w[g] = unsafe {
                    _mm256_loadu_si256(block[g].add(offset_of!(BlockI8, qs) + 32 * j).cast())
                };
                magnitude[g] = _mm256_abs_epi8(w[g]);
            }
            for t in 0..T {
                // SAFETY: the row has `blocks` blocks of 32 bytes.
                let q = unsafe {
                    let q = x[t].q.add(BLOCK * b + 4 * j);
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
            // SAFETY: inside the block.
            let d = unsafe {
                _mm256_cvtph_ps(_mm_loadu_si128(block[g].add(offset_of!(BlockI8, d)).cast()))
            };
            for t in 0..T {
                // SAFETY: the row has a scale for each block.
                let xd = unsafe { _mm256_broadcast_ss(&*x[t].d.add(b)) };
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
