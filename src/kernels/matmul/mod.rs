//! Products of a packed matrix (rows) and activations (tokens of a batch).
//!
//! A result is one sum over the blocks of a row, in order, whatever tile computes it: a token's
//! result is bit-identical alone and in any batch.

use super::activation::{Quantized, Row};
#[cfg(target_arch = "x86_64")]
use super::avx2;
use super::pack::{Kind, LANES, Matrix};
use super::pool::Disjoint;
use super::scalar;
use std::ops::Range;
use std::sync::LazyLock;

/// Computes a tile of the result: `groups` groups of eight rows from `weights` on, with `blocks`
/// blocks (or columns) per group, times the rows of `x`. Row `t` of the result starts at `out + t *
/// stride`.
///
/// # Safety
/// All of these elements must be readable and writable, and the CPU must support the instructions.
pub(super) type Tile =
    unsafe fn(weights: *const u8, blocks: usize, x: &[Row], out: *mut f32, stride: usize);

/// Activations in the form that a matrix needs.
#[derive(Clone, Copy)]
pub enum Input<'a> {
    Quantized(&'a Quantized),
    /// (rows, columns)
    Float(&'a [f32], usize),
}

impl Input<'_> {
    fn row(&self, row: usize) -> Row {
        let none = std::ptr::null();
        match self {
            Self::Quantized(x) => Row {
                q: x.q(row).as_ptr(),
                d: x.d(row).as_ptr(),
                s: x.s(row).as_ptr(),
                h: x.h(row).as_ptr(),
                f: none,
            },
            Self::Float(x, cols) => {
                let f = x[row * cols..(row + 1) * cols].as_ptr();
                Row { q: std::ptr::null(), d: none, s: none, h: none, f }
            }
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Quantized(x) => x.cols(),
            Self::Float(_, cols) => *cols,
        }
    }
}

/// The instruction set in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    Scalar,
    Avx2,
}

/// The best instruction set that this CPU supports.
pub fn isa() -> Isa {
    static ISA: LazyLock<Isa> = LazyLock::new(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
        {
            return Isa::Avx2;
        }
        Isa::Scalar
    });
    *ISA
}

/// Most tokens of a tile.
const TOKENS: usize = 6;

/// Computes `out[t][n]` for the rows of `groups` and the tokens of `tokens`. The first token's
/// first row is at index `at` of `out`; tokens are `stride` elements apart.
///
/// # Safety
/// `out`'s slice must still be borrowed, and no other thread may access the part that is written.
pub unsafe fn multiply(
    isa: Isa,
    matrix: &Matrix,
    groups: Range<usize>,
    input: &Input,
    tokens: Range<usize>,
    out: Disjoint<f32>,
    at: usize,
    stride: usize,
) {
    assert!(groups.end <= matrix.groups(), "the rows are inside");
    assert_eq!(input.cols(), matrix.cols(), "the input has a value for every column");
    assert_eq!(matches!(input, Input::Quantized(_)), matrix.takes_quantized());
    if tokens.is_empty() || groups.is_empty() {
        return;
    }
    // Check the bounds once for all tiles: the last tile ends where this span does.
    let span = (tokens.len() - 1) * stride + groups.len() * LANES;
    let out = out.span(at, span);
    let weights = Weights::of(matrix);
    let mut rows = [Row::default(); TOKENS];
    let each = weights.kind.tokens();
    for first in tokens.clone().step_by(each) {
        let count = each.min(tokens.end - first);
        for (t, row) in rows[..count].iter_mut().enumerate() {
            *row = input.row(first + t);
        }
        let most = weights.kind.groups(count);
        let mut group = groups.start;
        while group < groups.end {
            let wide = match groups.end - group {
                left if left >= most => most,
                left if left >= 2 => 2,
                _ => 1,
            };
            let tile = weights.tile(isa, wide, count);
            let offset = (first - tokens.start) * stride + (group - groups.start) * LANES;
            // SAFETY: the groups and tokens are inside, `span` covers what is written, and the CPU
            // supports the instructions.
            unsafe {
                let from = weights.data.add(group * weights.group_bytes);
                tile(from, weights.blocks, &rows[..count], out.add(offset), stride);
            }
            group += wide;
        }
    }
}

/// A matrix without its type.
struct Weights {
    kind: Kind,
    data: *const u8,
    /// Blocks (or columns) per group.
    blocks: usize,
    group_bytes: usize,
}

impl Kind {
    /// Most tokens of a tile: as many sums as the registers can hold.
    fn tokens(self) -> usize {
        if self.is_float() { TOKENS } else { 4 }
    }

    /// Most groups of a tile.
    fn groups(self, tokens: usize) -> usize {
        match tokens {
            // Limited by memory bandwidth: more rows in flight.
            1 => 4,
            // Enough independent sums to hide the latency of each.
            _ if self.is_float() => 2,
            // The weights of one group's block fit into registers; those of two groups do not.
            _ => 1,
        }
    }
}

impl Weights {
    fn of(matrix: &Matrix) -> Self {
        let raw = matrix.raw();
        let blocks = raw.len / matrix.groups().max(1);
        Self { kind: raw.kind, data: raw.data, blocks, group_bytes: blocks * raw.size }
    }

    fn tile(&self, isa: Isa, groups: usize, tokens: usize) -> Tile {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::tile(self.kind, groups, tokens),
            _ => scalar::tile(self.kind, groups),
        }
    }
}

#[cfg(test)]
mod tests;
