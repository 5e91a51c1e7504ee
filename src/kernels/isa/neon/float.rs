//! Kernels for floating-point weights, in f32 arithmetic.

use super::{Floats, halves_to_f32};
use crate::kernels::activation::Row;
use crate::kernels::pack::LANES;
use half::bf16;
use std::arch::aarch64::*;

/// A column of eight weights.
pub(super) trait Lanes {
    /// # Safety
    /// `at` must have eight readable numbers; the CPU must have NEON.
    unsafe fn load(at: *const u8) -> Floats;
}

impl Lanes for [u16; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(at: *const u8) -> Floats {
        // SAFETY: guaranteed by the caller.
        halves_to_f32(unsafe { vreinterpretq_u16_u8(vld1q_u8(at)) })
    }
}

impl Lanes for [bf16; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(at: *const u8) -> Floats {
        // SAFETY: guaranteed by the caller.
        let bits = unsafe { vreinterpretq_u16_u8(vld1q_u8(at)) };
        [vshll_n_u16::<16>(vget_low_u16(bits)), vshll_high_n_u16::<16>(bits)]
            .map(|bits| vreinterpretq_f32_u32(bits))
    }
}

impl Lanes for [f32; LANES] {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(at: *const u8) -> Floats {
        // SAFETY: guaranteed by the caller.
        unsafe { [vld1q_u8(at), vld1q_u8(at.add(16))] }.map(|bits| vreinterpretq_f32_u8(bits))
    }
}

/// Computes a tile of `G` groups by `T` tokens.
///
/// # Safety
/// As for `matmul::Tile`; the CPU must have NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn tile<L: Lanes + Sized, const G: usize, const T: usize>(
    weights: *const u8,
    cols: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let mut acc = [[[vdupq_n_f32(0.0); 2]; T]; G];
    for k in 0..cols {
        let mut w = [[vdupq_n_f32(0.0); 2]; G];
        for g in 0..G {
            // SAFETY: group `g` has `cols` columns.
            w[g] = unsafe { L::load(weights.add((g * cols + k) * size_of::<L>())) };
        }
        for t in 0..T {
            // SAFETY: the row has `cols` values.
            let value = unsafe { *x[t].f.add(k) };
            for g in 0..G {
                for half in 0..2 {
                    acc[g][t][half] = vfmaq_n_f32(acc[g][t][half], w[g][half], value);
                }
            }
        }
    }
    for g in 0..G {
        for t in 0..T {
            for half in 0..2 {
                // SAFETY: guaranteed by the caller.
                unsafe { vst1q_f32(out.add(t * stride + 8 * g + 4 * half), acc[g][t][half]) };
            }
        }
    }
}
