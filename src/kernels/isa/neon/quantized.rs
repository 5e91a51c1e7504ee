//! One kernel for quantized weights of all types, for NEON.
//!
//! A dot product of four weights and four activations is added to each of a register's four sums.
//! The sums are multiplied by the scales if these are integers.

use super::block::Block;
use super::{Bytes, Floats, Ints, plus_products, plus_times};
use crate::kernels::activation::Row;
use crate::kernels::pack::BLOCK;
use std::arch::aarch64::*;
use std::arch::asm;
use std::ops::Range;

/// Adds to each sum the products of four bytes of `w` and the four bytes `PART` of `x`.
///
/// The intrinsic for this instruction, `vdotq_laneq_s32`, is unstable in Rust 1.95.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot<const PART: usize>(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes only these registers, and the function requires the
    // feature that has it.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {w:v}.16b, {x:v}.4b[{part}]",
            sum = inout(vreg) sum,
            w = in(vreg) w,
            x = in(vreg) x,
            part = const PART,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// Repeats the body for each part of a half block, unrolled, so that the compiler knows the bits of
/// each part.
macro_rules! each_part {
    ($part:ident => $body:block) => {
        each_part!($part => $body, 0 1 2 3)
    };
    ($part:ident => $body:block, $($value:literal)*) => {
        $({ const $part: usize = $value; $body })*
    };
}

#[target_feature(enable = "neon")]
#[inline]
fn to_floats(x: Ints) -> Floats {
    x.map(|x| vcvtq_f32_s32(x))
}

/// Computes a tile of one group by `T` tokens.
///
/// # Safety
/// As for `matmul::Tile`; the CPU must have NEON and dot products.
#[target_feature(enable = "neon,dotprod")]
pub(super) unsafe fn tile<B: Block, const T: usize>(
    weights: *const u8,
    blocks: usize,
    x: &[Row],
    out: *mut f32,
    stride: usize,
) {
    let x: &[Row; T] = x.try_into().expect("as many rows as the tile has tokens");
    let weights = weights.cast::<B>();
    let mut acc = [[vdupq_n_f32(0.0); 2]; T];
    // SAFETY: guaranteed by the caller.
    let refined = unsafe { x[0].refined() };
    if B::SUBS == 1 {
        // One loop for both, because the compiler repeats the unrolled body in each.
        for i in 0..blocks + refined.len() {
            // SAFETY: the group has `blocks` blocks; the residuals follow the rows' blocks.
            unsafe {
                let b = match i.checked_sub(blocks) {
                    None => i,
                    Some(_) if x[0].are_zeros::<T>(i * x[0].step) => continue,
                    Some(i) => refined[i] as usize,
                };
                single(&*weights.add(b), i * x[0].step, x, &mut acc);
            }
        }
    } else {
        for b in 0..blocks {
            // SAFETY: as above.
            unsafe {
                several(&*weights.add(b), 0..B::SUBS, b * B::SUBS * x[0].step, x, &mut acc);
            }
        }
        for (i, &refined) in refined.iter().enumerate() {
            let (b, sub) = (refined as usize / B::SUBS, refined as usize % B::SUBS);
            let at = (blocks * B::SUBS + i) * x[0].step;
            // SAFETY: as above.
            unsafe {
                if !x[0].are_zeros::<T>(at) {
                    several(&*weights.add(b), sub..sub + 1, at, x, &mut acc);
                }
            }
        }
    }
    for t in 0..T {
        for half in 0..2 {
            // SAFETY: guaranteed by the caller.
            unsafe { vst1q_f32(out.add(t * stride + 4 * half), acc[t][half]) };
        }
    }
}

/// Adds a block of 32 columns; a row's block is block `at` from its first one on.
///
/// # Safety
/// The CPU must have NEON and dot products, and the rows must have such a block.
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn single<B: Block, const T: usize>(
    block: &B,
    at: usize,
    x: &[Row; T],
    acc: &mut [Floats; T],
) {
    // SAFETY: guaranteed by the caller.
    let (sums, d, min) = unsafe { (sums(block, 0, at, x), block.d(), block.min(0)) };
    for t in 0..T {
        // SAFETY: the row has a scale and a sum for each block.
        let (xd, xs) = unsafe { (*x[t].d.add(at), *x[t].s.add(at)) };
        let scaled = d.map(|d| vmulq_n_f32(d, xd));
        acc[t] = plus_products(acc[t], scaled, to_floats(sums[t]));
        if B::MINS {
            acc[t] = plus_times(acc[t], min, xs);
        }
    }
}

/// Adds sub-blocks of a block, 32 columns each; a row's first is block `at` from its first one on.
/// Scales and minima are integers multiplied by one float for the whole block, which is applied at
/// the end.
///
/// # Safety
/// As for [`single`].
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn several<B: Block, const T: usize>(
    block: &B,
    subs: Range<usize>,
    at: usize,
    x: &[Row; T],
    acc: &mut [Floats; T],
) {
    let place = |sub: usize| at + (sub - subs.start) * x[0].step;
    let mut products = [[vdupq_n_f32(0.0); 2]; T];
    for sub in subs.clone() {
        let at = place(sub);
        // SAFETY: guaranteed by the caller.
        let sums = unsafe { sums(block, sub, at, x) };
        for t in 0..T {
            // SAFETY: the row has a scale for each block.
            let xd = unsafe { *x[t].d.add(at) };
            products[t] = plus_times(products[t], to_floats(sums[t]), xd);
        }
    }
    // SAFETY: guaranteed by the caller.
    let d = unsafe { block.d() };
    for t in 0..T {
        acc[t] = plus_products(acc[t], d, products[t]);
    }
    if !B::MINS {
        return;
    }
    // Two chains of sums each: a single one would wait for the latency of its own additions.
    let mut mins = [[[vdupq_n_f32(0.0); 2]; T]; 2];
    let each = if B::SIXTEENS { 2 } else { 1 };
    for i in subs.start * each..subs.end * each {
        let at = place(i / each);
        // SAFETY: guaranteed by the caller.
        let min = unsafe { block.min(i) };
        for t in 0..T {
            // SAFETY: the row has a sum for each block, and two sums for its halves.
            let xs = unsafe {
                match B::SIXTEENS {
                    true => *x[t].h.add(2 * at + i % 2),
                    false => *x[t].s.add(at),
                }
            };
            mins[i % 2][t] = plus_times(mins[i % 2][t], min, xs);
        }
    }
    // SAFETY: guaranteed by the caller.
    let m = unsafe { block.m() };
    for t in 0..T {
        let sum = std::array::from_fn(|i| vaddq_f32(mins[0][t][i], mins[1][t][i]));
        acc[t] = plus_products(acc[t], m, sum);
    }
}

/// Sums over 32 columns, sub-block `sub` of the weights and block `at` of the rows, multiplied by
/// the scales if these are integers.
///
/// # Safety
/// As for [`single`].
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn sums<B: Block, const T: usize>(
    block: &B,
    sub: usize,
    at: usize,
    x: &[Row; T],
) -> [Ints; T] {
    let zero = [vdupq_n_s32(0); 2];
    let mut sums = [zero; T];
    // SAFETY: guaranteed by the caller.
    unsafe {
        add_half::<B, 0, T>(block, sub, at, x, &mut sums);
        if !B::SIXTEENS {
            add_half::<B, 1, T>(block, sub, at, x, &mut sums);
            // A block without sub-blocks has no integer scales.
            return if B::SUBS == 1 { sums } else { scaled(sums, block.scales(sub), [zero; T]) };
        }
        let mut second = [zero; T];
        add_half::<B, 1, T>(block, sub, at, x, &mut second);
        let first = scaled(sums, block.scales(2 * sub), [zero; T]);
        scaled(second, block.scales(2 * sub + 1), first)
    }
}

/// `to + sums * scales`.
#[target_feature(enable = "neon")]
#[inline]
fn scaled<const T: usize>(sums: [Ints; T], scales: Ints, mut to: [Ints; T]) -> [Ints; T] {
    for t in 0..T {
        for i in 0..2 {
            to[t][i] = vmlaq_s32(to[t][i], sums[t][i], scales[i]);
        }
    }
    to
}

/// Adds half `HALF` of 32 columns, without scales.
///
/// # Safety
/// As for [`single`].
#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn add_half<B: Block, const HALF: usize, const T: usize>(
    block: &B,
    sub: usize,
    at: usize,
    x: &[Row; T],
    sums: &mut [Ints; T],
) {
    let mut q = [vdupq_n_s8(0); T];
    for t in 0..T {
        // SAFETY: the row has as many blocks of 32 bytes.
        q[t] = unsafe { vld1q_s8(x[t].q.add(BLOCK * at + 16 * HALF)) };
    }
    each_part!(PART => {
        // SAFETY: guaranteed by the caller.
        let w: Bytes = unsafe { block.weights(sub, 4 * HALF + PART) };
        for t in 0..T {
            for i in 0..2 {
                sums[t][i] = dot::<PART>(sums[t][i], w[i], q[t]);
            }
        }
    });
}
