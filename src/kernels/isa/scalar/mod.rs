//! The kernels in scalar code: the bit-exact oracle of the others, and the fallback for CPUs
//! without their instructions.

mod attention;
mod matmul;

#[cfg(target_arch = "x86_64")]
pub(super) use attention::add_exponentials;
pub(super) use attention::softmax;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use attention::{Element, Scales};

use super::{Attention, Dense, Kernels};
use crate::kernels::gemm;
use crate::kernels::pack::BLOCK;

pub(super) const KERNELS: Kernels = Kernels {
    tile: |kind, groups, _| matmul::tile(kind, groups),
    tiles: None,
    tokens: |_| 4,
    groups: |_, _| 1,
    quantize,
    attention: Attention {
        score: attention::score,
        accumulate_values: attention::accumulate_values,
        softmax,
        widen: attention::widen,
    },
    dense: Dense {
        shape: gemm::NARROW,
        tile: |rows, _, _| gemm::plain_tile(rows),
        transpose: transpose::<f32>,
    },
};

/// Quantizes a block of activations.
fn quantize(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]) {
    let mut lanes = [0f32; 8];
    for eight in values.chunks_exact(8) {
        for (lane, value) in lanes.iter_mut().zip(eight) {
            *lane = lane.max(value.abs());
        }
    }
    let largest = lanes.iter().fold(0f32, |a, &b| a.max(b));
    // A block of zeros, or of values too small to divide by, becomes all 0.
    let inverse = Some(127.0 / largest).filter(|inverse| inverse.is_finite()).unwrap_or(0.0);
    let mut sums = [0i32; 2];
    let halves = q.chunks_exact_mut(BLOCK / 2).zip(values.chunks_exact(BLOCK / 2));
    for (sum, (q, values)) in sums.iter_mut().zip(halves) {
        for (q, value) in q.iter_mut().zip(values) {
            // Within ±127 by construction; NaN becomes 0 in the saturating cast.
            let rounded = (value * inverse).round_ties_even() as i32;
            *q = rounded as i8;
            *sum += rounded;
        }
    }
    (largest / 127.0, sums)
}

/// Transposes a block of eight by eight numbers; see [`Dense`].
///
/// # Safety
/// All of these numbers must be readable and writable.
pub(in crate::kernels) unsafe fn transpose<T: Copy>(
    from: *const T,
    from_stride: usize,
    to: *mut T,
    to_stride: usize,
) {
    for (r, c) in (0..8).flat_map(|r| (0..8).map(move |c| (r, c))) {
        // SAFETY: guaranteed by the caller.
        unsafe { *to.add(c * to_stride + r) = *from.add(r * from_stride + c) };
    }
}
