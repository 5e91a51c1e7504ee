//! Kernels for AVX-VNNI: AVX2's, with another arithmetic for quantized weights.

mod quantized;

use super::{Kernels, avx2};
use crate::kernels::matmul::Tile;
use crate::kernels::pack::Kind;
use quantized::Vnni;

pub(super) const KERNELS: Kernels = Kernels { tile, tokens, groups, ..avx2::KERNELS };

/// Most tokens of a tile: two sums each, or three if 16 columns share a scale.
fn tokens(kind: Kind) -> usize {
    match kind {
        Kind::F16 | Kind::BF16 | Kind::F32 => avx2::tokens(kind),
        Kind::U2K | Kind::U3K | Kind::U6K => 4,
        _ => 6,
    }
}

/// Most groups of a tile.
fn groups(kind: Kind, tokens: usize) -> usize {
    avx2::groups(kind, tokens)
}

/// The kernel for a tile of `groups` groups and `tokens` tokens; the CPU must have AVX2, FMA, F16C
/// and AVX-VNNI.
fn tile(kind: Kind, groups: usize, tokens: usize) -> Tile {
    if kind.is_float() {
        return avx2::tile(kind, groups, tokens);
    }
    match (groups, tokens) {
        (1, 1) => avx2::of_kind::<Vnni, 1, 1>(kind),
        (1, 2) => avx2::of_kind::<Vnni, 1, 2>(kind),
        (1, 3) => avx2::of_kind::<Vnni, 1, 3>(kind),
        (1, 4) => avx2::of_kind::<Vnni, 1, 4>(kind),
        (1, 5) => avx2::of_kind::<Vnni, 1, 5>(kind),
        (1, 6) => avx2::of_kind::<Vnni, 1, 6>(kind),
        (2, 1) => avx2::of_kind::<Vnni, 2, 1>(kind),
        (4, 1) => avx2::of_kind::<Vnni, 4, 1>(kind),
        _ => unreachable!("no tile is {groups} groups by {tokens} tokens"),
    }
}
