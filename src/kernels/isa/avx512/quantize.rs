//! Quantizes activations to eight bits, for AVX-512.

use crate::kernels::pack::BLOCK;
use std::arch::x86_64::*;

/// Quantizes a block into `q`; returns the scale, and the sums of the integers of both halves. The
/// CPU must have AVX-512 F, BW, DQ and VL.
pub(super) fn quantize(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    // SAFETY: these kernels are chosen only after checking the CPU's features.
    unsafe { block(values, q) }
}

/// # Safety
/// The CPU must have AVX-512 F, BW, DQ and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn block(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    // SAFETY: 32 numbers are read.
    let x = unsafe { [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values[16..].as_ptr())] };
    // If the first operand is NaN, the result is the second.
    let zero = _mm512_setzero_ps();
    let largest = _mm512_max_ps(_mm512_abs_ps(x[0]), zero);
    let largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x[1]), largest));
    // A block of zeros, or of values too small to divide by, becomes all 0.
    let inverse = Some(127.0 / largest).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    let mut sums = [0; 2];
    for (half, x) in x.into_iter().enumerate() {
        let scaled = _mm512_mul_ps(x, _mm512_set1_ps(inverse));
        // Rounds to nearest, ties to even; NaN becomes 0.
        let number = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(scaled, scaled);
        let rounded = _mm512_maskz_cvtps_epi32(number, scaled);
        sums[half] = _mm512_reduce_add_epi32(rounded);
        let bytes = _mm512_cvtsepi32_epi8(rounded);
        // SAFETY: 16 bytes are written.
        unsafe { _mm_storeu_si128(q[16 * half..].as_mut_ptr().cast(), bytes) };
    }
    (largest / 127.0, sums)
}
