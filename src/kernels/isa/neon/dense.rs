//! Tiles of dense products in f32, for NEON.

use crate::kernels::gemm::{NARROW, STRIP, Tile};
use std::arch::aarch64::*;

/// Strides of a packed left operand: the rows of a tile are interleaved.
const PACKED: [usize; 2] = [1, NARROW.rows];
/// Registers of a strip's columns.
const WIDTH: usize = STRIP / 4;

/// The kernel for this number of rows and these strides, and one strip; the CPU must have NEON.
pub(super) fn tile(rows: usize, _: usize, strides: [usize; 2]) -> Tile<f32> {
    if strides == PACKED { of::<true>(rows) } else { of::<false>(rows) }
}

fn of<const P: bool>(rows: usize) -> Tile<f32> {
    match rows {
        1 => run::<1, P>,
        2 => run::<2, P>,
        3 => run::<3, P>,
        4 => run::<4, P>,
        5 => run::<5, P>,
        6 => run::<6, P>,
        _ => unreachable!("no tile has {rows} rows"),
    }
}

/// Computes a tile with four registers of columns per row: six rows take 24 of the 32 registers.
/// With `P` the strides are [`PACKED`], as compile-time constants.
///
/// # Safety
/// As for [`Tile`]; the CPU must have NEON.
#[target_feature(enable = "neon")]
unsafe fn run<const R: usize, const P: bool>(
    depth: usize,
    a: *const f32,
    strides: [usize; 2],
    strip: *const f32,
    _: usize,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    let [row, col] = if P { PACKED } else { strides };
    let mut sums = [[vdupq_n_f32(0.0); WIDTH]; R];
    let (mut x, mut w) = (a, strip);
    for _ in 0..depth {
        let mut cols = [vdupq_n_f32(0.0); WIDTH];
        for (i, cols) in cols.iter_mut().enumerate() {
            // SAFETY: guaranteed by the caller.
            *cols = unsafe { vld1q_f32(w.add(4 * i)) };
        }
        for r in 0..R {
            // SAFETY: guaranteed by the caller.
            let x = unsafe { *x.add(r * row) };
            for i in 0..WIDTH {
                sums[r][i] = vfmaq_n_f32(sums[r][i], cols[i], x);
            }
        }
        // The last addresses may be outside, and are not read.
        (x, w) = (x.wrapping_add(col), w.wrapping_add(STRIP));
    }
    for r in 0..R {
        for i in 0..WIDTH {
            // SAFETY: guaranteed by the caller.
            unsafe {
                let at = out.add(r * stride + 4 * i);
                let sum = if add { vaddq_f32(vld1q_f32(at), sums[r][i]) } else { sums[r][i] };
                vst1q_f32(at, sum);
            }
        }
    }
}

/// Transposes a block of eight by eight numbers, whose rows are the strides apart: four blocks of
/// four by four, each of which changes places with its mirror image.
///
/// # Safety
/// All of these numbers must be readable and writable, and the CPU must have NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn transpose(
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
) {
    for (row, col) in [(0, 0), (0, 4), (4, 0), (4, 4)] {
        // SAFETY: guaranteed by the caller.
        let r: [float32x4_t; 4] =
            std::array::from_fn(|i| unsafe { vld1q_f32(from.add((row + i) * from_stride + col)) });
        // Interleave pairs of numbers, then pairs of these.
        let two = |a, b| [vtrn1q_f32(a, b), vtrn2q_f32(a, b)].map(|x| vreinterpretq_f64_f32(x));
        let ([a, b], [c, d]) = (two(r[0], r[1]), two(r[2], r[3]));
        let columns = [vtrn1q_f64(a, c), vtrn1q_f64(b, d), vtrn2q_f64(a, c), vtrn2q_f64(b, d)];
        for (i, column) in columns.into_iter().enumerate() {
            // SAFETY: guaranteed by the caller.
            unsafe {
                vst1q_f32(to.add((col + i) * to_stride + row), vreinterpretq_f32_f64(column))
            };
        }
    }
}
