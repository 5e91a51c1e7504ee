//! 4- and 5-bit weights, with a scale for every 32.

use super::{whole, wide};
use crate::kernels::activation::Row;
use crate::kernels::pack::{
    BLOCK, BlockU4, BlockU4K, BlockU4Min, BlockU5, BlockU5K, BlockU5Min, SUBS,
};
use std::arch::x86_64::*;

/// A block of eight rows, as the tile sees it: `SUBS` times 32 columns.
pub trait Nibbles {
    const SUBS: usize;
    const FIVE: bool;
    /// Low bits of a sub-block, 128 bytes.
    fn qs(&self, sub: usize) -> *const u8;
    /// Fifth bits of a sub-block, 32 bytes.
    fn high(&self, sub: usize) -> *const u8;
    /// Scale, and what is added to every weight.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn scales(&self, sub: usize) -> (__m256, __m256);
}

/// A block with one sub-block, whose minimum is given or follows from the scale.
macro_rules! plain {
    ($block:ty, $five:literal, |$b:ident, $d:ident| $min:expr, $high:expr) => {
        impl Nibbles for $block {
            const SUBS: usize = 1;
            const FIVE: bool = $five;

            #[inline]
            fn qs(&self, _: usize) -> *const u8 {
                self.qs.as_ptr()
            }

            #[inline]
            fn high(&self, _: usize) -> *const u8 {
                let high: fn(&$block) -> *const u8 = $high;
                high(self)
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn scales(&self, _: usize) -> (__m256, __m256) {
                let $b = self;
                // SAFETY: the caller's promise.
                unsafe {
                    let $d = wide(&$b.d);
                    ($d, $min)
                }
            }
        }
    };
}

plain!(BlockU4Min, false, |b, d| wide(&b.m), |_| std::ptr::null());
plain!(BlockU4, false, |b, d| _mm256_mul_ps(d, _mm256_set1_ps(-8.0)), |_| std::ptr::null());
plain!(BlockU5Min, true, |b, d| wide(&b.m), |b| b.high.as_ptr());
plain!(BlockU5, true, |b, d| _mm256_mul_ps(d, _mm256_set1_ps(-16.0)), |b| b.high.as_ptr());

/// A K block: eight sub-blocks with 6-bit scales and minima.
macro_rules! super_block {
    ($block:ty, $five:literal, $high:expr) => {
        impl Nibbles for $block {
            const SUBS: usize = SUBS;
            const FIVE: bool = $five;

            #[inline]
            fn qs(&self, sub: usize) -> *const u8 {
                self.qs[sub].as_ptr()
            }

            #[inline]
            fn high(&self, sub: usize) -> *const u8 {
                let high: fn(&$block, usize) -> *const u8 = $high;
                high(self, sub)
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx2,f16c")]
            #[inline]
            unsafe fn scales(&self, sub: usize) -> (__m256, __m256) {
                // SAFETY: the caller's promise.
                unsafe {
                    let scale = _mm256_mul_ps(wide(&self.d), whole(&self.sc[sub]));
                    let min = _mm256_mul_ps(wide(&self.m), whole(&self.mn[sub]));
                    (scale, _mm256_xor_ps(min, _mm256_set1_ps(-0.0)))
                }
            }
        }
    };
}

super_block!(BlockU4K, false, |_, _| std::ptr::null());
super_block!(BlockU5K, true, |b, sub| b.high[sub].as_ptr());

/// `G` groups by `T` tokens.
///
/// # Safety
/// As `matmul::Tile` says, and the CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn tile<B: Nibbles, const G: usize, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let weights = weights.cast::<B>();
    let (low, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut acc = [[_mm256_setzero_ps(); T]; G];
    for at in 0..blocks * B::SUBS {
        let (b, sub) = (at / B::SUBS, at % B::SUBS);
        // 16-bit sums: of all 32 columns, or of each half of them.
        let mut sums = [[[_mm256_setzero_si256(); T]; G]; 2];
        let mut high = [_mm256_setzero_si256(); G];
        if B::FIVE {
            for g in 0..G {
                // SAFETY: group `g` has `blocks` blocks.
                high[g] =
                    unsafe { _mm256_loadu_si256((*weights.add(g * blocks + b)).high(sub).cast()) };
            }
        }
        for j in 0..4 {
            let mut halves = [[_mm256_setzero_si256(); 2]; G];
            for g in 0..G {
                // SAFETY: group `g` has `blocks` blocks.
                let v = unsafe {
                    let block = &*weights.add(g * blocks + b);
                    _mm256_loadu_si256(block.qs(sub).add(32 * j).cast())
                };
                halves[g][0] = _mm256_and_si256(v, low);
                halves[g][1] = _mm256_and_si256(_mm256_srli_epi16::<4>(v), low);
                if B::FIVE {
                    // Bit 0 of each byte is the next one; what a shift carries in from the byte
                    // above gets there after the last.
                    for half in &mut halves[g] {
                        let bit = _mm256_and_si256(high[g], _mm256_set1_epi8(1));
                        *half = _mm256_or_si256(*half, _mm256_slli_epi16::<4>(bit));
                        high[g] = _mm256_srli_epi16::<1>(high[g]);
                    }
                }
            }
            let half = if B::FIVE { j / 2 } else { 0 };
            for t in 0..T {
                // SAFETY: the row has as many blocks of 32 bytes.
                let (x0, x1) = unsafe {
                    let q = x[t].q.add(BLOCK * at + 8 * j);
                    (
                        _mm256_set1_epi32(q.cast::<i32>().read_unaligned()),
                        _mm256_set1_epi32(q.add(4).cast::<i32>().read_unaligned()),
                    )
                };
                for g in 0..G {
                    let p = _mm256_add_epi16(
                        _mm256_maddubs_epi16(halves[g][0], x0),
                        _mm256_maddubs_epi16(halves[g][1], x1),
                    );
                    sums[half][g][t] = _mm256_add_epi16(sums[half][g][t], p);
                }
            }
        }
        for g in 0..G {
            // SAFETY: group `g` has `blocks` blocks, and the CPU what is needed.
            let (d, m) = unsafe { (*weights.add(g * blocks + b)).scales(sub) };
            for t in 0..T {
                // SAFETY: the row has a scale and a sum for each block.
                let (xd, xs) = unsafe {
                    (_mm256_broadcast_ss(&*x[t].d.add(at)), _mm256_broadcast_ss(&*x[t].s.add(at)))
                };
                let mut sum = _mm256_madd_epi16(sums[0][g][t], ones);
                if B::FIVE {
                    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(sums[1][g][t], ones));
                }
                let scaled = _mm256_mul_ps(d, xd);
                acc[g][t] = _mm256_fmadd_ps(scaled, _mm256_cvtepi32_ps(sum), acc[g][t]);
                acc[g][t] = _mm256_fmadd_ps(m, xs, acc[g][t]);
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
