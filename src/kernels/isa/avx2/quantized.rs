//! One kernel for quantized weights of all types, for AVX2 and, with other [`Sums`], AVX-VNNI.

use super::block::Block;
use super::prefetch;
use crate::kernels::activation::Row;
use crate::kernels::pack::BLOCK;
use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Bytes of a group's weights between the ones that are read for several tokens and the ones that
/// are prefetched.
const AHEAD: usize = 1024;

/// Registers of four columns each in a block of 32 columns.
const PARTS: usize = 8;

/// Repeats the body for each part, unrolled, so that the compiler knows the bits of each part.
macro_rules! each_part {
    ($part:ident => $body:block) => {
        each_part!($part => $body, 0 1 2 3 4 5 6 7)
    };
    ($part:ident => $body:block, $($value:literal)*) => {
        $({ let $part: usize = $value; $body })*
    };
}

pub(in super::super) use each_part;

/// The integer arithmetic of a tile.
pub(in super::super) trait Sums {
    /// Sums over 32 columns, sub-block `sub` of the weights and block `at` of the panel and the ones
    /// after it, multiplied by the scales if these are integers: exact, then rounded to f32.
    ///
    /// # Safety
    /// The rows must be of one panel, one after another, and have a block: block `at` is the first
    /// row's. The CPU must have AVX2, FMA and F16C, and the instructions of this arithmetic.
    unsafe fn sums<B: Block, const G: usize, const T: usize>(
        block: [&B; G],
        sub: usize,
        at: usize,
        x: &[Row; T],
    ) -> [[__m256; T]; G];
}

/// The arithmetic of AVX2: products of unsigned weights and signed activations are summed in 16
/// bits over as many columns as cannot overflow, then widened to 32 bits, and multiplied by the
/// scales if these are integers.
pub(super) struct Narrow;

/// Number of registers of products that can be summed in 16 bits: all that share a scale, or as
/// many as cannot overflow.
const fn run<B: Block>() -> usize {
    if B::SIGNED {
        return 1;
    }
    let mut parts = if B::SIXTEENS { PARTS / 2 } else { PARTS };
    while B::MOST * 127 * 2 * parts as i32 > i16::MAX as i32 {
        parts /= 2;
    }
    parts
}

/// Computes a tile of `G` groups by `T` tokens.
///
/// # Safety
/// As for `matmul::Tile`, with tokens of one panel, one after another; the CPU must have AVX2, FMA
/// and F16C, and the instructions of `S`.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn tile<S: Sums, B: Block, const G: usize, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let weights = weights.cast::<B>();
    let mut acc = [[_mm256_setzero_ps(); T]; G];
    let block = |b: usize| {
        // SAFETY: group `g` has `blocks` blocks.
        let mut block = [unsafe { &*weights }; G];
        for g in 0..G {
            // SAFETY: as above.
            block[g] = unsafe { &*weights.add(g * blocks + b) };
        }
        block
    };
    // SAFETY: guaranteed by the caller.
    let refined = unsafe { x[0].refined() };
    if B::SUBS == 1 {
        // One loop for both, because the compiler repeats the unrolled body in each.
        for i in 0..blocks + refined.len() {
            // SAFETY: guaranteed by the caller; the residuals follow the blocks.
            unsafe {
                let b = match i.checked_sub(blocks) {
                    None => i,
                    Some(_) if x[0].are_zeros::<T>(i * x[0].step) => continue,
                    Some(i) => refined[i] as usize,
                };
                single::<S, _, _, _>(block(b), i * x[0].step, x, &mut acc, blocks);
            }
        }
    } else {
        for b in 0..blocks {
            let at = b * B::SUBS * x[0].step;
            // SAFETY: guaranteed by the caller.
            unsafe { several::<S, _, _, _>(block(b), 0..B::SUBS, at, x, &mut acc, blocks) };
        }
        for (i, &refined) in refined.iter().enumerate() {
            let (b, sub) = (refined as usize / B::SUBS, refined as usize % B::SUBS);
            let at = (blocks * B::SUBS + i) * x[0].step;
            // SAFETY: guaranteed by the caller; the residuals follow the blocks.
            unsafe {
                if !x[0].are_zeros::<T>(at) {
                    several::<S, _, _, _>(block(b), sub..sub + 1, at, x, &mut acc, blocks);
                }
            }
        }
    }
    for g in 0..G {
        for t in 0..T {
            // SAFETY: guaranteed by the caller.
            unsafe { _mm256_storeu_ps(out.add(t * stride + 8 * g), acc[g][t]) };
        }
    }
}

/// Adds a block of 32 columns; the first token's block is block `at` of the panel.
///
/// # Safety
/// As for [`tile`]; the rows must have such a block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn single<S: Sums, B: Block, const G: usize, const T: usize>(
    block: [&B; G],
    at: usize,
    x: &[Row; T],
    acc: &mut [[__m256; T]; G],
    blocks: usize,
) {
    // SAFETY: guaranteed by the caller.
    let sums = unsafe {
        prefetch_ahead::<B, G, T>(block, 0, blocks);
        S::sums(block, 0, at, x)
    };
    for g in 0..G {
        // SAFETY: guaranteed by the caller.
        let (d, min) = unsafe { (block[g].d(), block[g].min(0)) };
        for t in 0..T {
            // SAFETY: the row has a scale and a sum for each block.
            let (xd, xs) = unsafe {
                (
                    _mm256_broadcast_ss(&*x[0].d.add(at + t)),
                    _mm256_broadcast_ss(&*x[0].s.add(at + t)),
                )
            };
            let scaled = _mm256_mul_ps(d, xd);
            acc[g][t] = _mm256_fmadd_ps(scaled, sums[g][t], acc[g][t]);
            if B::MINS {
                acc[g][t] = _mm256_fmadd_ps(min, xs, acc[g][t]);
            }
        }
    }
}

/// Adds sub-blocks of a block, 32 columns each, of which block `at` of the panel is the first
/// token's first. Scales and minima are integers multiplied by one float for the whole block, which
/// is applied at the end.
///
/// # Safety
/// As for [`single`].
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn several<S: Sums, B: Block, const G: usize, const T: usize>(
    block: [&B; G],
    subs: Range<usize>,
    at: usize,
    x: &[Row; T],
    acc: &mut [[__m256; T]; G],
    blocks: usize,
) {
    let place = |sub: usize| at + (sub - subs.start) * x[0].step;
    let mut products = [[_mm256_setzero_ps(); T]; G];
    for sub in subs.clone() {
        let at = place(sub);
        // SAFETY: guaranteed by the caller.
        let sums = unsafe {
            prefetch_ahead::<B, G, T>(block, sub, blocks);
            S::sums(block, sub, at, x)
        };
        for t in 0..T {
            // SAFETY: the row has a scale for each block.
            let xd = unsafe { _mm256_broadcast_ss(&*x[0].d.add(at + t)) };
            for g in 0..G {
                products[g][t] = _mm256_fmadd_ps(xd, sums[g][t], products[g][t]);
            }
        }
    }
    for g in 0..G {
        // SAFETY: guaranteed by the caller.
        let d = unsafe { block[g].d() };
        for t in 0..T {
            acc[g][t] = _mm256_fmadd_ps(d, products[g][t], acc[g][t]);
        }
    }
    if !B::MINS {
        return;
    }
    // Two chains of sums each: a single one would wait for the latency of its own additions.
    let mut mins = [[[_mm256_setzero_ps(); T]; G]; 2];
    let each = if B::SIXTEENS { 2 } else { 1 };
    for i in subs.start * each..subs.end * each {
        let at = place(i / each);
        for g in 0..G {
            // SAFETY: guaranteed by the caller.
            let min = unsafe { block[g].min(i) };
            for t in 0..T {
                // SAFETY: the row has a sum for each block, and two sums for its halves.
                let xs = unsafe {
                    _mm256_broadcast_ss(&*match B::SIXTEENS {
                        true => x[0].h.add(2 * (at + t) + i % 2),
                        false => x[0].s.add(at + t),
                    })
                };
                mins[i % 2][g][t] = _mm256_fmadd_ps(min, xs, mins[i % 2][g][t]);
            }
        }
    }
    for g in 0..G {
        // SAFETY: guaranteed by the caller.
        let m = unsafe { block[g].m() };
        for t in 0..T {
            let sum = _mm256_add_ps(mins[0][g][t], mins[1][g][t]);
            acc[g][t] = _mm256_fmadd_ps(m, sum, acc[g][t]);
        }
    }
}

/// Returns its argument through an empty instruction that the compiler does not reorder with others
/// of its kind. Otherwise the compiler would compute all of a block's weights first and spill them.
#[target_feature(enable = "avx2")]
#[inline]
pub(in super::super) fn in_order(mut v: __m256i) -> __m256i {
    // SAFETY: the assembly is a comment: it does nothing.
    unsafe {
        asm!("/* {0} */", inout(ymm_reg) v, options(nomem, nostack, preserves_flags));
    }
    v
}

/// Prefetches what a tile reads after sub-block `sub` of its groups, which have `blocks` blocks.
#[target_feature(enable = "avx2")]
#[inline]
fn prefetch_ahead<B: Block, const G: usize, const T: usize>(
    block: [&B; G],
    sub: usize,
    blocks: usize,
) {
    // One token reads the next tile's first bytes soon; more tokens take longer for a group.
    let ahead = if T == 1 { G * blocks * size_of::<B>() } else { AHEAD };
    let bytes = size_of::<B>() / B::SUBS;
    for g in 0..G {
        let from = std::ptr::from_ref(block[g]).cast::<u8>().wrapping_add(ahead);
        prefetch(from.wrapping_add(sub * bytes), bytes);
    }
}

impl Sums for Narrow {
    /// # Safety
    /// As in the trait.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn sums<B: Block, const G: usize, const T: usize>(
        block: [&B; G],
        sub: usize,
        at: usize,
        x: &[Row; T],
    ) -> [[__m256; T]; G] {
        let run = const { run::<B>() };
        let zero = _mm256_setzero_si256();
        let (mut sums, mut narrow) = ([[zero; T]; G], [[zero; T]; G]);
        each_part!(part => {
            let mut w = [zero; G];
            for g in 0..G {
                // SAFETY: guaranteed by the caller.
                w[g] = in_order(unsafe { block[g].weights(sub, part) });
            }
            for t in 0..T {
                // SAFETY: the row has as many blocks of 32 bytes.
                let q = unsafe {
                    let q = x[0].q.add(BLOCK * (at + t) + 4 * part);
                    _mm256_set1_epi32(q.cast::<i32>().read_unaligned())
                };
                for g in 0..G {
                    let products = if B::SIGNED {
                        _mm256_maddubs_epi16(_mm256_abs_epi8(w[g]), _mm256_sign_epi8(q, w[g]))
                    } else {
                        _mm256_maddubs_epi16(w[g], q)
                    };
                    narrow[g][t] = in_order(_mm256_add_epi16(narrow[g][t], products));
                    if part % run == run - 1 {
                        let i = if B::SIXTEENS { 2 * sub + 2 * part / PARTS } else { sub };
                        // SAFETY: guaranteed by the caller.
                        let scales = unsafe { block[g].scales(i) };
                        let widened = _mm256_madd_epi16(narrow[g][t], scales);
                        sums[g][t] = in_order(_mm256_add_epi32(sums[g][t], widened));
                        narrow[g][t] = zero;
                    }
                }
            }
        });
        let mut floats = [[_mm256_setzero_ps(); T]; G];
        for g in 0..G {
            for t in 0..T {
                floats[g][t] = _mm256_cvtepi32_ps(sums[g][t]);
            }
        }
        floats
    }
}
