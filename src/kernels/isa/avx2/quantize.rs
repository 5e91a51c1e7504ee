//! Quantizes activations to eight bits, for AVX2.

use crate::kernels::pack::BLOCK;
use std::arch::x86_64::*;

/// Quantizes a block into `q`; returns the scale, and the sums of the integers of both halves. The
/// CPU must have AVX2.
pub(super) fn quantize(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    // SAFETY: these kernels are chosen only after checking the CPU's features.
    unsafe { block(values, q) }
}

/// # Safety
/// The CPU must have AVX2.
#[target_feature(enable = "avx2")]
unsafe fn block(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    let mut x = [_mm256_setzero_ps(); 4];
    let mut largest = _mm256_setzero_ps();
    for (x, eight) in x.iter_mut().zip(values.as_chunks::<8>().0) {
        // SAFETY: eight numbers are read.
        *x = unsafe { _mm256_loadu_ps(eight.as_ptr()) };
        // If the first operand is NaN, the result is the second.
        largest = _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0), *x), largest);
    }
    let four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps::<1>(largest));
    let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    let largest = _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    // A block of zeros, or of values too small to divide by, becomes all 0.
    let inverse = Some(127.0 / largest).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    let rounded = x.map(|x| {
        let scaled = _mm256_mul_ps(x, _mm256_set1_ps(inverse));
        // Rounds to nearest, ties to even; NaN becomes 0.
        let number = _mm256_cmp_ps::<_CMP_ORD_Q>(scaled, scaled);
        _mm256_cvtps_epi32(_mm256_and_ps(scaled, number))
    });
    let sum = |a: __m256i, b: __m256i| {
        let eight = _mm256_add_epi32(a, b);
        let four =
            _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
        let two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
        _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32::<1>(two)))
    };
    let sums = [sum(rounded[0], rounded[1]), sum(rounded[2], rounded[3])];
    let packed = _mm256_packs_epi16(
        _mm256_packs_epi32(rounded[0], rounded[1]),
        _mm256_packs_epi32(rounded[2], rounded[3]),
    );
    // Packing works within the halves of a register; restore the order.
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let packed = _mm256_permutevar8x32_epi32(packed, order);
    // SAFETY: 32 bytes are written.
    unsafe { _mm256_storeu_si256(q.as_mut_ptr().cast(), packed) };
    (largest / 127.0, sums)
}
