//! The kernels of each instruction set.
//!
//! | folder | instructions |
//! |---|---|
//! | `scalar/` | none: the bit-exact oracle of the others, and the fallback |
//! | `avx2/` | AVX2, FMA, F16C |
//! | `avxvnni/` | AVX-VNNI, for quantized weights; the rest is AVX2's |
//! | `avx512/` | AVX-512 F, BW, DQ, VL and VNNI; what it lacks is AVX2's |
//! | `neon/` | NEON with `dotprod` (aarch64); the softmax is scalar code |
//!
//! All give bit-identical results, except dense products in f32, which are rounded differently.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avxvnni;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(super) mod scalar;

use super::attention::Scores;
use super::cache::Numbers;
use super::gemm;
use super::matmul::Tile;
use super::pack::{BLOCK, Kind};
pub(super) use crate::isa::{Isa, isa};
use std::ops::Range;

impl Isa {
    /// Its kernels. They may only be called if the CPU has the instructions.
    pub(super) fn kernels(self) -> &'static Kernels {
        static SCALAR: Kernels = scalar::KERNELS;
        #[cfg(target_arch = "x86_64")]
        static AVX2: Kernels = avx2::KERNELS;
        #[cfg(target_arch = "x86_64")]
        static AVXVNNI: Kernels = avxvnni::KERNELS;
        #[cfg(target_arch = "x86_64")]
        static AVX512: Kernels = avx512::KERNELS;
        #[cfg(target_arch = "aarch64")]
        static NEON: Kernels = neon::KERNELS;
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &AVX2,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => &AVXVNNI,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => &AVX512,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => &NEON,
            _ => &SCALAR,
        }
    }
}

/// The kernels of one instruction set, and the shapes of their tiles.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// The kernel for a tile of this many groups and tokens.
    pub tile: fn(kind: Kind, groups: usize, tokens: usize) -> Tile,
    /// A kernel for two groups and whole tiles of the most tokens that unpacks the weights once: `x`
    /// has the first row of each tile.
    pub tiles: Option<fn(kind: Kind) -> Option<Tile>>,
    /// Most tokens of a tile, at most [`PANEL`](super::activation::PANEL).
    pub tokens: fn(kind: Kind) -> usize,
    /// Most groups of a tile of this many tokens: a power of two, as are smaller numbers of groups.
    pub groups: fn(kind: Kind, tokens: usize) -> usize,
    pub quantize: Quantize,
    pub attention: Attention,
    pub dense: Dense,
}

/// Quantizes a block of activations into eight bits. Returns the scale, and the sums of the
/// integers of both halves.
type Quantize = fn(values: &[f32; BLOCK], q: &mut [i8; BLOCK]) -> (f32, [i32; 2]);

/// Attention over one page, for at most [`ROWS`](super::attention::ROWS) query heads.
#[derive(Clone, Copy)]
pub(super) struct Attention {
    /// `scores[row][at..at + 32] = q[row] · keys`; `keys` (head_dim, 32), `q` (rows, head_dim).
    pub score: fn(q: &[f32], keys: Numbers, scores: &mut [Scores], at: usize),
    /// `out[row] += scores[row][at + t] * values[t]` for the tokens `tokens` of a page that begins
    /// at `at`; `values` (32, head_dim), `out` (rows, head_dim).
    pub accumulate_values:
        fn(scores: &[Scores], at: usize, tokens: Range<usize>, values: Numbers, out: &mut [f32]),
    /// Replaces scores by e^(score - largest). Returns the largest score and the sum, which is
    /// computed in lanes of eight.
    pub softmax: fn(scores: &mut [f32]) -> (f32, f32),
    /// Converts the numbers of a range of a page to f32, without their scales.
    pub widen: fn(from: Numbers, range: Range<usize>, to: &mut [f32]),
}

/// Dense products in f32.
#[derive(Clone, Copy)]
pub(super) struct Dense {
    pub shape: gemm::Shape,
    /// The kernel for these numbers of rows and strips, and a left operand with these strides.
    pub tile: fn(rows: usize, strips: usize, strides: [usize; 2]) -> gemm::Tile<f32>,
    /// Transposes a block of eight by eight numbers: the rows of the source and of the result are
    /// these strides apart.
    ///
    /// # Safety
    /// All of these numbers must be readable and writable.
    pub transpose: unsafe fn(*const f32, usize, *mut f32, usize),
}
