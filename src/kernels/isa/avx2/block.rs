//! [`Block`]: the kernel's view of a block of quantized weights.

use super::{f16_to_f32, signed_whole, u8_to_f32};
use crate::gguf::IQ4_LEVELS;
use crate::kernels::pack::*;
use std::arch::x86_64::*;

/// Eight rows of `SUBS` times 32 columns. With several sub-blocks, scales and minima are integers
/// multiplied by one float per block.
pub(in super::super) trait Block {
    const SUBS: usize;
    /// The largest magnitude of a weight.
    const MOST: i32;
    /// Whether the weights are signed.
    const SIGNED: bool;
    /// Whether 16 columns, not 32, share a scale and a minimum.
    const SIXTEENS: bool;
    /// Whether the weights have an addend.
    const MINS: bool;

    /// Four columns of a sub-block, from column `4 * part` on: byte `4 * row + c` is the `c`-th of
    /// them.
    ///
    /// # Safety
    /// The CPU must have AVX2 and F16C; this also applies to the methods below.
    unsafe fn weights(&self, sub: usize, part: usize) -> __m256i;

    /// The integer scales, each twice in 16 bits; 1 if scales are floats. `i` counts the units that
    /// have a scale.
    ///
    /// # Safety
    /// As above.
    unsafe fn scales(&self, i: usize) -> __m256i;

    /// The integer scales as floats; unspecified if there is only one sub-block.
    ///
    /// # Safety
    /// As above.
    unsafe fn float_scales(&self, i: usize) -> __m256;

    /// The scale, or the factor of the integer scales.
    ///
    /// # Safety
    /// As above.
    unsafe fn d(&self) -> __m256;

    /// The addend of the weights, or its integer.
    ///
    /// # Safety
    /// As above.
    unsafe fn min(&self, i: usize) -> __m256;

    /// The factor of the integer minima.
    ///
    /// # Safety
    /// As above.
    unsafe fn m(&self) -> __m256;
}

/// Implements a block from its constants and the results of its methods.
macro_rules! block {
    (
        $block:ty, subs: $subs:expr, most: $most:expr, signed: $signed:expr,
        sixteens: $sixteens:expr, mins: $mins:expr;
        |$b:ident, $sub:ident, $part:ident| $weights:expr;
        |$i:ident| scales: $scales:expr, floats: $floats:expr;
        d: $d:expr, min: $min:expr, m: $m:expr
    ) => {
        impl Block for $block {
            const SUBS: usize = $subs;
            const MOST: i32 = $most;
            const SIGNED: bool = $signed;
            const SIXTEENS: bool = $sixteens;
            const MINS: bool = $mins;

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn weights(&self, $sub: usize, $part: usize) -> __m256i {
                let ($b, _) = (self, $sub);
                $weights
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn scales(&self, $i: usize) -> __m256i {
                let ($b, _) = (self, $i);
                let _ = $b;
                $scales
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn float_scales(&self, $i: usize) -> __m256 {
                let ($b, _) = (self, $i);
                let _ = $b;
                $floats
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn d(&self) -> __m256 {
                let $b = self;
                $d
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn min(&self, $i: usize) -> __m256 {
                let ($b, _) = (self, $i);
                let _ = $b;
                $min
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn m(&self) -> __m256 {
                let $b = self;
                let _ = $b;
                $m
            }
        }
    };
}

block!(
    BlockU4Min, subs: 1, most: 15, signed: false, sixteens: false, mins: true;
    |b, sub, part| nibbles(&b.qs, part);
    |i| scales: ones(), floats: none();
    d: f16_to_f32(&b.d), min: f16_to_f32(&b.m), m: none()
);
block!(
    BlockU4, subs: 1, most: 15, signed: false, sixteens: false, mins: true;
    |b, sub, part| nibbles(&b.qs, part);
    |i| scales: ones(), floats: none();
    d: f16_to_f32(&b.d), min: times(&b.d, -8.0), m: none()
);
block!(
    BlockU5Min, subs: 1, most: 31, signed: false, sixteens: false, mins: true;
    |b, sub, part| _mm256_or_si256(nibbles(&b.qs, part), bit(&b.high, part, 4));
    |i| scales: ones(), floats: none();
    d: f16_to_f32(&b.d), min: f16_to_f32(&b.m), m: none()
);
block!(
    BlockU5, subs: 1, most: 31, signed: false, sixteens: false, mins: true;
    |b, sub, part| _mm256_or_si256(nibbles(&b.qs, part), bit(&b.high, part, 4));
    |i| scales: ones(), floats: none();
    d: f16_to_f32(&b.d), min: times(&b.d, -16.0), m: none()
);
block!(
    BlockT4, subs: 1, most: 127, signed: true, sixteens: false, mins: false;
    |b, sub, part| levels(&b.qs, part);
    |i| scales: ones(), floats: none();
    d: f16_to_f32(&b.d), min: none(), m: none()
);
block!(
    BlockI8, subs: 1, most: 128, signed: true, sixteens: false, mins: false;
    |b, sub, part| load(&b.qs, part);
    |i| scales: ones(), floats: none();
    d: f16_to_f32(&b.d), min: none(), m: none()
);
block!(
    BlockU4K, subs: SUBS, most: 15, signed: false, sixteens: false, mins: true;
    |b, sub, part| nibbles(&b.qs[sub], part);
    |i| scales: unsigned_twice(&b.sc[i]), floats: u8_to_f32(&b.sc[i]);
    d: f16_to_f32(&b.d), min: u8_to_f32(&b.mn[i]), m: times(&b.m, -1.0)
);
block!(
    BlockU5K, subs: SUBS, most: 31, signed: false, sixteens: false, mins: true;
    |b, sub, part| _mm256_or_si256(nibbles(&b.qs[sub], part), bit(&b.high[sub], part, 4));
    |i| scales: unsigned_twice(&b.sc[i]), floats: u8_to_f32(&b.sc[i]);
    d: f16_to_f32(&b.d), min: u8_to_f32(&b.mn[i]), m: times(&b.m, -1.0)
);
block!(
    BlockT4K, subs: SUBS, most: 127, signed: true, sixteens: false, mins: false;
    |b, sub, part| levels(&b.qs[sub], part);
    |i| scales: twice(&b.sc[i]), floats: signed_whole(&b.sc[i]);
    d: f16_to_f32(&b.d), min: none(), m: none()
);
block!(
    BlockU2K, subs: SUBS, most: 3, signed: false, sixteens: true, mins: true;
    |b, sub, part| pair(&b.qs[sub], part, 0);
    |i| scales: low_twice(&b.sc[i]), floats: low_whole(&b.sc[i]);
    d: f16_to_f32(&b.d), min: high_whole(&b.sc[i]), m: times(&b.m, -1.0)
);
block!(
    BlockU3K, subs: SUBS, most: 7, signed: false, sixteens: true, mins: true;
    |b, sub, part| _mm256_or_si256(pair(&b.qs[sub], part, 0), bit(&b.high[sub], part, 2));
    |i| scales: twice(&b.sc[i]), floats: signed_whole(&b.sc[i]);
    d: f16_to_f32(&b.d), min: signed_whole(&b.sc[i]), m: times(&b.d, -4.0)
);
block!(
    BlockU6K, subs: SUBS, most: 63, signed: false, sixteens: true, mins: true;
    |b, sub, part| _mm256_or_si256(nibbles(&b.qs[sub], part), pair(&b.high[sub], part, 4));
    |i| scales: twice(&b.sc[i]), floats: signed_whole(&b.sc[i]);
    d: f16_to_f32(&b.d), min: signed_whole(&b.sc[i]), m: times(&b.d, -32.0)
);

#[target_feature(enable = "avx2")]
#[inline]
fn ones() -> __m256i {
    _mm256_set1_epi16(1)
}

#[target_feature(enable = "avx2")]
#[inline]
fn none() -> __m256 {
    _mm256_setzero_ps()
}

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn times(bits: &[u16; LANES], by: f32) -> __m256 {
    _mm256_mul_ps(f16_to_f32(bits), _mm256_set1_ps(by))
}

/// Each byte twice, extended to 16 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn twice(scales: &[i8; LANES]) -> __m256i {
    // SAFETY: eight bytes are read.
    let bytes = unsafe { _mm_loadl_epi64(scales.as_ptr().cast()) };
    _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(bytes, bytes))
}

#[target_feature(enable = "avx2")]
#[inline]
fn unsigned_twice(scales: &[u8; LANES]) -> __m256i {
    // SAFETY: eight bytes are read.
    let bytes = unsafe { _mm_loadl_epi64(scales.as_ptr().cast()) };
    _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(bytes, bytes))
}

#[target_feature(enable = "avx2")]
#[inline]
fn low_twice(both: &[u8; LANES]) -> __m256i {
    _mm256_and_si256(unsigned_twice(both), _mm256_set1_epi16(15))
}

#[target_feature(enable = "avx2")]
#[inline]
fn low_whole(both: &[u8; LANES]) -> __m256 {
    // SAFETY: eight bytes are read.
    let both = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(both.as_ptr().cast()) });
    _mm256_cvtepi32_ps(_mm256_and_si256(both, _mm256_set1_epi32(15)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn high_whole(both: &[u8; LANES]) -> __m256 {
    // SAFETY: eight bytes are read.
    let both = _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(both.as_ptr().cast()) });
    _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(both))
}

/// Loads the 32 bytes of register number `at`.
#[target_feature(enable = "avx2")]
#[inline]
fn load<T, const N: usize>(bytes: &[T; N], at: usize) -> __m256i {
    assert!(size_of::<T>() == 1 && 32 * (at + 1) <= N, "the register is inside");
    // SAFETY: the 32 bytes are inside, as asserted.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().add(32 * at).cast()) }
}

/// Shifts left, or right if `by` is negative. Bits of the neighbouring byte are shifted in.
#[target_feature(enable = "avx2")]
#[inline]
fn shifted(v: __m256i, by: i32) -> __m256i {
    // The counts are constants once the kernel's loop is unrolled.
    if by > 0 {
        _mm256_sll_epi16(v, _mm_cvtsi32_si128(by))
    } else {
        _mm256_srl_epi16(v, _mm_cvtsi32_si128(-by))
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn nibbles(qs: &[u8; 128], part: usize) -> __m256i {
    let v = shifted(load(qs, part / 2), part as i32 % 2 * -4);
    _mm256_and_si256(v, _mm256_set1_epi8(15))
}

#[target_feature(enable = "avx2")]
#[inline]
fn levels(qs: &[u8; 128], part: usize) -> __m256i {
    // SAFETY: 16 bytes are read.
    let levels = unsafe { _mm_loadu_si128(IQ4_LEVELS.as_ptr().cast()) };
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), nibbles(qs, part))
}

/// Moves bit `part` of each byte to bit `to`.
#[target_feature(enable = "avx2")]
#[inline]
fn bit(bits: &[u8; 32], part: usize, to: i32) -> __m256i {
    let v = shifted(load(bits, 0), to - part as i32);
    _mm256_and_si256(v, _mm256_set1_epi8(1 << to))
}

/// Moves bits `2 * (part % 4)` and the next of each byte of a half to bits `to` and the next.
#[target_feature(enable = "avx2")]
#[inline]
fn pair(bits: &[[u8; 32]; 2], part: usize, to: i32) -> __m256i {
    let v = shifted(load(&bits[part / 4], 0), to - 2 * (part as i32 % 4));
    _mm256_and_si256(v, _mm256_set1_epi8(3 << to))
}
