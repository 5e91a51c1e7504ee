//! Tiles of dense products in f32.

use crate::kernels::gemm::{STRIP, Tile};
use std::arch::x86_64::*;

/// The tile of so many rows; the CPU must have AVX2 and FMA.
pub fn tile(rows: usize) -> Tile<f32> {
    match rows {
        1 => run::<1>,
        2 => run::<2>,
        3 => run::<3>,
        4 => run::<4>,
        5 => run::<5>,
        6 => run::<6>,
        _ => unreachable!("no tile has {rows} rows"),
    }
}

/// Two registers of columns a row: twelve sums hide the latency of an FMA.
///
/// # Safety
/// As [`Tile`] says, and the CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
unsafe fn run<const R: usize>(
    depth: usize,
    a: *const f32,
    strides: [usize; 2],
    strip: *const f32,
    out: *mut f32,
    stride: usize,
    add: bool,
) {
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    for k in 0..depth {
        // SAFETY: the caller's promise.
        unsafe {
            let at = strip.add(k * STRIP);
            let w = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
            for r in 0..R {
                let x = _mm256_broadcast_ss(&*a.add(r * strides[0] + k * strides[1]));
                sums[r][0] = _mm256_fmadd_ps(x, w[0], sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(x, w[1], sums[r][1]);
            }
        }
    }
    for r in 0..R {
        for half in 0..2 {
            // SAFETY: the caller's promise.
            unsafe {
                let at = out.add(r * stride + 8 * half);
                let sum = match add {
                    true => _mm256_add_ps(_mm256_loadu_ps(at), sums[r][half]),
                    false => sums[r][half],
                };
                _mm256_storeu_ps(at, sum);
            }
        }
    }
}
