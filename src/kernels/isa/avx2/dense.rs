//! Tiles of dense products in f32, for AVX2.

use crate::kernels::gemm::{NARROW, STRIP, Tile};
use std::arch::x86_64::*;

/// Strides of a packed left operand: the rows of a tile are interleaved.
const PACKED: [usize; 2] = [1, NARROW.rows];

/// The kernel for this number of rows and these strides, and one strip; the CPU must have AVX2 and
/// FMA.
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

/// Computes a tile with two registers of columns per row: twelve sums hide the latency of an FMA.
/// With `P` the strides are [`PACKED`], as compile-time constants.
///
/// # Safety
/// As for [`Tile`]; the CPU must have AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
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
    // Prefetch the result's cache lines while the sums are computed.
    for r in 0..R {
        // SAFETY: the address is inside `out`, and a prefetch changes nothing.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(out.add(r * stride).cast());
            _mm_prefetch::<_MM_HINT_T0>(out.add(r * stride + STRIP - 1).cast());
        }
    }
    let mut sums = [[_mm256_setzero_ps(); 2]; R];
    let (mut x, mut w) = (a, strip);
    for _ in 0..depth {
        // SAFETY: guaranteed by the caller; the pointers end after the last numbers.
        unsafe {
            let cols = [_mm256_loadu_ps(w), _mm256_loadu_ps(w.add(8))];
            for r in 0..R {
                let x = _mm256_broadcast_ss(&*x.add(r * row));
                sums[r][0] = _mm256_fmadd_ps(x, cols[0], sums[r][0]);
                sums[r][1] = _mm256_fmadd_ps(x, cols[1], sums[r][1]);
            }
            x = x.wrapping_add(col);
            w = w.add(STRIP);
        }
    }
    for r in 0..R {
        for half in 0..2 {
            // SAFETY: guaranteed by the caller.
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

/// Transposes a block of eight by eight numbers, whose rows are the strides apart.
///
/// # Safety
/// All of these numbers must be readable and writable, and the CPU must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transpose(
    from: *const f32,
    from_stride: usize,
    to: *mut f32,
    to_stride: usize,
) {
    // SAFETY: guaranteed by the caller.
    let r: [__m256; 8] =
        std::array::from_fn(|i| unsafe { _mm256_loadu_ps(from.add(i * from_stride)) });
    // Interleave pairs, then groups of four, then halves.
    let two = |a, b| [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)];
    let four = |a, b| [_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xEE>(a, b)];
    let ([a, b], [c, d]) = (two(r[0], r[1]), two(r[2], r[3]));
    let ([e, f], [g, h]) = (two(r[4], r[5]), two(r[6], r[7]));
    let ([a, c], [b, d]) = (four(a, c), four(b, d));
    let ([e, g], [f, h]) = (four(e, g), four(f, h));
    let (low, high) = ([a, c, b, d], [e, g, f, h]);
    for i in 0..4 {
        // SAFETY: guaranteed by the caller.
        unsafe {
            let top = _mm256_permute2f128_ps::<0x20>(low[i], high[i]);
            let bottom = _mm256_permute2f128_ps::<0x31>(low[i], high[i]);
            _mm256_storeu_ps(to.add(i * to_stride), top);
            _mm256_storeu_ps(to.add((i + 4) * to_stride), bottom);
        }
    }
}
