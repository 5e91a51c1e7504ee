//! Kernels for AVX-512 with VNNI (F, BW, DQ, VL, VNNI): sixteen rows, two groups, in a register.
//!
//! The sums over 32 columns are exact integers, and the floating-point operations are those of the
//! AVX2 kernels in the same order, so the results are bit-identical.

mod attention;
mod block;
mod dense;
mod float;
mod quantize;
mod quantized;

use super::{Attention, Dense, Kernels, avx2};
use crate::kernels::matmul::Tile;
use crate::kernels::pack::*;
use half::bf16;

/// Bytes per cache line.
const LINE: usize = 64;

pub(super) const KERNELS: Kernels = Kernels {
    tile,
    tiles: Some(tiles),
    tokens,
    groups,
    quantize: quantize::quantize,
    attention: Attention {
        score: attention::score,
        accumulate_values: attention::accumulate_values,
        softmax: attention::softmax,
        widen: attention::widen,
    },
    dense: Dense { shape: dense::SHAPE, tile: dense::tile, ..avx2::KERNELS.dense },
};

/// Most tokens of a tile: one sum each, and as many numbers beside them.
const fn tokens(kind: Kind) -> usize {
    match kind {
        Kind::F16 | Kind::BF16 | Kind::F32 => 8,
        // Two integer sums for each token.
        Kind::U2K | Kind::U3K | Kind::U6K => 6,
        _ => 12,
    }
}

/// Most groups of a tile: for few tokens, which memory limits, more rows in flight.
fn groups(kind: Kind, tokens: usize) -> usize {
    match tokens {
        1 => 8,
        2..=4 => 4,
        _ if kind.is_float() => 4,
        _ => 2,
    }
}

fn tile(kind: Kind, groups: usize, tokens: usize) -> Tile {
    macro_rules! by_tokens {
        ($groups:ident, $pairs:literal: $($tokens:literal)*) => {
            match tokens {
                $($tokens => of_kind::<$pairs, $tokens>(kind),)*
                _ => unreachable!("no tile is {groups} groups by {tokens} tokens"),
            }
        };
    }
    match groups {
        8 => by_tokens!(groups, 4: 1),
        4 if tokens > 4 => match tokens {
            5 => of_floats::<2, 5>(kind),
            6 => of_floats::<2, 6>(kind),
            7 => of_floats::<2, 7>(kind),
            8 => of_floats::<2, 8>(kind),
            _ => unreachable!("no tile is {groups} groups by {tokens} tokens"),
        },
        4 => by_tokens!(groups, 2: 1 2 3 4),
        2 => by_tokens!(groups, 1: 1 2 3 4 5 6 7 8 9 10 11 12),
        1 => by_tokens!(groups, 0: 1 2 3 4 5 6 7 8 9 10 11 12),
        _ => unreachable!("no tile is {groups} groups by {tokens} tokens"),
    }
}

/// The kernel for two groups and many whole tiles of tokens, if the weights have to be unpacked.
fn tiles(kind: Kind) -> Option<Tile> {
    Some(match kind {
        Kind::U4Min => quantized::tiles::<BlockU4Min, { tokens(Kind::U4Min) }>,
        Kind::U4 => quantized::tiles::<BlockU4, { tokens(Kind::U4) }>,
        Kind::U5Min => quantized::tiles::<BlockU5Min, { tokens(Kind::U5Min) }>,
        Kind::U5 => quantized::tiles::<BlockU5, { tokens(Kind::U5) }>,
        Kind::U4K => quantized::tiles::<BlockU4K, { tokens(Kind::U4K) }>,
        Kind::U5K => quantized::tiles::<BlockU5K, { tokens(Kind::U5K) }>,
        Kind::T4 => quantized::tiles::<BlockT4, { tokens(Kind::T4) }>,
        Kind::T4K => quantized::tiles::<BlockT4K, { tokens(Kind::T4K) }>,
        Kind::I8 => quantized::tiles::<BlockI8, { tokens(Kind::I8) }>,
        Kind::U2K => quantized::tiles::<BlockU2K, { tokens(Kind::U2K) }>,
        Kind::U3K => quantized::tiles::<BlockU3K, { tokens(Kind::U3K) }>,
        Kind::U6K => quantized::tiles::<BlockU6K, { tokens(Kind::U6K) }>,
        Kind::F16 | Kind::BF16 | Kind::F32 => return None,
    })
}

/// The kernel for `P` pairs of groups, or for a single group if `P` is 0.
fn of_kind<const P: usize, const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::U4Min => quantized::tile::<BlockU4Min, P, T>,
        Kind::U4 => quantized::tile::<BlockU4, P, T>,
        Kind::U5Min => quantized::tile::<BlockU5Min, P, T>,
        Kind::U5 => quantized::tile::<BlockU5, P, T>,
        Kind::U4K => quantized::tile::<BlockU4K, P, T>,
        Kind::U5K => quantized::tile::<BlockU5K, P, T>,
        Kind::T4 => quantized::tile::<BlockT4, P, T>,
        Kind::T4K => quantized::tile::<BlockT4K, P, T>,
        Kind::I8 => quantized::tile::<BlockI8, P, T>,
        Kind::U2K if T <= tokens(Kind::U2K) => quantized::tile::<BlockU2K, P, T>,
        Kind::U3K if T <= tokens(Kind::U3K) => quantized::tile::<BlockU3K, P, T>,
        Kind::U6K if T <= tokens(Kind::U6K) => quantized::tile::<BlockU6K, P, T>,
        _ => of_floats::<P, T>(kind),
    }
}

fn of_floats<const P: usize, const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::F16 => float::tile::<[u16; LANES], P, T>,
        Kind::BF16 => float::tile::<[bf16; LANES], P, T>,
        Kind::F32 => float::tile::<[f32; LANES], P, T>,
        _ => unreachable!("no tile of {kind:?} has {T} tokens"),
    }
}
