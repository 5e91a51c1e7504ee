//! Quantizes activations to eight bits, for NEON.

use crate::kernels::pack::BLOCK;
use std::arch::aarch64::*;

/// Quantizes a block into `q`; returns the scale, and the sums of the integers of both halves. The
/// CPU must have NEON.
pub(super) fn quantize(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    // SAFETY: these kernels are chosen only after checking the CPU's features.
    unsafe { block(values, q) }
}

/// # Safety
/// The CPU must have NEON.
#[target_feature(enable = "neon")]
unsafe fn block(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    let mut x = [vdupq_n_f32(0.0); BLOCK / 4];
    let mut largest = vdupq_n_f32(0.0);
    for (x, four) in x.iter_mut().zip(values.as_chunks::<4>().0) {
        // SAFETY: four numbers are read.
        *x = unsafe { vld1q_f32(four.as_ptr()) };
        // If one operand is NaN, the result is the other.
        largest = vmaxnmq_f32(largest, vabsq_f32(*x));
    }
    let largest = vmaxnmvq_f32(largest);
    // A block of zeros, or of values too small to divide by, becomes all 0.
    let inverse = Some(127.0 / largest).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    // Rounds to nearest, ties to even; NaN becomes 0.
    let rounded = x.map(|x| vcvtnq_s32_f32(vmulq_n_f32(x, inverse)));
    let mut sums = [0; 2];
    for (half, sum) in sums.iter_mut().enumerate() {
        let r = &rounded[4 * half..][..4];
        *sum = vaddvq_s32(vaddq_s32(vaddq_s32(r[0], r[1]), vaddq_s32(r[2], r[3])));
        let low = vcombine_s16(vmovn_s32(r[0]), vmovn_s32(r[1]));
        let high = vcombine_s16(vmovn_s32(r[2]), vmovn_s32(r[3]));
        let sixteen = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
        // SAFETY: sixteen bytes are written, in the first or the second half.
        unsafe { vst1q_s8(q.as_mut_ptr().add(16 * half), sixteen) };
    }
    (largest / 127.0, sums)
}
