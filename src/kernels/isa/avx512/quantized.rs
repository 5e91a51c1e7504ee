//! One kernel for quantized weights of all types, for AVX-512 with VNNI.
//!
//! `vpdpbusd` adds the products of four unsigned weights and four signed activations to a 32-bit
//! sum. Signed weights are made unsigned by adding 128; the sum then starts at -128 times the sum
//! of the activations.

use super::LINE;
use super::block::{Block, Pair, Register, Unpacked, Weights};
use crate::kernels::activation::Row;
use crate::kernels::pack::{BLOCK, LANES};
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

/// Bytes of a group's weights between the ones that are read and the ones that are prefetched.
const AHEAD: usize = 1024;

/// Repeats the body for each of the eight registers of four columns, unrolled, so that the compiler
/// knows the bits of each part.
macro_rules! each_part {
    ($part:ident => $body:block) => {
        each_part!($part => $body, 0 1 2 3 4 5 6 7)
    };
    ($part:ident => $body:block, $($value:literal)*) => {
        $({ let $part: usize = $value; $body })*
    };
}

/// Computes a tile of `P` pairs of groups by `T` tokens, or of a single group if `P` is 0.
///
/// # Safety
/// As for `matmul::Tile`, with tokens of one panel, one after another; the CPU must have AVX-512 F,
/// BW, DQ, VL and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
pub(super) unsafe fn tile<B: Block, const P: usize, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    assert!(x.len() == T);
    let distance = blocks * size_of::<B>();
    // SAFETY: guaranteed by the caller.
    unsafe {
        if P > 0 {
            return packed::<B, P, T>(weights, blocks, distance, &x[0], out, stride);
        }
        // The same rows twice; the second half of the result is dropped.
        let mut sums = [[0f32; 2 * LANES]; T];
        packed::<B, 1, T>(weights, blocks, 0, &x[0], sums.as_mut_ptr().cast(), 2 * LANES);
        for (t, sums) in sums.iter().enumerate() {
            out.add(t * stride).copy_from_nonoverlapping(sums.as_ptr(), LANES);
        }
    }
}

/// Computes a tile from packed weights, whose groups are `distance` bytes apart.
///
/// # Safety
/// As for [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
unsafe fn packed<B: Block, const P: usize, const T: usize>(
    weights: *const u8,
    blocks: usize,
    distance: usize,
    x: &Row,
    out: *mut f32,
    stride: usize,
) {
    let pairs = |b: usize| -> [Pair<B>; P] {
        // SAFETY: every group has `blocks` blocks.
        std::array::from_fn(|p| unsafe {
            let low = weights.add(2 * p * distance + b * size_of::<B>());
            for line in 0..size_of::<B>().div_ceil(LINE) {
                let ahead = low.wrapping_add(AHEAD + line * LINE);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(distance).cast());
            }
            Pair(&*low.cast::<B>(), &*low.add(distance).cast::<B>())
        })
    };
    // SAFETY: guaranteed by the caller.
    unsafe { run::<_, P, T>(pairs, blocks, x, out, stride) };
}

/// Computes the tiles of two groups by the tokens of `x`: the first of `T` tokens of a panel each.
/// The weights are unpacked once. Tile `i` starts at `out + i * T * stride`.
///
/// # Safety
/// As for [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
pub(super) unsafe fn tiles<B: Block, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let distance = blocks * size_of::<B>();
    let mut unpacked = UNPACKED.take();
    let registers = blocks * Unpacked::<B>::REGISTERS;
    if unpacked.len() < registers {
        unpacked.resize(registers, Register([0; 64]));
    }
    for (b, to) in unpacked.chunks_exact_mut(Unpacked::<B>::REGISTERS).take(blocks).enumerate() {
        // SAFETY: both groups have `blocks` blocks.
        unsafe {
            let low = weights.add(b * size_of::<B>());
            let pair = Pair(&*low.cast::<B>(), &*low.add(distance).cast::<B>());
            Unpacked::<B>::write(pair, to);
        }
    }
    let from = unpacked.as_ptr();
    for (tile, x) in x.iter().enumerate() {
        // SAFETY: `from` has this many blocks, and the caller guarantees the rest.
        unsafe {
            let at = |b: usize| [Unpacked::<B>::at(from.add(b * Unpacked::<B>::REGISTERS))];
            run::<_, 1, T>(at, blocks, x, out.add(tile * T * stride), stride);
        }
    }
    UNPACKED.set(unpacked);
}

thread_local! {
    /// The unpacked weights of two groups.
    static UNPACKED: Cell<Vec<Register>> = const { Cell::new(Vec::new()) };
}

/// # Safety
/// As for [`tile`]; `weights` must return the weights of every block.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
#[inline(never)]
unsafe fn run<W: Weights, const P: usize, const T: usize>(
    weights: impl Fn(usize) -> [W; P],
    blocks: usize,
    x: &Row,
    out: *mut f32,
    stride: usize,
) {
    let x = *x;
    // SAFETY: guaranteed by the caller.
    let refined = unsafe { x.refined() };
    let mut acc = [[_mm512_setzero_ps(); T]; P];
    if W::SUBS == 1 {
        // One loop for both, because the compiler repeats the unrolled body in each.
        for i in 0..blocks + refined.len() {
            // SAFETY: guaranteed by the caller; the residuals follow the blocks.
            unsafe {
                let b = match i.checked_sub(blocks) {
                    None => i,
                    Some(_) if x.are_zeros::<T>(i * x.step) => continue,
                    Some(i) => refined[i] as usize,
                };
                single(weights(b), i * x.step, &x, &mut acc);
            }
        }
    } else {
        for b in 0..blocks {
            // SAFETY: guaranteed by the caller.
            unsafe { several(weights(b), 0..W::SUBS, b * W::SUBS * x.step, &x, &mut acc) };
        }
        for (i, &refined) in refined.iter().enumerate() {
            let (b, sub) = (refined as usize / W::SUBS, refined as usize % W::SUBS);
            let at = (blocks * W::SUBS + i) * x.step;
            // SAFETY: guaranteed by the caller; the residuals follow the blocks.
            unsafe {
                if !x.are_zeros::<T>(at) {
                    several(weights(b), sub..sub + 1, at, &x, &mut acc);
                }
            }
        }
    }
    for (p, acc) in acc.iter().enumerate() {
        for (t, acc) in acc.iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe { _mm512_storeu_ps(out.add(t * stride + 2 * LANES * p), *acc) };
        }
    }
}

/// Adds a block of 32 columns; the first token's block is block `at` of `x`.
///
/// # Safety
/// The CPU must have the features of [`tile`], and the tokens such a block.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
#[inline]
unsafe fn single<W: Weights, const P: usize, const T: usize>(
    pairs: [W; P],
    at: usize,
    x: &Row,
    acc: &mut [[__m512; T]; P],
) {
    let mut sums = [[_mm512_setzero_si512(); T]; P];
    // SAFETY: guaranteed by the caller.
    unsafe { start::<W, P, T>(&mut sums, at, x) };
    each_part!(part => {
        // SAFETY: guaranteed by the caller.
        unsafe { add_part(pairs, 0, part, at, x, &mut sums) };
    });
    for p in 0..P {
        // SAFETY: guaranteed by the caller.
        let (d, min) = unsafe { (pairs[p].d(), pairs[p].min(0)) };
        for t in 0..T {
            // SAFETY: the token has a scale and a sum for each block.
            let (xd, xs) =
                unsafe { (_mm512_set1_ps(*x.d.add(at + t)), _mm512_set1_ps(*x.s.add(at + t))) };
            let scaled = _mm512_mul_ps(d, xd);
            acc[p][t] = _mm512_fmadd_ps(scaled, _mm512_cvtepi32_ps(sums[p][t]), acc[p][t]);
            if W::MINS {
                acc[p][t] = _mm512_fmadd_ps(min, xs, acc[p][t]);
            }
        }
    }
}

/// Adds sub-blocks of a block, 32 columns each; the first token's first is block `at` of `x`. Scales
/// and minima are integers multiplied by one float for the whole block, which is applied at the end.
/// The product of an integer scale and a sum is below 2^24 and so is exact in f32.
///
/// # Safety
/// As for [`single`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
#[inline]
unsafe fn several<W: Weights, const P: usize, const T: usize>(
    pairs: [W; P],
    subs: Range<usize>,
    at: usize,
    x: &Row,
    acc: &mut [[__m512; T]; P],
) {
    let place = |sub: usize| at + (sub - subs.start) * x.step;
    let zero = _mm512_setzero_ps();
    let mut products = [[zero; T]; P];
    for sub in subs.clone() {
        let at = place(sub);
        let mut scaled = [[zero; T]; P];
        let mut sums = [[_mm512_setzero_si512(); T]; P];
        // SAFETY: guaranteed by the caller.
        unsafe { start::<W, P, T>(&mut sums, at, x) };
        each_part!(part => {
            // SAFETY: guaranteed by the caller.
            unsafe { add_part(pairs, sub, part, at, x, &mut sums) };
            if W::SIXTEENS && part == 3 {
                for p in 0..P {
                    // SAFETY: guaranteed by the caller.
                    let scale = unsafe { pairs[p].scale(2 * sub) };
                    for t in 0..T {
                        scaled[p][t] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[p][t]), scale);
                        sums[p][t] = _mm512_setzero_si512();
                    }
                }
            }
        });
        for p in 0..P {
            let i = if W::SIXTEENS { 2 * sub + 1 } else { sub };
            // SAFETY: guaranteed by the caller.
            let scale = unsafe { pairs[p].scale(i) };
            for t in 0..T {
                // SAFETY: the token has a scale for each block.
                let xd = unsafe { _mm512_set1_ps(*x.d.add(at + t)) };
                let sum = _mm512_cvtepi32_ps(sums[p][t]);
                let sum = match W::SIXTEENS {
                    true => _mm512_fmadd_ps(sum, scale, scaled[p][t]),
                    false => _mm512_mul_ps(sum, scale),
                };
                products[p][t] = _mm512_fmadd_ps(xd, sum, products[p][t]);
            }
        }
    }
    for p in 0..P {
        // SAFETY: guaranteed by the caller.
        let d = unsafe { pairs[p].d() };
        for t in 0..T {
            acc[p][t] = _mm512_fmadd_ps(d, products[p][t], acc[p][t]);
        }
    }
    if !W::MINS {
        return;
    }
    // Two chains of sums each: a single one would wait for the latency of its own additions.
    let mut mins = [[[zero; T]; P]; 2];
    let each = if W::SIXTEENS { 2 } else { 1 };
    for i in subs.start * each..subs.end * each {
        let at = place(i / each);
        for p in 0..P {
            // SAFETY: guaranteed by the caller.
            let min = unsafe { pairs[p].min(i) };
            for t in 0..T {
                // SAFETY: the token has a sum for each block, and two sums for its halves.
                let xs = _mm512_set1_ps(unsafe {
                    match W::SIXTEENS {
                        true => *x.h.add(2 * (at + t) + i % 2),
                        false => *x.s.add(at + t),
                    }
                });
                mins[i % 2][p][t] = _mm512_fmadd_ps(min, xs, mins[i % 2][p][t]);
            }
        }
    }
    for p in 0..P {
        // SAFETY: guaranteed by the caller.
        let m = unsafe { pairs[p].m() };
        for t in 0..T {
            let sum = _mm512_add_ps(mins[0][p][t], mins[1][p][t]);
            acc[p][t] = _mm512_fmadd_ps(m, sum, acc[p][t]);
        }
    }
}

/// Sets the sums of signed weights to where they start.
///
/// # Safety
/// As for [`single`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
#[inline]
unsafe fn start<W: Weights, const P: usize, const T: usize>(
    sums: &mut [[__m512i; T]; P],
    at: usize,
    x: &Row,
) {
    if !W::SIGNED {
        return;
    }
    for t in 0..T {
        // SAFETY: the token has a start for each block.
        let start = _mm512_set1_epi32(unsafe { *x.z.add(at + t) });
        for sums in sums.iter_mut() {
            sums[t] = start;
        }
    }
}

/// Returns its argument through an empty instruction that the compiler does not reorder with others
/// of its kind. Otherwise the compiler would compute all of a block's weights first and spill them.
#[target_feature(enable = "avx512f")]
#[inline]
fn in_order(mut v: __m512i) -> __m512i {
    // SAFETY: the assembly is a comment: it does nothing.
    unsafe {
        asm!("/* {0} */", inout(zmm_reg) v, options(nomem, nostack, preserves_flags));
    }
    v
}

/// Adds the products of four columns.
///
/// # Safety
/// As for [`single`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")]
#[inline]
unsafe fn add_part<W: Weights, const P: usize, const T: usize>(
    pairs: [W; P],
    sub: usize,
    part: usize,
    at: usize,
    x: &Row,
    sums: &mut [[__m512i; T]; P],
) {
    let mut w = [_mm512_setzero_si512(); P];
    for p in 0..P {
        // SAFETY: guaranteed by the caller.
        w[p] = in_order(unsafe { pairs[p].weights(sub, part) });
    }
    for t in 0..T {
        // SAFETY: the token's block has 32 bytes.
        let q = unsafe {
            let q = x.q.add(BLOCK * (at + t) + 4 * part);
            _mm512_set1_epi32(q.cast::<i32>().read_unaligned())
        };
        for p in 0..P {
            sums[p][t] = _mm512_dpbusd_epi32(sums[p][t], w[p], q);
        }
    }
}
