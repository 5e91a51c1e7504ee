//! [`Block`]: the kernel's view of two groups' blocks of quantized weights.

use crate::gguf::IQ4_LEVELS;
use crate::kernels::pack::*;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// The same block of two groups: sixteen rows.
pub(super) struct Pair<'a, B>(pub &'a B, pub &'a B);

impl<B> Clone for Pair<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Pair<'_, B> {}

/// Sixteen rows of `SUBS` times 32 columns. With several sub-blocks, scales and minima are integers
/// multiplied by one float per block.
pub(super) trait Block: Sized {
    const SUBS: usize;
    /// Whether the bytes are 128 larger than the weights, which are signed.
    const SIGNED: bool;
    /// Whether 16 columns, not 32, share a scale and a minimum.
    const SIXTEENS: bool;
    /// Whether the weights have an addend.
    const MINS: bool;

    /// Four columns of a sub-block, from column `4 * part` on: byte `4 * row + c` is the `c`-th of
    /// them.
    ///
    /// # Safety
    /// The CPU must have AVX-512 F, BW, DQ and VL; this also applies to the methods below.
    unsafe fn weights(pair: Pair<Self>, sub: usize, part: usize) -> __m512i;

    /// The integer scale, if there are several sub-blocks. `i` counts the units that have one.
    ///
    /// # Safety
    /// As above.
    unsafe fn scale(pair: Pair<Self>, i: usize) -> __m512;

    /// The scale, or the factor of the integer scales.
    ///
    /// # Safety
    /// As above.
    unsafe fn d(pair: Pair<Self>) -> __m512;

    /// The addend of the weights, or its integer.
    ///
    /// # Safety
    /// As above.
    unsafe fn min(pair: Pair<Self>, i: usize) -> __m512;

    /// The factor of the integer minima.
    ///
    /// # Safety
    /// As above.
    unsafe fn m(pair: Pair<Self>) -> __m512;
}

/// Two groups' weights as the kernel reads them: [`Block`]'s methods, packed or unpacked.
pub(super) trait Weights: Copy {
    const SUBS: usize;
    const SIGNED: bool;
    const SIXTEENS: bool;
    const MINS: bool;

    /// # Safety
    /// As in [`Block`]; this also applies to the methods below.
    unsafe fn weights(self, sub: usize, part: usize) -> __m512i;

    /// # Safety
    /// As above.
    unsafe fn scale(self, i: usize) -> __m512;

    /// # Safety
    /// As above.
    unsafe fn d(self) -> __m512;

    /// # Safety
    /// As above.
    unsafe fn min(self, i: usize) -> __m512;

    /// # Safety
    /// As above.
    unsafe fn m(self) -> __m512;
}

/// Implements the constants and methods of [`Weights`], whose safety is that of [`Block`].
macro_rules! weights {
    ($self:ident, $weights:expr, $scale:expr, $d:expr, $min:expr, $m:expr) => {
        const SUBS: usize = B::SUBS;
        const SIGNED: bool = B::SIGNED;
        const SIXTEENS: bool = B::SIXTEENS;
        const MINS: bool = B::MINS;

        /// # Safety
        /// As in [`Weights`].
        #[inline(always)]
        unsafe fn weights($self, sub: usize, part: usize) -> __m512i {
            // SAFETY: guaranteed by the caller.
            unsafe { $weights(sub, part) }
        }
        /// # Safety
        /// As in [`Weights`].
        #[inline(always)]
        unsafe fn scale($self, i: usize) -> __m512 {
            // SAFETY: guaranteed by the caller.
            unsafe { $scale(i) }
        }
        /// # Safety
        /// As in [`Weights`].
        #[inline(always)]
        unsafe fn d($self) -> __m512 {
            // SAFETY: guaranteed by the caller.
            unsafe { $d() }
        }
        /// # Safety
        /// As in [`Weights`].
        #[inline(always)]
        unsafe fn min($self, i: usize) -> __m512 {
            // SAFETY: guaranteed by the caller.
            unsafe { $min(i) }
        }
        /// # Safety
        /// As in [`Weights`].
        #[inline(always)]
        unsafe fn m($self) -> __m512 {
            // SAFETY: guaranteed by the caller.
            unsafe { $m() }
        }
    };
}

impl<B: Block> Weights for Pair<'_, B> {
    weights!(
        self,
        |sub, part| B::weights(self, sub, part),
        |i| B::scale(self, i),
        || B::d(self),
        |i| B::min(self, i),
        || B::m(self)
    );
}

/// 64 bytes that a register loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Register(pub [u8; 64]);

/// A block of two groups with one byte for each weight and f32 scales, so that many tiles need not
/// unpack it again: eight registers of weights for each sub-block, the scales, the minima, `d` and
/// `m`.
pub(super) struct Unpacked<B>(*const Register, PhantomData<B>);

impl<B> Clone for Unpacked<B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B> Copy for Unpacked<B> {}

impl<B: Block> Unpacked<B> {
    /// Units that have a scale and a minimum.
    const UNITS: usize = B::SUBS * if B::SIXTEENS { 2 } else { 1 };
    const SCALES: usize = B::SUBS * 8;
    const MINIMA: usize = Self::SCALES + Self::UNITS;
    const D: usize = Self::MINIMA + Self::UNITS;
    const M: usize = Self::D + 1;
    /// Registers of a block.
    pub(super) const REGISTERS: usize = Self::M + 1;

    /// # Safety
    /// `at` must be a block that [`Unpacked::write`] has written.
    pub(super) unsafe fn at(at: *const Register) -> Self {
        Self(at, PhantomData)
    }

    /// # Safety
    /// `to` must have [`Unpacked::REGISTERS`] registers; the CPU must have AVX-512 F, BW, DQ and VL.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn write(pair: Pair<B>, to: &mut [Register]) {
        assert!(to.len() == Self::REGISTERS);
        let to = to.as_mut_ptr();
        // SAFETY: guaranteed by the caller; every index is below the number of registers.
        unsafe {
            for sub in 0..B::SUBS {
                for part in 0..8 {
                    _mm512_store_si512(to.add(sub * 8 + part).cast(), B::weights(pair, sub, part));
                }
            }
            for i in 0..Self::UNITS {
                _mm512_store_ps(to.add(Self::SCALES + i).cast(), B::scale(pair, i));
                _mm512_store_ps(to.add(Self::MINIMA + i).cast(), B::min(pair, i));
            }
            _mm512_store_ps(to.add(Self::D).cast(), B::d(pair));
            _mm512_store_ps(to.add(Self::M).cast(), B::m(pair));
        }
    }
}

impl<B: Block> Weights for Unpacked<B> {
    weights!(
        self,
        |sub: usize, part: usize| _mm512_load_si512(self.0.add(sub * 8 + part).cast()),
        |i: usize| _mm512_load_ps(self.0.add(Self::SCALES + i).cast()),
        || _mm512_load_ps(self.0.add(Self::D).cast()),
        |i: usize| _mm512_load_ps(self.0.add(Self::MINIMA + i).cast()),
        || _mm512_load_ps(self.0.add(Self::M).cast())
    );
}

/// Implements a block from its constants and the results of its methods.
macro_rules! block {
    (
        $block:ty, subs: $subs:expr, signed: $signed:expr, sixteens: $sixteens:expr,
        mins: $mins:expr;
        |$b:ident, $sub:ident, $part:ident| $weights:expr;
        |$i:ident| scale: $scale:expr, d: $d:expr, min: $min:expr, m: $m:expr
    ) => {
        impl Block for $block {
            const SUBS: usize = $subs;
            const SIGNED: bool = $signed;
            const SIXTEENS: bool = $sixteens;
            const MINS: bool = $mins;

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[inline]
            unsafe fn weights($b: Pair<Self>, $sub: usize, $part: usize) -> __m512i {
                let _ = $sub;
                $weights
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[inline]
            unsafe fn scale($b: Pair<Self>, $i: usize) -> __m512 {
                let _ = ($b, $i);
                $scale
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[inline]
            unsafe fn d($b: Pair<Self>) -> __m512 {
                $d
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[inline]
            unsafe fn min($b: Pair<Self>, $i: usize) -> __m512 {
                let _ = ($b, $i);
                $min
            }

            /// # Safety
            /// As in the trait.
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            #[inline]
            unsafe fn m($b: Pair<Self>) -> __m512 {
                let _ = $b;
                $m
            }
        }
    };
}

/// One field of both blocks.
macro_rules! both {
    ($b:ident.$($field:tt)+) => { [&$b.0.$($field)+, &$b.1.$($field)+] };
}

block!(
    BlockU4Min, subs: 1, signed: false, sixteens: false, mins: true;
    |b, sub, part| nibbles(both!(b.qs), part);
    |i| scale: none(), d: halves(both!(b.d)), min: halves(both!(b.m)), m: none()
);
block!(
    BlockU4, subs: 1, signed: false, sixteens: false, mins: true;
    |b, sub, part| nibbles(both!(b.qs), part);
    |i| scale: none(), d: halves(both!(b.d)), min: times(both!(b.d), -8.0), m: none()
);
block!(
    BlockU5Min, subs: 1, signed: false, sixteens: false, mins: true;
    |b, sub, part| _mm512_or_si512(nibbles(both!(b.qs), part), bit(both!(b.high), part, 4));
    |i| scale: none(), d: halves(both!(b.d)), min: halves(both!(b.m)), m: none()
);
block!(
    BlockU5, subs: 1, signed: false, sixteens: false, mins: true;
    |b, sub, part| _mm512_or_si512(nibbles(both!(b.qs), part), bit(both!(b.high), part, 4));
    |i| scale: none(), d: halves(both!(b.d)), min: times(both!(b.d), -16.0), m: none()
);
block!(
    BlockT4, subs: 1, signed: true, sixteens: false, mins: false;
    |b, sub, part| levels(both!(b.qs), part);
    |i| scale: none(), d: halves(both!(b.d)), min: none(), m: none()
);
block!(
    BlockI8, subs: 1, signed: true, sixteens: false, mins: false;
    |b, sub, part| _mm512_xor_si512(load(both!(b.qs), part), _mm512_set1_epi8(-128));
    |i| scale: none(), d: halves(both!(b.d)), min: none(), m: none()
);
block!(
    BlockU4K, subs: SUBS, signed: false, sixteens: false, mins: true;
    |b, sub, part| nibbles(both!(b.qs[sub]), part);
    |i| scale: unsigned(both!(b.sc[i])), d: halves(both!(b.d)),
        min: unsigned(both!(b.mn[i])), m: times(both!(b.m), -1.0)
);
block!(
    BlockU5K, subs: SUBS, signed: false, sixteens: false, mins: true;
    |b, sub, part|
        _mm512_or_si512(nibbles(both!(b.qs[sub]), part), bit(both!(b.high[sub]), part, 4));
    |i| scale: unsigned(both!(b.sc[i])), d: halves(both!(b.d)),
        min: unsigned(both!(b.mn[i])), m: times(both!(b.m), -1.0)
);
block!(
    BlockT4K, subs: SUBS, signed: true, sixteens: false, mins: false;
    |b, sub, part| levels(both!(b.qs[sub]), part);
    |i| scale: signed(both!(b.sc[i])), d: halves(both!(b.d)), min: none(), m: none()
);
block!(
    BlockU2K, subs: SUBS, signed: false, sixteens: true, mins: true;
    |b, sub, part| pair(both!(b.qs[sub][part / 4]), part, 0);
    |i| scale: low(both!(b.sc[i])), d: halves(both!(b.d)),
        min: high(both!(b.sc[i])), m: times(both!(b.m), -1.0)
);
block!(
    BlockU3K, subs: SUBS, signed: false, sixteens: true, mins: true;
    |b, sub, part| _mm512_or_si512(
        pair(both!(b.qs[sub][part / 4]), part, 0),
        bit(both!(b.high[sub]), part, 2),
    );
    |i| scale: signed(both!(b.sc[i])), d: halves(both!(b.d)),
        min: signed(both!(b.sc[i])), m: times(both!(b.d), -4.0)
);
block!(
    BlockU6K, subs: SUBS, signed: false, sixteens: true, mins: true;
    |b, sub, part| _mm512_or_si512(
        nibbles(both!(b.qs[sub]), part),
        pair(both!(b.high[sub][part / 4]), part, 4),
    );
    |i| scale: signed(both!(b.sc[i])), d: halves(both!(b.d)),
        min: signed(both!(b.sc[i])), m: times(both!(b.d), -32.0)
);

#[target_feature(enable = "avx512f")]
#[inline]
fn none() -> __m512 {
    _mm512_setzero_ps()
}

/// Sixteen f16 as f32.
#[target_feature(enable = "avx512f")]
#[inline]
fn halves(both: [&[u16; LANES]; 2]) -> __m512 {
    // SAFETY: sixteen bytes are read from each.
    let [low, high] = both.map(|bits| unsafe { _mm_loadu_si128(bits.as_ptr().cast()) });
    _mm512_cvtph_ps(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn times(both: [&[u16; LANES]; 2], by: f32) -> __m512 {
    _mm512_mul_ps(halves(both), _mm512_set1_ps(by))
}

/// Eight bytes of each block, in one register.
#[target_feature(enable = "avx512f")]
#[inline]
fn bytes<T>(both: [&[T; LANES]; 2]) -> __m128i {
    const { assert!(size_of::<T>() == 1) }
    // SAFETY: eight bytes are read from each.
    let [low, high] = both.map(|bytes| unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) });
    _mm_unpacklo_epi64(low, high)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn unsigned(both: [&[u8; LANES]; 2]) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(both)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn signed(both: [&[i8; LANES]; 2]) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(both)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn low(both: [&[u8; LANES]; 2]) -> __m512 {
    let all = _mm512_cvtepu8_epi32(bytes(both));
    _mm512_cvtepi32_ps(_mm512_and_si512(all, _mm512_set1_epi32(15)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn high(both: [&[u8; LANES]; 2]) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(bytes(both))))
}

/// Loads bytes `32 * at` to `32 * at + 31` of both blocks.
#[target_feature(enable = "avx512f")]
#[inline]
fn load<T, const N: usize>(both: [&[T; N]; 2], at: usize) -> __m512i {
    assert!(size_of::<T>() == 1 && 32 * (at + 1) <= N, "the register is inside");
    // SAFETY: the 32 bytes of each are inside, as asserted.
    let [low, high] =
        both.map(|bytes| unsafe { _mm256_loadu_si256(bytes.as_ptr().add(32 * at).cast()) });
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

/// Shifts left, or right if `by` is negative. Bits of the neighbouring byte are shifted in.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn shifted(v: __m512i, by: i32) -> __m512i {
    // The counts are constants once the kernel's loop is unrolled.
    if by > 0 {
        _mm512_sll_epi16(v, _mm_cvtsi32_si128(by))
    } else {
        _mm512_srl_epi16(v, _mm_cvtsi32_si128(-by))
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn nibbles(qs: [&[u8; 128]; 2], part: usize) -> __m512i {
    let v = shifted(load(qs, part / 2), part as i32 % 2 * -4);
    _mm512_and_si512(v, _mm512_set1_epi8(15))
}

/// The levels of IQ4_NL, 128 added.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn levels(qs: [&[u8; 128]; 2], part: usize) -> __m512i {
    const UNSIGNED: [u8; 16] = {
        let (mut levels, mut i) = ([0; 16], 0);
        while i < 16 {
            levels[i] = (IQ4_LEVELS[i] as u8).wrapping_add(128);
            i += 1;
        }
        levels
    };
    // SAFETY: 16 bytes are read.
    let levels = unsafe { _mm_loadu_si128(UNSIGNED.as_ptr().cast()) };
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(levels), nibbles(qs, part))
}

/// Moves bit `part` of each byte to bit `to`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn bit(bits: [&[u8; 32]; 2], part: usize, to: i32) -> __m512i {
    let v = shifted(load(bits, 0), to - part as i32);
    _mm512_and_si512(v, _mm512_set1_epi8(1 << to))
}

/// Moves bits `2 * (part % 4)` and the next of each byte to bits `to` and the next.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn pair(bits: [&[u8; 32]; 2], part: usize, to: i32) -> __m512i {
    let v = shifted(load(bits, 0), to - 2 * (part as i32 % 4));
    _mm512_and_si512(v, _mm512_set1_epi8(3 << to))
}
