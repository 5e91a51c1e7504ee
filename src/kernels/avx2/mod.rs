//! AVX2 with FMA and F16C.
//!
//! 4- and 5-bit weights: products of unsigned weights and signed activations are summed in 16 bits
//! over as many columns as cannot overflow (15·127·2·8 < 32,768 for 4 bits: the whole block;
//! 31·127·2·4 for 5 bits: half of it; 63·127·2·2 for 6 bits: a quarter), and only then widened. 8-bit weights widen at every product,
//! with the weight's sign moved to the activation (|w| is unsigned).

mod attention;
mod float;
mod nibbles;
mod quantize;
mod signed;
mod six;

pub(super) use attention::{Number, score, weigh, widen};
pub(super) use quantize::quantize;

use super::matmul::{Kind, Tile};
use super::pack::{BlockU4, BlockU4K, BlockU4Min, BlockU5, BlockU5K, BlockU5Min, LANES};

/// A kernel for a tile of `groups` groups and `tokens` tokens; the CPU must have AVX2, FMA and F16C.
pub(super) fn tile(kind: Kind, groups: usize, tokens: usize) -> Tile {
    match (groups, tokens) {
        (2, 2) => of_floats::<2, 2>(kind),
        (2, 3) => of_floats::<2, 3>(kind),
        (2, 4) => of_floats::<2, 4>(kind),
        (1, 1) => of_kind::<1, 1>(kind),
        (1, 2) => of_kind::<1, 2>(kind),
        (1, 3) => of_kind::<1, 3>(kind),
        (1, 4) => of_kind::<1, 4>(kind),
        (2, 1) => of_kind::<2, 1>(kind),
        (4, 1) => of_kind::<4, 1>(kind),
        _ => unreachable!("no tile is {groups} groups by {tokens} tokens"),
    }
}

fn of_kind<const G: usize, const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::U4Min => nibbles::tile::<BlockU4Min, G, T>,
        Kind::U4 => nibbles::tile::<BlockU4, G, T>,
        Kind::U5Min => nibbles::tile::<BlockU5Min, G, T>,
        Kind::U5 => nibbles::tile::<BlockU5, G, T>,
        Kind::U4K => nibbles::tile::<BlockU4K, G, T>,
        Kind::U5K => nibbles::tile::<BlockU5K, G, T>,
        Kind::U6K => six::tile::<G, T>,
        Kind::I8 => signed::tile::<G, T>,
        Kind::F16 | Kind::F32 => of_floats::<G, T>(kind),
    }
}

fn of_floats<const G: usize, const T: usize>(kind: Kind) -> Tile {
    match kind {
        Kind::F16 => float::tile::<[u16; LANES], G, T>,
        Kind::F32 => float::tile::<[f32; LANES], G, T>,
        _ => unreachable!("quantized weights have one group for several tokens"),
    }
}
