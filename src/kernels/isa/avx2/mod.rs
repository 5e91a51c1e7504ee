//! Kernels for AVX2 with FMA and F16C.

mod attention;
mod block;
mod dense;
mod float;
mod quantize;
mod quantized;

pub(super) use block::Block;
pub(super) use quantized::{Sums, each_part, in_order};

use super::{Attention, Dense, Kernels, scalar};
use crate::kernels::gemm;
use crate::kernels::matmul::Tile;
use crate::kernels::pack::*;
use half::bf16;
use quantized::Narrow;
use std::arch::x86_64::*;

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

/// Most tokens of a tile: as many sums as the registers can hold.
pub(super) fn tokens(kind: Kind) -> usize {
    if kind.is_float() { 6 } else { 4 }
}

/// Most groups of a tile.
pub(super) fn groups(kind: Kind, tokens: usize) -> usize {
    match tokens {
        // Limited by memory bandwidth: more rows in flight.
        1 => 4,
        // Enough independent sums to hide the latency of each.
        _ if kind.is_float() => 2,
        // The weights of one group's block fit into registers; those of two groups do not.
        _ => 1,
    }
}

/// Bytes per cache line.
const LINE: usize = 64;

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn f16_to_f32(bits: &[u16; 8]) -> __m256 {
    // SAFETY: sixteen bytes are read.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(bits.as_ptr().cast()) })
}

#[target_feature(enable = "avx2")]
#[inline]
fn u8_to_f32(bytes: &[u8; 8]) -> __m256 {
    // SAFETY: eight bytes are read.
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }))
}

#[target_feature(enable = "avx2")]
#[inline]
fn signed_whole(bytes: &[i8; 8]) -> __m256 {
    // SAFETY: eight bytes are read.
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) }))
}

/// The kernel for a tile of `groups` groups and `tokens` tokens; the CPU must have AVX2, FMA and
/// F16C.
pub(super) fn tile(kind: Kind, groups: usize, tokens: usize) -> Tile {
    match (groups, tokens) {
        (2, 2) => of_floats::<2, 2>(kind),
        (2, 3) => of_floats::<2, 3>(kind),
        (2, 4) => of_floats::<2, 4>(kind),
        (2, 5) => of_floats::<2, 5>(kind),
        (2, 6) => of_floats::<2, 6>(kind),
        (1, 5) => of_floats::<1, 5>(kind),
        (1, 6) => of_floats::<1, 6>(kind),
        (1, 1) => of_kind::<Narrow, 1, 1>(kind),
        (1, 2) => of_kind::<Narrow, 1, 2>(kind),
        (1, 3) => of_kind::<Narrow, 1, 3>(kind),
        (1, 4) => of_kind::<Narrow, 1, 4>(kind),
        (2, 1) => of_kind::<Narrow, 2, 1>(kind),
        (4, 1) => of_kind::<Narrow, 4, 1>(kind),
        _ => unreachable!("no tile is {groups} groups by {tokens} tokens"),
    }
}

/// Prefetches the cache lines that begin in `bytes` bytes from `from` on. A product with one token
/// is limited by memory, and a group of a small matrix ends before the hardware prefetcher detects
/// a stream: so a tile prefetches the next tile's bytes while it reads its own. After the last tile
/// the address may be invalid, which is harmless.
#[target_feature(enable = "avx2")]
#[inline]
fn prefetch(from: *const u8, bytes: usize) {
    for line in 0..bytes.div_ceil(LINE) {
        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line * LINE).cast());
    }
}

/// The kernel of one shape, with the arithmetic `S`, whose instructions the CPU must have.
pub(super) fn of_kind<S: Sums, const G: usize, const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::U4Min => quantized::tile::<S, BlockU4Min, G, T>,
        Kind::U4 => quantized::tile::<S, BlockU4, G, T>,
        Kind::U5Min => quantized::tile::<S, BlockU5Min, G, T>,
        Kind::U5 => quantized::tile::<S, BlockU5, G, T>,
        Kind::U4K => quantized::tile::<S, BlockU4K, G, T>,
        Kind::U5K => quantized::tile::<S, BlockU5K, G, T>,
        Kind::U2K => quantized::tile::<S, BlockU2K, G, T>,
        Kind::U3K => quantized::tile::<S, BlockU3K, G, T>,
        Kind::U6K => quantized::tile::<S, BlockU6K, G, T>,
        Kind::T4 => quantized::tile::<S, BlockT4, G, T>,
        Kind::T4K => quantized::tile::<S, BlockT4K, G, T>,
        Kind::I8 => quantized::tile::<S, BlockI8, G, T>,
        Kind::F16 | Kind::BF16 | Kind::F32 => of_floats::<G, T>(kind),
    }
}

fn of_floats<const G: usize, const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::F16 => float::tile::<[u16; LANES], G, T>,
        Kind::BF16 => float::tile::<[bf16; LANES], G, T>,
        Kind::F32 => float::tile::<[f32; LANES], G, T>,
        _ => unreachable!("quantized weights have one group for several tokens"),
    }
}
