//! Tiles of dense products in f32, for AVX-512.

use crate::kernels::gemm::{STRIP, Shape, Tile};
use std::arch::x86_64::*;

/// 24 sums hide the latency of an FMA; eleven registers are loaded for them. Three strips take
/// 36 KB of an L1 cache of 48.
pub(super) const SHAPE: Shape = Shape { rows: 8, strips: 3, depth: 192 };
/// Strides of a packed left operand: the rows of a tile are interleaved.
const PACKED: [usize; 2] = [1, SHAPE.rows];

/// The kernel for these numbers of rows and strips and these strides; the CPU must have AVX-512 F.
pub(super) fn tile(rows: usize, strips: usize, strides: [usize; 2]) -> Tile<f32> {
    match strips {
        1 => of_strips::<1>(rows, strides),
        2 => of_strips::<2>(rows, strides),
        3 => of_strips::<3>(rows, strides),
        _ => unreachable!("no tile has {strips} strips"),
    }
}

fn of_strips<const S: usize>(rows: usize, strides: [usize; 2]) -> Tile<f32> {
    if strides == PACKED { of::<S, true>(rows) } else { of::<S, false>(rows) }
}

fn of<const S: usize, const P: bool>(rows: usize) -> Tile<f32> {
    match rows {
        1 => run::<1, S, P>,
        2 => run::<2, S, P>,
        3 => run::<3, S, P>,
        4 => run::<4, S, P>,
        5 => run::<5, S, P>,
        6 => run::<6, S, P>,
        7 => run::<7, S, P>,
        8 => run::<8, S, P>,
        _ => unreachable!("no tile has {rows} rows"),
    }
}

/// Computes a tile with a register of columns per row and strip. With `P` the strides are
/// [`PACKED`], as compile-time constants.
///
/// # Safety
/// As for [`Tile`]; the CPU must have AVX-512 F.
#[target_feature(enable = "avx512f")]
unsafe fn run<const R: usize, const S: usize, const P: bool>(
    depth: usize,
    a: *const f32,
    strides: [usize; 2],
    strip: *const f32,
    distance: usize,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    let [row, col] = if P { PACKED } else { strides };
    // Prefetch the result's cache lines while the sums are computed.
    for (r, s) in (0..R).flat_map(|r| (0..S).map(move |s| (r, s))) {
        // SAFETY: the address is inside `out`, and a prefetch changes nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(out.add(r * stride + s * STRIP).cast()) };
    }
    let mut sums = [[_mm512_setzero_ps(); S]; R];
    let (mut x, mut w) = (a, strip);
    for _ in 0..depth {
        // SAFETY: guaranteed by the caller; the pointers end after the last numbers.
        unsafe {
            let cols: [__m512; S] = std::array::from_fn(|s| _mm512_loadu_ps(w.add(s * distance)));
            for r in 0..R {
                let x = _mm512_set1_ps(*x.add(r * row));
                for s in 0..S {
                    sums[r][s] = _mm512_fmadd_ps(x, cols[s], sums[r][s]);
                }
            }
            x = x.wrapping_add(col);
            w = w.add(STRIP);
        }
    }
    for r in 0..R {
        for s in 0..S {
            // SAFETY: guaranteed by the caller.
            unsafe {
                let at = out.add(r * stride + s * STRIP);
                let sum = match add {
                    true => _mm512_add_ps(_mm512_loadu_ps(at), sums[r][s]),
                    false => sums[r][s],
                };
                _mm512_storeu_ps(at, sum);
            }
        }
    }
}
