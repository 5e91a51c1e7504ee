//! [`Block`]: the kernel's view of a block of quantized weights.

use super::{Bytes, Floats, Ints, f16_to_f32, signed_ints};
use crate::gguf::IQ4_LEVELS;
use crate::kernels::pack::*;
use std::arch::aarch64::*;

/// Eight rows of `SUBS` times 32 columns. With several sub-blocks, scales and minima are integers
/// multiplied by one float per block.
pub(super) trait Block {
    const SUBS: usize;
    /// Whether 16 columns, not 32, share a scale and a minimum.
    const SIXTEENS: bool;
    /// Whether the weights have an addend.
    const MINS: bool;

    /// Four columns of a sub-block, from column `4 * part` on: byte `4 * row + c` is the `c`-th of
    /// them.
    ///
    /// # Safety
    /// The CPU must have NEON; this also applies to the methods below.
    unsafe fn weights(&self, sub: usize, part: usize) -> Bytes;

    /// The integer scales; 1 if scales are floats. `i` counts the units that have a scale.
    ///
    /// # Safety
    /// As above.
    unsafe fn scales(&self, i: usize) -> Ints;

    /// The scale, or the factor of the integer scales.
    ///
    /// # Safety
    /// As above.
    unsafe fn d(&self) -> Floats;

    /// The addend of the weights, or its integer.
    ///
    /// # Safety
    /// As above.
    unsafe fn min(&self, i: usize) -> Floats;

    /// The factor of the integer minima.
    ///
    /// # Safety
    /// As above.
    unsafe fn m(&self) -> Floats;
}

/// Implements a block from its constants and the results of its methods.
macro_rules! block {
    (
        $block:ty, subs: $subs:expr,
        sixteens: $sixteens:expr, mins: $mins:expr;
        |$b:ident, $sub:ident, $part:ident| $weights:expr;
        |$i:ident| scales: $scales:expr, d: $d:expr, min: $min:expr, m: $m:expr
    ) => {
        impl Block for $block {
            const SUBS: usize = $subs;
            const SIXTEENS: bool = $sixteens;
            const MINS: bool = $mins;

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "neon")]
            #[inline]
            unsafe fn weights(&self, $sub: usize, $part: usize) -> Bytes {
                let ($b, _) = (self, $sub);
                $weights
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "neon")]
            #[inline]
            unsafe fn scales(&self, $i: usize) -> Ints {
                let ($b, _) = (self, $i);
                let _ = $b;
                $scales
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "neon")]
            #[inline]
            unsafe fn d(&self) -> Floats {
                let $b = self;
                $d
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "neon")]
            #[inline]
            unsafe fn min(&self, $i: usize) -> Floats {
                let ($b, _) = (self, $i);
                let _ = $b;
                $min
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "neon")]
            #[inline]
            unsafe fn m(&self) -> Floats {
                let $b = self;
                let _ = $b;
                $m
            }
        }
    };
}

block!(
    BlockU4Min, subs: 1, sixteens: false, mins: true;
    |b, sub, part| nibbles(&b.qs, part);
    |i| scales: ones(), d: f16_to_f32(&b.d), min: f16_to_f32(&b.m), m: none()
);
block!(
    BlockU4, subs: 1, sixteens: false, mins: true;
    |b, sub, part| nibbles(&b.qs, part);
    |i| scales: ones(), d: f16_to_f32(&b.d), min: times(&b.d, -8.0), m: none()
);
block!(
    BlockU5Min, subs: 1, sixteens: false, mins: true;
    |b, sub, part| or(nibbles(&b.qs, part), bit(&b.high, part, 4));
    |i| scales: ones(), d: f16_to_f32(&b.d), min: f16_to_f32(&b.m), m: none()
);
block!(
    BlockU5, subs: 1, sixteens: false, mins: true;
    |b, sub, part| or(nibbles(&b.qs, part), bit(&b.high, part, 4));
    |i| scales: ones(), d: f16_to_f32(&b.d), min: times(&b.d, -16.0), m: none()
);
block!(
    BlockT4, subs: 1, sixteens: false, mins: false;
    |b, sub, part| levels(&b.qs, part);
    |i| scales: ones(), d: f16_to_f32(&b.d), min: none(), m: none()
);
block!(
    BlockI8, subs: 1, sixteens: false, mins: false;
    |b, sub, part| load(&b.qs, part);
    |i| scales: ones(), d: f16_to_f32(&b.d), min: none(), m: none()
);
block!(
    BlockU4K, subs: SUBS, sixteens: false, mins: true;
    |b, sub, part| nibbles(&b.qs[sub], part);
    |i| scales: unsigned(&b.sc[i]), d: f16_to_f32(&b.d), min: whole(unsigned(&b.mn[i])), m: times(&b.m, -1.0)
);
block!(
    BlockU5K, subs: SUBS, sixteens: false, mins: true;
    |b, sub, part| or(nibbles(&b.qs[sub], part), bit(&b.high[sub], part, 4));
    |i| scales: unsigned(&b.sc[i]), d: f16_to_f32(&b.d), min: whole(unsigned(&b.mn[i])), m: times(&b.m, -1.0)
);
block!(
    BlockT4K, subs: SUBS, sixteens: false, mins: false;
    |b, sub, part| levels(&b.qs[sub], part);
    |i| scales: signed(&b.sc[i]), d: f16_to_f32(&b.d), min: none(), m: none()
);
block!(
    BlockU2K, subs: SUBS, sixteens: true, mins: true;
    |b, sub, part| pair(&b.qs[sub], part, 0);
    |i| scales: low(&b.sc[i]), d: f16_to_f32(&b.d),
        min: whole(high(&b.sc[i])), m: times(&b.m, -1.0)
);
block!(
    BlockU3K, subs: SUBS, sixteens: true, mins: true;
    |b, sub, part| or(pair(&b.qs[sub], part, 0), bit(&b.high[sub], part, 2));
    |i| scales: signed(&b.sc[i]), d: f16_to_f32(&b.d), min: whole(signed(&b.sc[i])), m: times(&b.d, -4.0)
);
block!(
    BlockU6K, subs: SUBS, sixteens: true, mins: true;
    |b, sub, part| or(nibbles(&b.qs[sub], part), pair(&b.high[sub], part, 4));
    |i| scales: signed(&b.sc[i]), d: f16_to_f32(&b.d), min: whole(signed(&b.sc[i])), m: times(&b.d, -32.0)
);

#[target_feature(enable = "neon")]
#[inline]
fn ones() -> Ints {
    [vdupq_n_s32(1); 2]
}

#[target_feature(enable = "neon")]
#[inline]
fn none() -> Floats {
    [vdupq_n_f32(0.0); 2]
}

#[target_feature(enable = "neon")]
#[inline]
fn times(bits: &[u16; LANES], by: f32) -> Floats {
    f16_to_f32(bits).map(|x| vmulq_n_f32(x, by))
}

#[target_feature(enable = "neon")]
#[inline]
fn whole(x: Ints) -> Floats {
    x.map(|x| vcvtq_f32_s32(x))
}

#[target_feature(enable = "neon")]
#[inline]
fn signed(bytes: &[i8; LANES]) -> Ints {
    // SAFETY: eight bytes are read.
    signed_ints(unsafe { vld1_s8(bytes.as_ptr()) })
}

/// Extends bytes without signs.
#[target_feature(enable = "neon")]
#[inline]
fn unsigned(bytes: &[u8; LANES]) -> Ints {
    extended(eight(bytes))
}

/// The low halves of bytes.
#[target_feature(enable = "neon")]
#[inline]
fn low(both: &[u8; LANES]) -> Ints {
    extended(vand_u8(eight(both), vdup_n_u8(15)))
}

/// The high halves of bytes.
#[target_feature(enable = "neon")]
#[inline]
fn high(both: &[u8; LANES]) -> Ints {
    extended(vshr_n_u8::<4>(eight(both)))
}

#[target_feature(enable = "neon")]
#[inline]
fn eight(bytes: &[u8; LANES]) -> uint8x8_t {
    // SAFETY: eight bytes are read.
    unsafe { vld1_u8(bytes.as_ptr()) }
}

#[target_feature(enable = "neon")]
#[inline]
fn extended(bytes: uint8x8_t) -> Ints {
    let wide = vmovl_u8(bytes);
    [vmovl_u16(vget_low_u16(wide)), vmovl_u16(vget_high_u16(wide))]
        .map(|x| vreinterpretq_s32_u32(x))
}

#[target_feature(enable = "neon")]
#[inline]
fn or(a: Bytes, b: Bytes) -> Bytes {
    [vorrq_s8(a[0], b[0]), vorrq_s8(a[1], b[1])]
}

/// Loads 32 bytes, number `at` of such parts.
#[target_feature(enable = "neon")]
#[inline]
fn load<T, const N: usize>(bytes: &[T; N], at: usize) -> Bytes {
    assert!(size_of::<T>() == 1 && 32 * (at + 1) <= N, "the registers are inside");
    // SAFETY: the 32 bytes are inside, as asserted.
    unsafe {
        let from = bytes.as_ptr().cast::<i8>().add(32 * at);
        [vld1q_s8(from), vld1q_s8(from.add(16))]
    }
}

/// Shifts each byte left, or right if `by` is negative, and keeps the bits of `mask`.
#[target_feature(enable = "neon")]
#[inline]
fn moved(x: Bytes, by: i8, mask: u8) -> Bytes {
    // The counts are constants once the kernel's loop is unrolled.
    x.map(|x| {
        let bits = vshlq_u8(vreinterpretq_u8_s8(x), vdupq_n_s8(by));
        vreinterpretq_s8_u8(vandq_u8(bits, vdupq_n_u8(mask)))
    })
}

#[target_feature(enable = "neon")]
#[inline]
fn nibbles(qs: &[u8; 128], part: usize) -> Bytes {
    moved(load(qs, part / 2), part as i8 % 2 * -4, 15)
}

#[target_feature(enable = "neon")]
#[inline]
fn levels(qs: &[u8; 128], part: usize) -> Bytes {
    // SAFETY: 16 bytes are read.
    let levels = unsafe { vld1q_s8(IQ4_LEVELS.as_ptr()) };
    nibbles(qs, part).map(|q| vqtbl1q_s8(levels, vreinterpretq_u8_s8(q)))
}

/// Moves bit `part` of each byte to bit `to`.
#[target_feature(enable = "neon")]
#[inline]
fn bit(bits: &[u8; 32], part: usize, to: i8) -> Bytes {
    moved(load(bits, 0), to - part as i8, 1 << to)
}

/// Moves bits `2 * (part % 4)` and the next of each byte of a half to bits `to` and the next.
#[target_feature(enable = "neon")]
#[inline]
fn pair(bits: &[[u8; 32]; 2], part: usize, to: i8) -> Bytes {
    moved(load(&bits[part / 4], 0), to - 2 * (part as i8 % 4), 3 << to)
}
