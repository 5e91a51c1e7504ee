//! Products of quantized weights and activations, for AVX-VNNI.
//!
//! `vpdpbusd` adds the products of four unsigned weights and four signed activations to a 32-bit
//! sum. Signed weights are made unsigned by adding 128; the sum then starts at -128 times the sum
//! of the activations.

use super::super::avx2::{Block, Sums, each_part, in_order};
use crate::kernels::activation::Row;
use crate::kernels::pack::BLOCK;
use std::arch::asm;
use std::arch::x86_64::*;

/// The arithmetic of AVX-VNNI. The product of an integer scale and a sum is below 2^24 and so is
/// exact in f32.
pub(super) struct Vnni;

/// Adds to each of the eight sums of `sum` the products of four bytes of `w` and `q`.
///
/// The intrinsic for this instruction, `_mm256_dpbusd_avx_epi32`, is inlined only into functions
/// that require AVX-VNNI, which the tile that AVX2 shares does not. The compiler does not reorder
/// the assembly with others of its kind; see [`in_order`].
///
/// # Safety
/// The CPU must have AVX-VNNI.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn dot(mut sum: __m256i, w: __m256i, q: __m256i) -> __m256i {
    // SAFETY: the instruction reads and writes only these registers; the caller guarantees that the
    // CPU has it.
    unsafe {
        asm!(
            // Without the prefix this would be the instruction of AVX-512.
            "{{vex}} vpdpbusd {sum}, {w}, {q}",
            sum = inout(ymm_reg) sum,
            w = in(ymm_reg) w,
            q = in(ymm_reg) q,
            options(nomem, nostack, preserves_flags)
        );
    }
    sum
}

impl Sums for Vnni {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn sums<B: Block, const G: usize, const T: usize>(
        block: [&B; G],
        sub: usize,
        at: usize,
        x: &[Row; T],
    ) -> [[__m256; T]; G] {
        let mut sums = [[_mm256_setzero_si256(); T]; G];
        let mut first = [[_mm256_setzero_ps(); T]; G];
        if B::SIGNED {
            for t in 0..T {
                // SAFETY: the row has a start for each block.
                let start = _mm256_set1_epi32(unsafe { *x[0].z.add(at + t) });
                for g in 0..G {
                    sums[g][t] = start;
                }
            }
        }
        each_part!(part => {
            let mut w = [_mm256_setzero_si256(); G];
            for g in 0..G {
                // SAFETY: guaranteed by the caller.
                w[g] = unsafe { block[g].weights(sub, part) };
                if B::SIGNED {
                    w[g] = _mm256_xor_si256(w[g], _mm256_set1_epi8(-128));
                }
                w[g] = in_order(w[g]);
            }
            for t in 0..T {
                // SAFETY: the row has as many blocks of 32 bytes.
                let q = unsafe {
                    let q = x[0].q.add(BLOCK * (at + t) + 4 * part);
                    _mm256_set1_epi32(q.cast::<i32>().read_unaligned())
                };
                for g in 0..G {
                    // SAFETY: guaranteed by the caller.
                    sums[g][t] = unsafe { dot(sums[g][t], w[g], q) };
                }
            }
            if B::SIXTEENS && part == 3 {
                for g in 0..G {
                    // SAFETY: guaranteed by the caller.
                    let scales = unsafe { block[g].float_scales(2 * sub) };
                    for t in 0..T {
                        first[g][t] = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[g][t]), scales);
                        sums[g][t] = _mm256_setzero_si256();
                    }
                }
            }
        });
        let mut scaled = first;
        for g in 0..G {
            let i = if B::SIXTEENS { 2 * sub + 1 } else { sub };
            // SAFETY: guaranteed by the caller.
            let scales = unsafe { block[g].float_scales(i) };
            for t in 0..T {
                let sum = _mm256_cvtepi32_ps(sums[g][t]);
                scaled[g][t] = match (B::SUBS, B::SIXTEENS) {
                    // The scales are floats, which the tile applies.
                    (1, _) => sum,
                    (_, true) => _mm256_fmadd_ps(sum, scales, first[g][t]),
                    (_, false) => _mm256_mul_ps(sum, scales),
                };
            }
        }
        scaled
    }
}
