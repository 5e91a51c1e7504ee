//! Weights of few bits, with a scale for every 16.
//!
//! The scales are whole: they multiply the sums of 16 columns while these are widened, and a block of
//! 32 becomes one number of f32.

use super::wide;
use crate::kernels::activation::Row;
use crate::kernels::pack::{BLOCK, BlockU2K, BlockU3K, BlockU6K, LANES, SUBS};
use std::arch::x86_64::*;

/// A block of eight rows, as the tile sees it: 16 times 16 columns.
pub trait Sixteens {
    /// The largest weight.
    const MOST: i32;

    fn d(&self) -> &[u16; LANES];

    /// Columns `16 * half` and following of a sub-block, four in a register.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn weights(&self, sub: usize, half: usize) -> [__m256i; 4];

    /// Each scale twice, in 16 bits.
    ///
    /// # Safety
    /// The CPU has AVX2.
    unsafe fn scales(&self, sixteen: usize) -> __m256i;

    /// What is added to every weight.
    ///
    /// # Safety
    /// The CPU has AVX2 and F16C.
    unsafe fn min(&self, sixteen: usize) -> __m256;
}

/// Pairs of bits as four registers of four columns.
///
/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn pairs(bits: &[u8; 32]) -> [__m256i; 4] {
    // SAFETY: 32 bytes.
    let v = unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) };
    // What a shift carries in from the byte above never gets to the lowest bits.
    let shifted =
        [v, _mm256_srli_epi16::<2>(v), _mm256_srli_epi16::<4>(v), _mm256_srli_epi16::<6>(v)];
    shifted.map(|v| _mm256_and_si256(v, _mm256_set1_epi8(3)))
}

/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn twice(scales: &[i8; LANES]) -> __m256i {
    // SAFETY: eight bytes.
    let bytes = unsafe { _mm_loadl_epi64(scales.as_ptr().cast()) };
    _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(bytes, bytes))
}

/// `d * scale * -zero`.
///
/// # Safety
/// The CPU has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn below(d: &[u16; LANES], scales: &[i8; LANES], zero: f32) -> __m256 {
    // SAFETY: the caller's promise.
    let scale = unsafe { _mm256_mul_ps(wide(d), super::signed_whole(scales)) };
    _mm256_mul_ps(scale, _mm256_set1_ps(-zero))
}

impl Sixteens for BlockU2K {
    const MOST: i32 = 3;

    #[inline]
    fn d(&self) -> &[u16; LANES] {
        &self.d
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn weights(&self, sub: usize, half: usize) -> [__m256i; 4] {
        // SAFETY: the caller's promise.
        unsafe { pairs(&self.qs[sub][half]) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn scales(&self, sixteen: usize) -> __m256i {
        // SAFETY: eight bytes.
        let both = unsafe { _mm_loadl_epi64(self.sc[sixteen].as_ptr().cast()) };
        let low = _mm_and_si128(both, _mm_set1_epi8(15));
        _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(low, low))
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn min(&self, sixteen: usize) -> __m256 {
        // SAFETY: eight bytes.
        let both = unsafe { _mm_loadl_epi64(self.sc[sixteen].as_ptr().cast()) };
        let high = _mm256_srli_epi32::<4>(_mm256_cvtepu8_epi32(both));
        // SAFETY: the caller's promise.
        let min = unsafe { _mm256_mul_ps(wide(&self.m), _mm256_cvtepi32_ps(high)) };
        _mm256_xor_ps(min, _mm256_set1_ps(-0.0))
    }
}

impl Sixteens for BlockU3K {
    const MOST: i32 = 7;

    #[inline]
    fn d(&self) -> &[u16; LANES] {
        &self.d
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn weights(&self, sub: usize, half: usize) -> [__m256i; 4] {
        // SAFETY: 32 bytes, and the caller's promise.
        let (high, low) = unsafe {
            let high = _mm256_loadu_si256(self.high[sub].as_ptr().cast());
            (high, pairs(&self.qs[sub][half]))
        };
        // The third bit from where it lies.
        let at_third = match half {
            0 => [
                _mm256_slli_epi16::<2>(high),
                _mm256_slli_epi16::<1>(high),
                high,
                _mm256_srli_epi16::<1>(high),
            ],
            _ => [
                _mm256_srli_epi16::<2>(high),
                _mm256_srli_epi16::<3>(high),
                _mm256_srli_epi16::<4>(high),
                _mm256_srli_epi16::<5>(high),
            ],
        };
        let third = at_third.map(|v| _mm256_and_si256(v, _mm256_set1_epi8(4)));
        std::array::from_fn(|part| _mm256_or_si256(low[part], third[part]))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn scales(&self, sixteen: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { twice(&self.sc[sixteen]) }
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn min(&self, sixteen: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { below(&self.d, &self.sc[sixteen], 4.0) }
    }
}

impl Sixteens for BlockU6K {
    const MOST: i32 = 63;

    #[inline]
    fn d(&self) -> &[u16; LANES] {
        &self.d
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn weights(&self, sub: usize, half: usize) -> [__m256i; 4] {
        // SAFETY: 64 of 128 bytes, and the caller's promise.
        let (v, high) = unsafe {
            let low = self.qs[sub].as_ptr().add(64 * half);
            let v = [_mm256_loadu_si256(low.cast()), _mm256_loadu_si256(low.add(32).cast())];
            (v, pairs(&self.high[sub][half]))
        };
        std::array::from_fn(|part| {
            let v = if part % 2 == 0 { v[part / 2] } else { _mm256_srli_epi16::<4>(v[part / 2]) };
            let low = _mm256_and_si256(v, _mm256_set1_epi8(15));
            _mm256_or_si256(low, _mm256_slli_epi16::<4>(high[part]))
        })
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn scales(&self, sixteen: usize) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { twice(&self.sc[sixteen]) }
    }

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    unsafe fn min(&self, sixteen: usize) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { below(&self.d, &self.sc[sixteen], 32.0) }
    }
}

/// `G` groups by `T` tokens.
///
/// # Safety
/// As `matmul::Tile` says, and the CPU has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn tile<B: Sixteens, const G: usize, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    // Products of how many registers 16 bits can add up.
    let all_fit = const { B::MOST * 127 * 2 * 4 < 1 << 15 };
    const { assert!(B::MOST * 127 * 2 * 2 < 1 << 15) };
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let weights = weights.cast::<B>();
    let mut acc = [[_mm256_setzero_ps(); T]; G];
    for at in 0..blocks * SUBS {
        let (b, sub) = (at / SUBS, at % SUBS);
        let mut sums = [[_mm256_setzero_si256(); T]; G];
        for half in 0..2 {
            for g in 0..G {
                // SAFETY: group `g` has `blocks` blocks, and the CPU what is needed.
                let (w, scales) = unsafe {
                    let block = &*weights.add(g * blocks + b);
                    (block.weights(sub, half), block.scales(2 * sub + half))
                };
                for t in 0..T {
                    let mut products = [_mm256_setzero_si256(); 4];
                    for part in 0..4 {
                        // SAFETY: the row has as many blocks of 32 bytes.
                        let q = unsafe {
                            let q = x[t].q.add(BLOCK * at + 16 * half + 4 * part);
                            _mm256_set1_epi32(q.cast::<i32>().read_unaligned())
                        };
                        products[part] = _mm256_maddubs_epi16(w[part], q);
                    }
                    let low = _mm256_add_epi16(products[0], products[1]);
                    let high = _mm256_add_epi16(products[2], products[3]);
                    let scaled = if all_fit {
                        _mm256_madd_epi16(_mm256_add_epi16(low, high), scales)
                    } else {
                        _mm256_add_epi32(
                            _mm256_madd_epi16(low, scales),
                            _mm256_madd_epi16(high, scales),
                        )
                    };
                    sums[g][t] = _mm256_add_epi32(sums[g][t], scaled);
                }
            }
        }
        for g in 0..G {
            // SAFETY: group `g` has `blocks` blocks, and the CPU what is needed.
            let (d, mins) = unsafe {
                let block = &*weights.add(g * blocks + b);
                (wide(block.d()), [block.min(2 * sub), block.min(2 * sub + 1)])
            };
            for t in 0..T {
                // SAFETY: the row has a scale for each block, and two sums.
                let (xd, xh) = unsafe {
                    let h = x[t].h.add(2 * at);
                    (
                        _mm256_broadcast_ss(&*x[t].d.add(at)),
                        [_mm256_broadcast_ss(&*h), _mm256_broadcast_ss(&*h.add(1))],
                    )
                };
                let scaled = _mm256_mul_ps(d, xd);
                acc[g][t] = _mm256_fmadd_ps(scaled, _mm256_cvtepi32_ps(sums[g][t]), acc[g][t]);
                acc[g][t] = _mm256_fmadd_ps(mins[0], xh[0], acc[g][t]);
                acc[g][t] = _mm256_fmadd_ps(mins[1], xh[1], acc[g][t]);
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
