//! Kernels for NEON with the dot products of Armv8.2 (`dotprod`).
//!
//! The softmax is the scalar one, which the compiler vectorizes: NEON is part of every aarch64
//! target. There is no kernel that unpacks weights once for many tokens (`Kernels::tiles`), and
//! none for the matrix products of `i8mm`.

mod attention;
mod block;
mod dense;
mod float;
mod quantize;
mod quantized;

use super::{Attention, Dense, Kernels, scalar};
use crate::kernels::gemm;
use crate::kernels::matmul::Tile;
use crate::kernels::pack::*;
use half::bf16;
use std::arch::aarch64::*;

pub(super) const KERNELS: Kernels = Kernels {
    tile,
    tiles: None,
    tokens,
    groups,
    quantize: quantize::quantize,
    attention: Attention {
        score: attention::score,
        accumulate_values: attention::accumulate_values,
        softmax: scalar::softmax,
        widen: attention::widen,
    },
    dense: Dense { shape: gemm::NARROW, tile: dense::tile, transpose: dense::transpose },
};

/// Numbers of eight rows.
type Floats = [float32x4_t; 2];
/// Integers of eight rows.
type Ints = [int32x4_t; 2];
/// Four columns of eight rows: byte `4 * row + c` is the `c`-th of them.
type Bytes = [int8x16_t; 2];

/// Most tokens of a tile: as many sums as the registers can hold.
fn tokens(kind: Kind) -> usize {
    if kind.is_float() { 6 } else { 4 }
}

/// Most groups of a tile.
fn groups(kind: Kind, tokens: usize) -> usize {
    match tokens {
        // The sums of a block are independent of the next one's, and groups are adjacent in memory.
        _ if !kind.is_float() => 1,
        // A sum of each of these groups is added to while the others wait.
        1 => 4,
        // Six tokens and two groups take 24 of the 32 registers.
        _ => 2,
    }
}

#[target_feature(enable = "neon")]
#[inline]
fn halves_to_f32(bits: uint16x8_t) -> Floats {
    let half = |bits| vcvt_f32_f16(vreinterpret_f16_u16(bits));
    [half(vget_low_u16(bits)), half(vget_high_u16(bits))]
}

#[target_feature(enable = "neon")]
#[inline]
fn f16_to_f32(bits: &[u16; 8]) -> Floats {
    // SAFETY: sixteen bytes are read.
    halves_to_f32(unsafe { vld1q_u16(bits.as_ptr()) })
}

#[target_feature(enable = "neon")]
#[inline]
fn signed_whole(bytes: int8x8_t) -> Floats {
    signed_ints(bytes).map(|x| vcvtq_f32_s32(x))
}

#[target_feature(enable = "neon")]
#[inline]
fn signed_ints(bytes: int8x8_t) -> Ints {
    let wide = vmovl_s8(bytes);
    [vmovl_s16(vget_low_s16(wide)), vmovl_s16(vget_high_s16(wide))]
}

/// `sum + x * by`, rounded once.
#[target_feature(enable = "neon")]
#[inline]
fn plus_times(sum: Floats, x: Floats, by: f32) -> Floats {
    [vfmaq_n_f32(sum[0], x[0], by), vfmaq_n_f32(sum[1], x[1], by)]
}

/// `sum + x * y`, rounded once.
#[target_feature(enable = "neon")]
#[inline]
fn plus_products(sum: Floats, x: Floats, y: Floats) -> Floats {
    [vfmaq_f32(sum[0], x[0], y[0]), vfmaq_f32(sum[1], x[1], y[1])]
}

/// The kernel for a tile of `groups` groups and `tokens` tokens; the CPU must have NEON and, for
/// quantized weights, dot products.
fn tile(kind: Kind, groups: usize, tokens: usize) -> Tile {
    match (groups, tokens) {
        (2, 2) => of_floats::<2, 2>(kind),
        (2, 3) => of_floats::<2, 3>(kind),
        (2, 4) => of_floats::<2, 4>(kind),
        (2, 5) => of_floats::<2, 5>(kind),
        (2, 6) => of_floats::<2, 6>(kind),
        (1, 5) => of_floats::<1, 5>(kind),
        (1, 6) => of_floats::<1, 6>(kind),
        (1, 1) => of_kind::<1>(kind),
        (1, 2) => of_kind::<2>(kind),
        (1, 3) => of_kind::<3>(kind),
        (1, 4) => of_kind::<4>(kind),
        (2, 1) => of_floats::<2, 1>(kind),
        (4, 1) => of_floats::<4, 1>(kind),
        _ => unreachable!("no tile is {groups} groups by {tokens} tokens"),
    }
}

fn of_kind<const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::U4Min => quantized::tile::<BlockU4Min, T>,
        Kind::U4 => quantized::tile::<BlockU4, T>,
        Kind::U5Min => quantized::tile::<BlockU5Min, T>,
        Kind::U5 => quantized::tile::<BlockU5, T>,
        Kind::U4K => quantized::tile::<BlockU4K, T>,
        Kind::U5K => quantized::tile::<BlockU5K, T>,
        Kind::U2K => quantized::tile::<BlockU2K, T>,
        Kind::U3K => quantized::tile::<BlockU3K, T>,
        Kind::U6K => quantized::tile::<BlockU6K, T>,
        Kind::T4 => quantized::tile::<BlockT4, T>,
        Kind::T4K => quantized::tile::<BlockT4K, T>,
        Kind::I8 => quantized::tile::<BlockI8, T>,
        Kind::F16 | Kind::BF16 | Kind::F32 => of_floats::<1, T>(kind),
    }
}

fn of_floats<const G: usize, const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::F16 => float::tile::<[u16; LANES], G, T>,
        Kind::BF16 => float::tile::<[bf16; LANES], G, T>,
        Kind::F32 => float::tile::<[f32; LANES], G, T>,
        _ => unreachable!("quantized weights have tiles of one group"),
    }
}
