//! 6-bit weights, with a scale for every 16: products of 8 columns fit 16 bits (63·127·2·2).

use super::ask;
use crate::kernels::activation::Row;
use crate::kernels::pack::{BLOCK, BlockU6K, SUBS};
use std::arch::x86_64::*;

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
    let weights = weights.cast::<BlockU6K>();
    let (low, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut acc = [[_mm256_setzero_ps(); T]; G];
    for at in 0..blocks * SUBS * 2 {
        let (b, sub, half) = (at / (2 * SUBS), at / 2 % SUBS, at % 2);
        if T == 1 {
            for g in 0..G {
                let next = weights.wrapping_add((G + g) * blocks + b).cast::<u8>();
                let bytes = size_of::<BlockU6K>() / (2 * SUBS);
                ask(next.wrapping_add(at % (2 * SUBS) * bytes), bytes);
            }
        }
        let mut sums = [[_mm256_setzero_si256(); T]; G];
        let mut high = [_mm256_setzero_si256(); G];
        for g in 0..G {
            // SAFETY: group `g` has `blocks` blocks.
            high[g] = unsafe {
                let block = &*weights.add(g * blocks + b);
                _mm256_loadu_si256(block.high[sub][half].as_ptr().cast())
            };
        }
        for j in 2 * half..2 * half + 2 {
            let mut q = [[_mm256_setzero_si256(); 2]; G];
            for g in 0..G {
                // SAFETY: group `g` has `blocks` blocks.
                let v = unsafe {
                    let block = &*weights.add(g * blocks + b);
                    _mm256_loadu_si256(block.qs[sub].as_ptr().add(32 * j).cast())
                };
                q[g][0] = _mm256_and_si256(v, low);
                q[g][1] = _mm256_and_si256(_mm256_srli_epi16::<4>(v), low);
                for q in &mut q[g] {
                    // What a shift carries in from the byte above never gets to the lowest bits.
                    let bits = _mm256_and_si256(high[g], _mm256_set1_epi8(3));
                    *q = _mm256_or_si256(*q, _mm256_slli_epi16::<4>(bits));
                    high[g] = _mm256_srli_epi16::<2>(high[g]);
                }
            }
            for t in 0..T {
                // SAFETY: the row has as many blocks of 32 bytes.
                let (x0, x1) = unsafe {
                    let q = x[t].q.add(BLOCK * (at / 2) + 8 * j);
                    (
                        _mm256_set1_epi32(q.cast::<i32>().read_unaligned()),
                        _mm256_set1_epi32(q.add(4).cast::<i32>().read_unaligned()),
                    )
                };
                for g in 0..G {
                    let p = _mm256_add_epi16(
                        _mm256_maddubs_epi16(q[g][0], x0),
                        _mm256_maddubs_epi16(q[g][1], x1),
                    );
                    sums[g][t] = _mm256_add_epi32(sums[g][t], _mm256_madd_epi16(p, ones));
                }
            }
        }
        for g in 0..G {
            // SAFETY: group `g` has `blocks` blocks.
            let block = unsafe { &*weights.add(g * blocks + b) };
            // SAFETY: sixteen and eight bytes.
            let (d, sc) = unsafe {
                (
                    _mm256_cvtph_ps(_mm_loadu_si128(block.d.as_ptr().cast())),
                    _mm_loadl_epi64(block.sc[2 * sub + half].as_ptr().cast()),
                )
            };
            let scale = _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(sc)));
            let min = _mm256_mul_ps(scale, _mm256_set1_ps(-32.0));
            for t in 0..T {
                // SAFETY: the row has a scale for each block, and two sums.
                let (xd, xh) = unsafe {
                    (
                        _mm256_broadcast_ss(&*x[t].d.add(at / 2)),
                        _mm256_broadcast_ss(&*x[t].h.add(at)),
                    )
                };
                let scaled = _mm256_mul_ps(scale, xd);
                acc[g][t] = _mm256_fmadd_ps(scaled, _mm256_cvtepi32_ps(sums[g][t]), acc[g][t]);
                acc[g][t] = _mm256_fmadd_ps(min, xh, acc[g][t]);
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
